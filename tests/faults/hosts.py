"""Two processes train one run, and one is told to stop: both end, and go on to the same end.

python tests/faults/hosts.py [--times 10]
"""

from __future__ import annotations

import argparse
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import hurt

STEPS = 60


def start(out: pathlib.Path) -> list[subprocess.Popen[str]]:
    """Both processes of the run in `out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--workdir", str(out), "--max-steps", str(STEPS), "--sample-every", "0"]
    options += ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]

    def one(index: int) -> hurt.Job:
        command = [*hurt.TRAIN, *options, "--process-id", str(index)]
        return hurt.Job(lambda out: command, hurt.training_content)

    return [one(index).start(out) for index in range(2)]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code, and what was said, of each."""
    said = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, "".join(texts)) for p, texts in zip(processes, said, strict=True)]


def stop_often(folder: pathlib.Path, times: int, rng: random.Random) -> hurt.Figures:
    """SIGTERM and SIGINT in turn to one of two, at random moments after the first step."""
    out, figures = folder / "undisturbed", hurt.Figures()
    codes = [code for code, _ in ends(start(out))]
    assert codes == [0, 0], codes
    want = hurt.training_content(out)
    for i in range(times):
        out, number = folder / str(i), (signal.SIGTERM, signal.SIGINT)[i % 2]
        processes = start(out)
        while not (out / "metrics.jsonl").exists() and processes[0].poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 8))
        processes[rng.randrange(2)].send_signal(number)
        found = ends(processes)
        if [code for code, _ in found] != [0, 0]:
            figures.wrong.append(f"{number.name}: {[(code, text[-300:]) for code, text in found]}")
        figures.kills += 1
        figures.too_late += "call again" not in found[0][1]
        again = ends(start(out))
        if [code for code, _ in again] != [0, 0]:
            figures.wrong.append(f"going on: {[(code, text[-300:]) for code, text in again]}")
        # Beside the undisturbed run's there is the checkpoint of the stop.
        mine = hurt.training_content(out)
        last = [name for name in want if name.startswith((str(STEPS), "line"))]
        figures.wrong += [f"{name} differs" for name in last if mine.get(name) != want[name]]
        figures.ends += 1
        shutil.rmtree(out)
    return figures


def main() -> int:
    """Print what was done, and what came of it; the number of things that were wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hosts_") as name:
        figures = stop_often(pathlib.Path(name), asked.times, random.Random(asked.seed))
    end = "the undisturbed one" if not figures.wrong else f"WRONG: {figures.wrong}"
    print(
        f"two processes: {figures.kills} SIGTERMs and SIGINTs to one of them, {figures.too_late} "
        f"too late; {figures.ends} ends, {end}"
    )
    return len(figures.wrong)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
