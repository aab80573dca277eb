"""One of two processes that disagree, case after case: python tests/two_hosts.py PORT PROCESS DIR.

Prints a line of JSON for each case: its name, what was raised, and the seconds it took.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from small_runs import SMALL

from ddim_jax.files import only_one_process
from ddim_jax.runs import TrainConfig, fit

port, process, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
Case = Callable[[TrainConfig], object]


def of(name: str, **changes) -> TrainConfig:
    """A run of both processes; its workdir is called `name`."""
    return dataclasses.replace(
        SMALL,
        workdir=str(folder / name),
        max_steps=2,
        distributed=True,
        coordinator=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=process,
        **changes,
    )


def locked() -> None:
    """Process 0 finds its workdir held, as by a run that was not stopped."""
    if process == 0:
        with only_one_process(folder / "locked"):
            fit(of("locked"))
    else:
        fit(of("locked"))


def damaged() -> None:
    """A run of two steps goes on where process 0 cannot read its lines."""
    fit(of("damaged"))
    lines = folder / "damaged" / "metrics.jsonl"
    if process == 0:
        lines.write_text("not JSON\n" + lines.read_text())
    fit(dataclasses.replace(of("damaged"), max_steps=4))


def other_images(seed: int) -> str:
    path = folder / f"images-{seed}.npz"
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(path, images=pixels)
    return str(path)


CASES = {
    "rates": lambda: fit(of("rates", learning_rate=(1e-3, 2e-3)[process])),
    "workdirs": lambda: fit(of(f"workdir-of-{process}")),
    "missing data": lambda: fit(of("missing", data=("digits", str(folder / "none"))[process])),
    "other data": lambda: fit(of("data", data=other_images(process))),
    "an option": lambda: fit(of("option", batch_size=(0, 16)[process])),
    "locked": locked,
    "damaged": damaged,
    "agreed": lambda: fit(of("agreed")),
}

for name, case in CASES.items():
    started, said = time.monotonic(), ""
    try:
        case()
    except (ValueError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
        assert error.on_all_hosts
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"case": name, "said": said, "seconds": seconds}), flush=True)
assert jax.process_count() == 2
