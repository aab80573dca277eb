"""What is missing or damaged in a workdir is not taken for a new run."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import edits
import pytest
from refusals import refused
from small_runs import SMALL, assert_same_bits, leaves, newest_step

from ddim_jax.runs import fit, load_trained
from ddim_jax.runs.config import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]


def of(workdir: pathlib.Path, **changes) -> TrainConfig:
    settings = {"workdir": str(workdir), "checkpoint_every": 2, **changes}
    return dataclasses.replace(SMALL, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(of(folder))
    return folder


@pytest.fixture
def run(trained, tmp_path) -> pathlib.Path:
    return shutil.copytree(trained, tmp_path / "run")


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def unchanged(folder: pathlib.Path, before: dict[str, bytes]) -> bool:
    return {**files(folder), ".lock": b""} == {**before, ".lock": b""}


def empty(checkpoints: pathlib.Path) -> None:
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()


def half_written(checkpoints: pathlib.Path) -> None:
    for step in checkpoints.iterdir():
        step.rename(step.with_name(f"{step.name}.orbax-checkpoint-tmp"))


@pytest.mark.parametrize("lose", [shutil.rmtree, empty, half_written])
@pytest.mark.parametrize("older", [False, True])
def test_checkpoints_that_are_gone_are_no_new_run(run, lose, older):
    """Whether the version that trained it wrote saved.json, or left metrics.jsonl alone."""
    assert edits.content(run / "saved.json") == {"format": 1, "step": 6}
    if older:
        (run / "saved.json").unlink()
        (run / "config.json").write_text(json.dumps(edits.content(run / "config.json")))
    lose(run / "checkpoints")
    before = files(run)
    with refused(f"saved a checkpoint of step {4 if older else 6}.*moved.*Put them back"):
        fit(of(run))
    with refused("saved a checkpoint"):
        fit(of(run, learning_rate=1.0))
    assert unchanged(run, before)


def test_a_run_that_saved_nothing_binds_nobody(run):
    """Killed before its first checkpoint, which it says nowhere that it saved."""
    shutil.rmtree(run / "checkpoints")
    (run / "saved.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:1]))  # of step 2, where the first is saved
    fit(of(run, learning_rate=2e-3))
    assert newest_step(run) == 6


def test_checkpoints_without_their_config_are_no_new_run(run):
    (run / "config.json").unlink()
    before = files(run)
    with refused("holds checkpoints and its config.json is gone"):
        fit(of(run))
    assert unchanged(run, before)


def test_a_digit_that_flipped_in_config_is_found(run):
    """0.02, the schedule's last beta, as 0.03: another model's numbers, silently."""
    path = run / "config.json"
    text = path.read_text()
    assert text.count("0.02") == 1
    path.write_text(text.replace("0.02", "0.03"))
    for use in (lambda: load_trained(run), lambda: fit(of(run))):
        with refused("config.json: it is not what was written.*delete the 'seal'"):
            use()
    path.write_text(json.dumps(edits.content(path)))  # changed on purpose
    assert load_trained(run).spec.schedule_config.beta_end == 0.03


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, trained, tmp_path):
    (victim,) = (p for p in (run / "checkpoints/6").glob("default/d/*"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match=r"/6 is damaged .*Taken instead: step 4"):
        assert load_trained(run).step == 4
    with refused("/6 is damaged"):
        load_trained(run, step=6)
    with pytest.warns(UserWarning, match="Taken instead: step 4"):
        fit(of(run))
    assert_same_bits(run, trained)
    assert (run / "metrics.jsonl").read_text().count('"step": 6,') == 1
    assert (run / "checkpoints/6.damaged").is_dir()
    load_trained(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(trained, tmp_path, number):
    """At no chosen moment, by a real process; the same command ends with the same bits."""
    code = f"""
import dataclasses, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from small_runs import SMALL
from ddim_jax.runs import fit
fit(dataclasses.replace(SMALL, workdir=sys.argv[1], max_steps=int(sys.argv[2])))
"""
    steps, folder = 100_000, tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(steps)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    lines = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"{number.name}: finishing this step and saving it" in errors
    step = newest_step(folder)
    assert (
        step is not None
        and f"step {step} is in {folder}; stopped, {number.name}: call again" in out
    )
    fit(of(folder, max_steps=step + 2, checkpoint_every=100))
    fit(of(tmp_path / "straight", max_steps=step + 2, checkpoint_every=100))
    assert_same_bits(folder, tmp_path / "straight")
    assert leaves(folder)["['step']"] == step + 2
