"""Wrong arguments of every public function: refused by name, or NaN where nobody could know."""

import os
import pathlib
import subprocess
import sys

import calls
import calls_measures
import pytest

import ddim_jax as dj
from ddim_jax import convert, data

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERY = [call for shape in calls.SHAPES for call in calls.every_call(shape)]
NOT_CALLED = {
    # Tables, types and protocols; samplers without arguments; what the others are made of.
    "PARAMETRIZATIONS", "SAMPLERS", "BoundTerms", "Denoiser", "EpsFn", "NoiseSchedule",
    "Parametrization", "Prediction", "Sampler", "SamplerState", "dpm_solver_pp_2m", "heun",
    "probability_flow_euler", "sigma_hat", "ddpm", "fold_in", "interpolation_grid", "ode_field",
}  # fmt: skip


def faults(number: int, seed: int, module=calls) -> str:
    """What is said of so many calls, in a process without the tests' own checks of types."""
    done = subprocess.run(
        [sys.executable, module.__file__, str(number), "--seed", str(seed)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout + done.stderr


def test_some_are_refused_or_right():
    assert faults(250, 0).splitlines()[-1].endswith(" 0 faults")


def test_some_of_metrics_data_and_converters_are_refused_or_right():
    assert faults(200, 0, calls_measures).splitlines()[-1].endswith(" 0 faults")


@pytest.mark.slow
@pytest.mark.parametrize("module", [calls, calls_measures])
def test_all_are_refused_or_right(module):
    number = sum(len(calls.every_call(shape, module.uses)) for shape in module.SHAPES)
    said = faults(number, 1, module)
    assert said.startswith(f"{number} calls") and said.strip().endswith(" 0 faults")


def test_every_function_is_among_them():
    assert len(EVERY) >= 20_000
    assert set(dj.__all__) - calls.uses().keys() == NOT_CALLED


def test_what_measures_and_translates_is_among_them():
    """But for what reads or writes files, which files.py damages, and types."""
    named = set(calls_measures.uses())
    there = {name for module in (data, convert) for name in vars(module) if name[0].islower()}
    functions = {n for n in there if callable(getattr(data, n, None) or getattr(convert, n, None))}
    of_files = {"open_diffusers", "save_diffusers", "load_paper_checkpoint", "prefetch_to_device"}
    assert functions - named == of_files | {"content_of"}
    metrics = {"frechet_distance", "kid", "inception_score", "precision_recall", "density_coverage"}
    assert metrics <= named


def test_a_fault_would_be_found():
    """A clamp where a refusal is due, and an error from inside NumPy."""
    role = {"x": calls.Role(lambda shape: 1.0, {"words": lambda shape: "a"})}
    table = calls.uses() | {
        "silent": (lambda x: 1.0, role),
        "foreign": (lambda x: x + 1, role),
        "refused below": (lambda x: float(x), role),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "uses", lambda: table)
        said = [
            calls.fault_of(calls.Call(name, (2,), "x", "words", "wrong"))
            for name in ("silent", "foreign", "refused below")
        ]
    assert said[0] == "silent: 1.0" and said[1].startswith("foreign TypeError")
    assert said[2].startswith("foreign ValueError: could not convert")


def hurt_files(number: int) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/faults/files.py"), str(number)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_some_damaged_files_are_refused_or_read_as_they_were():
    assert ", 0 faults, at most" in hurt_files(40)


@pytest.mark.slow
def test_damaged_files_are_refused_or_read_as_they_were():
    assert ", 0 faults, at most" in hurt_files(3000)


@pytest.mark.slow
def test_command_lines_end_as_they_should():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/faults/commands.py"), "--every", "3"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
