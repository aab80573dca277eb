"""The library on arrays that are split over eight devices gives what one device gives."""

import os
import pathlib
import subprocess
import sys

import pytest

import ddim_jax as dj

TESTS = pathlib.Path(__file__).parent
# One where XLA splits the arrays, one where the function is written for a part of them.
TWO_WAYS = ["jit, explicit axes", "shard_map on explicit axes"]
# Settings, types and tables that are made on the host, from no array of images.
OF_NO_IMAGES = {
    "PARAMETRIZATIONS",
    "BoundTerms",
    "EpsFn",
    "NoiseSchedule",
    "Parametrization",
    "Prediction",
    "Sampler",
    "SamplerState",
    "cosine_schedule",
    "fixed_large_sigmas",
    "scaled_linear_schedule",
    "schedule_from_betas",
    "seed_key",
    "variational_weights",
    "zero_terminal_snr",
}


def run(*ways: str) -> str:
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(TESTS / "sharded_uses.py"), *ways],
        env=os.environ
        | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_every_use_on_explicit_and_on_manual_axes():
    said = run(*TWO_WAYS)
    assert [line.split(":")[0] for line in said.splitlines()] == TWO_WAYS


@pytest.mark.slow
def test_every_use_in_every_way():
    assert len(run().splitlines()) == 6


def test_every_public_name_is_among_the_uses():
    source = (TESTS / "sharded_uses.py").read_text()
    left = {name for name in dj.__all__ if name not in source} - OF_NO_IMAGES
    left -= {
        getattr(sampler, "__name__", "") for sampler in dj.SAMPLERS.values()
    }  # run by their names
    assert not {name for name in left if "_to_" not in name}  # conversions run by their names
