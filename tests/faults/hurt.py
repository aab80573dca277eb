"""Runs real commands, hurts them, and compares what they leave with an undisturbed run.

python tests/faults/hurt.py kills --train 100 --sweep 40 --sample 20 --statistics 20 --convert 20
python tests/faults/hurt.py signals --train 10 --sweep 5 --sample 5
python tests/faults/hurt.py disks                                # a small tmpfs each; needs root

Prints one line a job: what was done to it, and whether its end is the undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
LEFTOVERS = ("*.new", "*orbax-checkpoint-tmp*", "partial.npz", "drawn.npz", ".shared.*")
"""What a call that was hurt may leave, and none may that ended."""

TRAIN_STEPS = 200
TRAIN = [
    *("train.py", "digits", "--model.channels", "8", "--model.channel-mults", "1"),
    *("--model.num-res-blocks", "1", "--model.attention-resolutions", "--model.norm-groups", "4"),
    *("--batch-size", "16", "--checkpoint-every", "20", "--log-every", "10"),
    *("--max-steps", str(TRAIN_STEPS), "--sample-every", "100"),
]


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, into a folder of its own."""

    command: Callable[[pathlib.Path], Sequence[str]]
    """(out) -> the script and its arguments."""
    content: Callable[[pathlib.Path], dict[str, object]]
    """(out) -> everything that must be as in the undisturbed run, by name."""

    def start(self, out: pathlib.Path, **environment: str) -> subprocess.Popen[str]:
        """The command, with more in its environment if given."""
        script, *arguments = self.command(out)
        return subprocess.Popen(
            [sys.executable, str(EXPERIMENTS / script), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=ENVIRONMENT | environment,
        )  # fmt: skip

    def run(self, out: pathlib.Path) -> str:
        process = self.start(out)
        said, errors = process.communicate()
        assert process.returncode == 0, f"{self.command(out)} ended with {errors}"
        return said


# ---------------------------------------------------------------------------------------------
# What there is to compare


def _arrays(path: pathlib.Path) -> dict[str, object]:
    with np.load(path) as file:
        return {f"{path.name}:{name}": file[name].tobytes() for name in file.files}


def _pngs(folder: pathlib.Path) -> dict[str, object]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}


def _checkpoints(out: pathlib.Path) -> dict[str, object]:
    import jax
    import orbax.checkpoint as ocp

    found: dict[str, object] = {}
    for folder in (out / "checkpoints").iterdir():
        assert folder.name.isdecimal(), f"{folder} is left"
        tree = ocp.PyTreeCheckpointer().restore(folder / "default")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[folder.name + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return found


def training_content(out: pathlib.Path) -> dict[str, object]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    losses = {f"line {i}": {k: x[k] for k in ("step", "loss")} for i, x in enumerate(lines)}
    return {**_checkpoints(out), **losses, **_pngs(out / "samples")}


def _sweep_content(out: pathlib.Path) -> dict[str, object]:
    lines = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert (out / "report.html").exists()
    # Values, not bits: a cell that went on in another batch may differ in the last digit.
    values = {x["name"]: {k: float(f"{v:.4g}") for k, v in x["values"].items()} for x in lines}
    assert len(values) == len(lines)
    return {**values, **{f"picture of {name}": None for name in _pngs(out / "samples")}}


def _sample_content(out: pathlib.Path) -> dict[str, object]:
    said = json.loads((out / "samples.json").read_text())
    return {**_pngs(out), "samples.json": said, **_arrays(out / "samples.npz")}


def jobs(model: pathlib.Path, statistics: pathlib.Path, foreign: pathlib.Path) -> dict[str, Job]:
    """What is hurt, by name; of a small model, its data's statistics, and weights in a folder."""
    of_model = ("--workdir", str(model))
    return {
        "train": Job(lambda out: [*TRAIN, "--workdir", str(out)], training_content),
        "sweep": Job(
            lambda out: [
                *("fid_sweep.py", *of_model, "--stats", str(statistics), "--out", str(out)),
                *("--steps", "5", "10", "--etas", "0", "1", "--num-samples", "64"),
                *("--batch-size", "16"),
            ],
            _sweep_content,
        ),
        "sample": Job(
            lambda out: [
                *("sample.py", *of_model, "--out", str(out), "--num-images", "64", "--save-npz"),
                *("--num-sample-steps", "10", "--batch-size", "8"),
            ],
            _sample_content,
        ),
        "statistics": Job(
            lambda out: ["make_statistics.py", "digits", "--features", "pixels", "--out",
                         str(out / "s.npz")],
            lambda out: _arrays(out / "s.npz"),
        ),
        "convert": Job(
            lambda out: ["convert.py", "--from", "diffusers", "--path", str(foreign), "--workdir",
                         str(out)],
            _checkpoints,
        ),
    }  # fmt: skip


@contextlib.contextmanager
def prepared() -> Iterator[tuple[pathlib.Path, dict[str, Job]]]:
    """A folder to work in, and the jobs, whose model and statistics stand in it."""
    with tempfile.TemporaryDirectory(prefix="hurt_") as name:
        folder = pathlib.Path(name)
        model, statistics, foreign = folder / "model", folder / "s/s.npz", folder / "foreign"
        found = jobs(model, statistics, foreign)
        found["train"].run(model)
        found["statistics"].run(statistics.parent)
        write = ["convert.py", "--to", "diffusers", "--workdir", str(model), "--out", str(foreign)]
        Job(lambda out: write, lambda out: {}).run(foreign)
        yield folder, found


def differences(job: Job, out: pathlib.Path, want: dict[str, object]) -> list[str]:
    """What is otherwise than in the undisturbed run, or left lying about."""
    found = job.content(out)
    wrong = sorted(name for name in found.keys() | want.keys() if found.get(name) != want.get(name))
    left = [f"{p} is left" for pattern in LEFTOVERS for p in out.rglob(pattern)]
    return [name for name in wrong if name not in found or want.get(name) is not None] + left


# ---------------------------------------------------------------------------------------------
# Kills


def when_random(rng: random.Random, seconds: float, out: pathlib.Path, process) -> None:
    """Any moment of the call."""
    _wait(process, rng.uniform(0, seconds))


def when_early(rng: random.Random, seconds: float, out: pathlib.Path, process) -> None:
    """Its first second."""
    _wait(process, rng.uniform(0, 1))


def when_saving(rng: random.Random, seconds: float, out: pathlib.Path, process) -> None:
    """A checkpoint is being written: its folder has its other name."""
    skip = rng.randrange(4)  # saves let through
    seen = _being_saved(out)  # what the kill before left
    while process.poll() is None:
        if new := _being_saved(out) - seen:
            seen |= new
            if skip == 0:
                time.sleep(rng.uniform(0, 0.02))
                return
            skip -= 1
        time.sleep(0.0005)


def _being_saved(out: pathlib.Path) -> set[tuple[str, int]]:
    """The folders of checkpoints that are not whole, by name and file number."""
    found = set()
    for path in out.glob("checkpoints/*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(FileNotFoundError):  # whole by now
            found.add((path.name, path.stat().st_ino))
    return found


def when_a_line_is_new(rng: random.Random, seconds: float, out: pathlib.Path, process) -> None:
    """Just after results.jsonl grew: what was kept of its cell may still be there."""
    path = out / "results.jsonl"
    size = path.stat().st_size if path.exists() else 0
    while process.poll() is None:
        if path.exists() and path.stat().st_size > size:
            time.sleep(rng.uniform(0, 0.01))
            return
        time.sleep(0.0005)


def _wait(process, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)


MOMENTS = {
    "train": (when_random, when_saving, when_saving, when_early),
    "sweep": (when_random, when_a_line_is_new, when_random, when_early),
    "sample": (when_random,),
    "statistics": (when_random,),
    "convert": (when_random, when_saving),
}


@dataclasses.dataclass
class Figures:
    """What was done to a job, and what came of it."""

    kills: int = 0
    while_saving: int = 0
    too_late: int = 0
    ends: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def kill_often(
    folder: pathlib.Path, job: Job, name: str, kills: int, rng: random.Random
) -> Figures:
    """SIGKILL the job so many times, up to ten in one folder before it may end."""
    started = time.monotonic()
    job.run(folder / name)
    seconds, want = time.monotonic() - started, job.content(folder / name)
    figures = Figures()
    while figures.kills < kills:
        out = folder / f"{name}_{figures.ends}"
        for _ in range(min(10, kills - figures.kills)):
            moment = MOMENTS[name][figures.kills % len(MOMENTS[name])]
            before = _being_saved(out)
            process = job.start(out)
            moment(rng, seconds, out, process)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            saving = bool(_being_saved(out) - before)
            if process.returncode != -signal.SIGKILL:
                figures.too_late += 1
                if process.returncode != 0:
                    figures.wrong.append(f"{out} ended by itself with {process.returncode}")
                break  # it was done
            figures.kills += 1
            figures.while_saving += saving
        job.run(out)
        figures.wrong += differences(job, out, want)
        figures.ends += 1
        shutil.rmtree(out)
    return figures


# ---------------------------------------------------------------------------------------------
# Signals


def signal_often(
    folder: pathlib.Path, job: Job, name: str, times: int, rng: random.Random
) -> Figures:
    """SIGTERM and SIGINT in turn, at random moments: it ends well, and goes on to the same end."""
    started = time.monotonic()
    job.run(folder / name)
    seconds, want = time.monotonic() - started, job.content(folder / name)
    figures = Figures()
    for i in range(times):
        out = folder / f"{name}_{i}"
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        process = job.start(out)
        _wait(process, rng.uniform(0.3, 1) * seconds)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
        # 128 + its number, or killed by it, before there was anything to save.
        if process.returncode not in (0, 128 + number, -number) or "Traceback" in errors:
            figures.wrong.append(f"{number.name}: exit code {process.returncode}, {errors[-500:]}")
        if process.returncode == 0 and "call again" not in said + errors:
            figures.too_late += 1
        figures.kills += 1
        job.run(out)
        figures.wrong += differences(job, out, want)
        figures.ends += 1
        shutil.rmtree(out)
    return figures


# ---------------------------------------------------------------------------------------------
# Disks


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int) -> Iterator[None]:
    """The folder as a file system of its own, of so many kilobytes."""
    folder.mkdir(parents=True)
    options = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(folder: pathlib.Path, job: Job, name: str, times: int, rng: random.Random) -> Figures:
    """The job on disks too small: one line that names the disk, and all there still opens."""
    job.run(folder / name)
    want, figures = job.content(folder / name), Figures()
    pages = sum(1 + path.stat().st_size // 4096 for path in (folder / name).rglob("*"))
    for size in [4 * rng.randint(3, pages) for _ in range(times)]:
        disk = folder / f"{name}_{figures.kills}_{size}"
        with small_disk(disk, size):
            out = disk / "out"
            process = job.start(out)
            _, errors = process.communicate()
            if process.returncode == 0:
                figures.too_late += 1
                continue
            figures.kills += 1
            lines = errors.strip().splitlines()
            if process.returncode != 1 or len(lines) != 1 or str(disk) not in lines[-1]:
                figures.wrong.append(f"{size}k: code {process.returncode}, {len(lines)} lines: "
                                     f"{errors[-600:]}")  # fmt: skip
            # With room again the same command ends as ever, on what it had written.
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            job.run(out)
            figures.wrong += differences(job, out, want)
            figures.ends += 1
    return figures


# ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Hurt the jobs asked for; the number of things that were wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("how", choices=("kills", "signals", "disks"))
    for name in MOMENTS:
        parser.add_argument(f"--{name}", type=int, default=0, help="how many times")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    rng, wrong = random.Random(asked.seed), 0
    with prepared() as (folder, found):
        for name, job in found.items():
            times = getattr(asked, name)
            if asked.how == "kills" and times:
                figures = kill_often(folder, job, name, times, rng)
                done = f"{figures.kills} SIGKILLs, {figures.while_saving} while saving"
            elif asked.how == "signals" and times:
                figures = signal_often(folder, job, name, times, rng)
                done = f"{figures.kills} SIGTERMs and SIGINTs, {figures.too_late} too late"
            elif asked.how == "disks" and (times or not any(getattr(asked, n) for n in MOMENTS)):
                figures = fill_disk(folder, job, name, times or 6, rng)
                done = f"{figures.kills} full disks, {figures.too_late} large enough"
            else:
                continue
            wrong += len(figures.wrong)
            end = "the undisturbed one" if not figures.wrong else f"WRONG: {figures.wrong}"
            print(f"{name}: {done}; {figures.ends} ends, {end}", flush=True)
            shutil.rmtree(folder / name, ignore_errors=True)
    return wrong


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
