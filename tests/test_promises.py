"""The table of the README that says what stays the same, read and tried."""

import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as dj
from ddim_jax.metrics.frechet import frechet_distance_from_features
from ddim_jax.numerics import expand_level
from ddim_jax.parallel import map_rows, over_devices

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCHEDULE, SHAPE, NUM = dj.linear_schedule(1000), (8, 8, 1), 192
STEPS = dj.ddim_timesteps(1000, 10)


def promises(row: str) -> dict[str, float]:
    """What the README's row that begins so promises: "images" -> 1e-4; 0 is bit for bit."""
    text = (ROOT / "README.md").read_text()
    (found,) = re.findall(rf"^\| {row}.*?\| (.*?) \|$", text, re.MULTILINE)
    parts = re.findall(r"(\w+): (?:to ([\d.e-]+)|bit for bit)", found)
    return {name: float(number or 0) for name, number in parts}


def eps_fn(x, t):
    """A network with a sum over each image, whose order a compiler may choose."""
    level = expand_level(SCHEDULE.alpha_bar(t), x)
    mean = jnp.mean(jnp.sin(3 * x), axis=(1, 2, 3), keepdims=True)
    return jnp.sqrt(1 - level) * (x + mean) / (1 + level)


def drawn(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise and images of all indices, in batches of that size on all devices."""
    key = dj.seed_key(3)

    def program(key, indices):
        x_T, keys = dj.initial_noise(key, indices, SHAPE)
        return x_T, dj.sample(keys, eps_fn, SCHEDULE, x_T, STEPS, dj.ddim(0.5))

    return map_rows(over_devices(program), key, batch_size, np.arange(NUM))


def check(row: str, one, other) -> None:
    promised = promises(row)
    assert promised == {"noise": 0, "images": 1e-4, "distances": 1e-3}
    (noise, images), (noise_too, images_too) = one, other
    assert noise.tobytes() == noise_too.tobytes()
    np.testing.assert_allclose(images_too, images, rtol=0, atol=promised["images"])
    real = np.random.default_rng(0).normal(size=(NUM, 16))
    distances = [
        frechet_distance_from_features(x.reshape(NUM, -1)[:, :16].astype(np.float64), real)
        for x in (images, images_too)
    ]
    assert distances[1] == pytest.approx(distances[0], rel=promised["distances"])


def test_batches_of_any_size_draw_the_same():
    whole = drawn(64)
    for batch_size in (1, 7):
        check("batches of 1, 7 or 64 images", whole, drawn(batch_size))


def test_eight_devices_draw_what_one_does(tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]\n"
        "import jax, numpy as np, test_promises\n"
        "assert jax.device_count() == 8\n"
        "np.savez(sys.argv[1], *test_promises.drawn(64))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "eight.npz")], check=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    with np.load(tmp_path / "eight.npz") as file:
        check("1 or 8 devices, 1 or 2 processes", drawn(64), (file["arr_0"], file["arr_1"]))


def test_the_same_call_twice_gives_the_same_bits():
    assert "every number, bit for bit" in (ROOT / "README.md").read_text()
    for one, other in zip(drawn(64), drawn(64), strict=True):
        assert one.tobytes() == other.tobytes()
