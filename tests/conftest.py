"""Shared by all tests: where the golden files stand, and how to skip without them."""

import os
import pathlib
import sys
import tempfile
import zlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The same small networks are compiled by many tests, and by the processes they start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/ddim_jax_tests_{os.getuid()}"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

SHARED = pathlib.Path(os.environ.get("DDIM_JAX_SHARED", ROOT.parent / "shared"))
# The scripts import each other as when run.
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "experiments" / "benchmarks")]


MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Programs that XLA:CPU keeps are memory maps; at 65530 of them, Linux's limit, it crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        import jax  # here, since it reads the environment that is set above

        jax.clear_caches()


def _shared(name: str) -> pathlib.Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set DDIM_JAX_SHARED to the folder that has {name}")
    return path


@pytest.fixture(scope="session")
def shared():
    """shared("golden/frechet.npz") -> its path, or a skip with the reason."""
    return _shared


@pytest.fixture(scope="session")
def golden():
    """golden("frechet.npz") -> dict of arrays, or a skip with the reason."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(_shared(f"golden/{name}")) as file:
            return dict(file)

    return load


def golden_param(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight the golden files were made with: torch name, torch layout, float32."""
    a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return 0.5 + np.abs(a)
    if name.endswith("running_mean"):
        return 0.1 * a
    if len(shape) == 1:
        return 1 + 0.1 * a if name.endswith("weight") else 0.05 * a
    return a / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
