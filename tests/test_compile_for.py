"""Compiling for a slice that is not there: what the compiler says of one small network."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax import parallel

pytest.importorskip("tyro")

SCRIPT = pathlib.Path(__file__).parents[1] / "experiments" / "benchmarks" / "compile_for.py"
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def run(*arguments):
    # A process of its own: the compiler's library looks at the environment when it is loaded.
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_a_slice_that_nobody_knows_is_one_line():
    done = run("--topology", "v5e:two", "--configs", "cifar10")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "topology must be one that libtpu knows" in done.stderr and "v5e:two" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs the extra tpu")
def test_features_for_four_chips(tmp_path):
    out = tmp_path / "table.json"
    done = run("--programs", "features", "--configs", "cifar10", "--batch-per-chip", "8",
               "--out", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    # Inception v3 takes 5.7 billion multiplications and additions an image: 11.4 GFLOP.
    assert 0.9 < row["flops"] / (8 * 11.4e9) < 1.2
    assert row["memory"] > 4 * 21.8e6  # its parameters, in float32
    again = run("--programs", "features", "--configs", "cifar10", "--batch-per-chip", "8",
                "--out", str(out))  # fmt: skip
    assert again.returncode == 0 and len(json.loads(out.read_text())["rows"]) == 1


def test_a_program_is_compiled_from_shapes_alone():
    """For the devices it is given, with the shapes that a call would have."""
    devices = jax.local_devices()[:1]
    program = parallel.over_devices(lambda w, x: {"y": x @ w}, devices)
    shapes = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32)
    compiled = program.compile(*shapes)
    assert jax.tree.map(np.shape, compiled.out_info) == {"y": (4, 5)}
    costs = compiled.cost_analysis()
    assert costs["flops"] == 2 * 4 * 3 * 5
    assert compiled.output_shardings["y"].device_set == set(devices)
