"""The same command where the machine around it changes: the same end, or one that is said.

python tests/faults/machines.py [--times 3]

Another process in the same folder, a lock that a dead one left, a clock that jumps, and after a
kill another number of devices. Prints one line for each kind and job.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import pathlib
import random
import shutil
import signal
import subprocess
from collections.abc import Callable

import hurt
import numpy as np
import PIL.Image

FOLDERS = ("train", "sweep", "sample")
"""The jobs that go on in a folder of theirs."""

JUMPING = """
import os, random, threading, time

real, jumps = time.time, random.Random(int(os.environ["JUMPS"]))
offset = [0.0]
time.time = lambda: real() + offset[0]
time.time_ns = lambda: int(1e9 * time.time())

def jump():
    while True:
        time.sleep(jumps.uniform(0.3, 3))
        offset[0] = jumps.choice([-86400.0, -3600.0, -1.0, 0.0, 3600.0, 86400.0])

threading.Thread(target=jump, daemon=True).start()
"""
"""Every second or two the wall's clock is set, by up to a day.

Set back by 25 days or more it ends tensorboardX's thread, on which training then waits.
"""


def two_at_once(job: hurt.Job, out: pathlib.Path, rng: random.Random) -> list[str]:
    """One of two that start together ends as ever; the other is refused in a line."""
    both = [job.start(out) for _ in range(2)]
    ends = [(process.communicate(), process.returncode) for process in both]
    codes = sorted(code for _, code in ends)
    refusals = [errors for (_, errors), code in ends if code == 2]
    if codes == [0, 0]:  # the second began when the first had ended
        return []
    if codes != [0, 2] or "is in use by another process" not in refusals[0]:
        return [f"exit codes {codes}: {[errors[-300:] for (_, errors), _ in ends]}"]
    lines = [x for x in refusals[0].splitlines() if x.startswith(("error", "Traceback"))]
    return [] if len(lines) == 1 else [refusals[0]]


def stale_lock(job: hurt.Job, out: pathlib.Path, rng: random.Random) -> list[str]:
    """The lock's file of a process that is no more, with what older tools write into theirs."""
    out.mkdir(parents=True)
    (out / ".lock").write_text("4194304\n")
    return ends_well(job.start(out))


def jumping_clock(job: hurt.Job, out: pathlib.Path, rng: random.Random) -> list[str]:
    """Killed once under such a clock, and called again under others until it ends."""
    site = out.with_name(f"{out.name}_site")
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(JUMPING)
    path = f"{site}:{hurt.ENVIRONMENT['PYTHONPATH']}"
    process = job.start(out, PYTHONPATH=path, JUMPS=str(rng.randrange(1000)))
    hurt.when_random(rng, 8.0, out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for _ in range(8):
        process = job.start(out, PYTHONPATH=path, JUMPS=str(rng.randrange(1000)))
        wrong = ends_well(process)
        # Orbax gives a save up after 600 s by this clock. That is one line, and the next goes on.
        if process.returncode != 1 or "a checkpoint cannot be saved" not in wrong[0]:
            return wrong
    return ["no call of eight came to the end"]


def ends_well(process: subprocess.Popen[str]) -> list[str]:
    """Nothing, if it does."""
    try:
        _, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        return ["it did not end within three minutes"]
    return [] if process.returncode == 0 else [f"code {process.returncode}: {errors[-500:]}"]


def other_devices(job: hurt.Job, out: pathlib.Path, rng: random.Random) -> list[str]:
    """Killed on one device, gone on with on two, killed there, and ended on one."""
    for number in (1, 2):
        flags = f"--xla_force_host_platform_device_count={number}"
        process = job.start(out, XLA_FLAGS=flags)
        hurt.when_random(rng, 10.0, out, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return ends_well(job.start(out))


@dataclasses.dataclass(frozen=True)
class Kind:
    """What happens, and how the end is compared with the undisturbed one."""

    happens: Callable[[hurt.Job, pathlib.Path, random.Random], list[str]]
    differences: Callable[[hurt.Job, pathlib.Path, dict[str, object]], list[str]]


def nearly(job: hurt.Job, out: pathlib.Path, want: dict[str, object]) -> list[str]:
    """What is otherwise by more than sums in another order: nothing but the last digits may be."""
    found = job.content(out)
    wrong = [f"{name} is there in one alone" for name in found.keys() ^ want.keys()]
    for name in found.keys() & want.keys():
        (mine, near), (theirs, _) = (_numbers(name, value) for value in (found[name], want[name]))
        if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=near, atol=near):
            wrong.append(f"{name} is another")
    return wrong + [f"{p} is left" for pattern in hurt.LEFTOVERS for p in out.rglob(pattern)]


def _numbers(name: str, value: object) -> tuple[np.ndarray, float]:
    """A job's content as numbers, and how near those of another machine are."""
    if isinstance(value, dict):
        numbers = [x for x in value.values() if isinstance(x, int | float)]
        return np.array(numbers, np.float64), 2e-3
    if not isinstance(value, bytes):
        return np.zeros(0), 0.0
    if name.endswith(".png"):
        return np.asarray(PIL.Image.open(io.BytesIO(value))).astype(float), 1.0
    if ".npz:" in name or "key" in name or len(value) % 4:
        return np.frombuffer(value, np.uint8).astype(float), 1.0
    return np.frombuffer(value, np.float32).astype(float), 2e-3


KINDS = {
    "two at once": Kind(two_at_once, hurt.differences),
    "stale lock": Kind(stale_lock, hurt.differences),
    "jumping clock": Kind(jumping_clock, hurt.differences),
    "other devices": Kind(other_devices, nearly),
}


def change(
    folder: pathlib.Path, job: hurt.Job, kind: Kind, times: int, rng: random.Random
) -> list[str]:
    """What was wrong with the job where that happens, so many times."""
    job.run(folder / "undisturbed")
    want, wrong = job.content(folder / "undisturbed"), []
    for i in range(times):
        out = folder / str(i)
        found = kind.happens(job, out, rng)
        wrong += found or kind.differences(job, out, want)
        shutil.rmtree(out, ignore_errors=True)
    return wrong


def main() -> int:
    """Every kind with every job; the number of things that were wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    asked = parser.parse_args()
    rng, wrong = random.Random(asked.seed), 0
    with hurt.prepared() as (folder, jobs):
        for name, kind in ((name, KINDS[name]) for name in asked.kinds):
            for job in FOLDERS:
                place = folder / name.replace(" ", "_") / job
                found = change(place, jobs[job], kind, asked.times, rng)
                wrong += len(found)
                end = f"WRONG: {found}" if found else "the undisturbed end"
                print(f"{name}, {job}: {asked.times} times; {end}", flush=True)
    return wrong


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
