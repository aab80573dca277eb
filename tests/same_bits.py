"""Proof that two commits compute the same bits: run both, compare every array and picture.

    python tests/same_bits.py OLD NEW [--quick] [--probes core train ...] [--out report.json]

OLD and NEW are commits, each checked out into a temporary worktree; or '.' for the working tree, or
another folder, as it is (leave it alone meanwhile). The probes of same_bits_probes/ then run in
both with this interpreter, on the CPU, in fresh processes, one after the other: samplers, losses
and schedules on fixed inputs; networks; and by command training, sampling, sweeps and latents on
the digits, on one device, eight devices and two processes. Last, NEW goes on with what OLD began:
half a training run, half a sweep, a trained model. That must end as OLD's own did.

Prints a markdown table. Exit code 0: every bit is the same. 1: one is not, is missing, or a part of
a probe failed. What only NEW has is named and counts for nothing. --quick leaves out some
combinations of samplers and networks. Recorded inputs are read from $DDIM_JAX_SHARED, or ../shared
beside this repository; without them that part is not run, as the table says.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageSequence
import safetensors.numpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROBES = {
    "core": "the library on fixed inputs",
    "networks": "outputs, gradients, converted weights",
    "train": "train.py: straight, resumed, with labels, sum and antithetic",
    "processes": "train.py on two processes",
    "sample": "sample.py",
    "statistics": "train_classifier.py, make_statistics.py, fid.py",
    "sweep": "fid_sweep.py: straight, stopped and resumed",
    "latents": "reconstruct, likelihood, same_latent, interpolate, trajectory",
    "devices": "train.py and sample.py on eight devices",
}
NEEDS = {"train": ("sample", "statistics", "sweep", "latents", "devices"),
         "sample": ("statistics",), "statistics": ("sweep", "latents")}  # fmt: skip
"""Probe -> those that open what it leaves."""

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Difference:
    """One array that is not the same, or is on one side only."""

    name: str
    largest: float | None
    relative: float | None
    note: str = ""


@dataclasses.dataclass
class Row:
    """The arrays of one file, or of one folder of pictures."""

    probe: str
    what: str
    num_arrays: int
    differences: list[Difference]
    only_new: list[str]

    @property
    def same(self) -> bool:
        return not self.differences


# -------------------------------------------------------------------------------------- comparing


def load(path: pathlib.Path) -> Arrays:
    """The arrays, pixels or numbers in a file; nothing for other kinds of file."""
    match path.suffix:
        case ".npz":
            with np.load(path) as file:
                # Strings say where a file came from.
                return {k: v for k, v in dict(file).items() if v.dtype.kind not in "US"}
        case ".safetensors":
            return safetensors.numpy.load_file(path)
        case ".png" | ".gif":
            with PIL.Image.open(path) as image:
                frames = [np.asarray(f.copy()) for f in PIL.ImageSequence.Iterator(image)]
            return {f"frame {i}": frame for i, frame in enumerate(frames)}
        case ".json":
            return dict(numbers(json.loads(path.read_text())))
    return {}


def numbers(tree: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The numbers in what a JSON file holds, each with its path."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, f"{name}/{key}" if name else str(key))
    elif isinstance(tree, int | float):
        yield name, np.asarray(tree, np.float64)


def collect(folder: pathlib.Path) -> dict[tuple[str, str], Arrays]:
    """(probe, file or folder of it) -> its arrays."""
    found: dict[tuple[str, str], Arrays] = collections.defaultdict(dict)
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_dir() or parts[0] == "work":
            continue
        inside = "/".join(parts[2:])
        for name, array in load(path).items():
            found[parts[0], parts[1]][f"{inside}/{name}".lstrip("/")] = array
        found[parts[0], parts[1]]  # also where it holds nothing
    return found


def compare(old: dict[tuple[str, str], Arrays], new: dict[tuple[str, str], Arrays]) -> list[Row]:
    """One row for each group that either side has."""
    rows = []
    order = [*PROBES]
    for probe, what in sorted(old.keys() | new.keys(), key=lambda k: (order.index(k[0]), k[1])):
        a, b = old.get((probe, what), {}), new.get((probe, what), {})
        differences = [
            Difference(name, None, None, "missing in NEW") if name not in b else difference
            for name in a
            if name not in b or (difference := differ(name, a[name], b[name]))
        ]
        if (probe, what) not in new:
            differences = [Difference("all of it", None, None, "missing in NEW")]
        rows.append(Row(probe, what, len(a), differences, sorted(b.keys() - a.keys())))
    return rows


def differ(name: str, a: np.ndarray, b: np.ndarray) -> Difference | None:
    """How far two arrays are apart, None if they are the same to the bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        became = f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
        return Difference(name, None, None, became)
    if a.tobytes() == b.tobytes():
        return None
    a, b = a.astype(np.float64), b.astype(np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    note = "" if np.array_equal(a[~both], b[~both], equal_nan=True) else "other NaN or inf"
    largest = float(np.abs(a[both] - b[both]).max(initial=0.0))
    scale = float(np.abs(a[both]).max(initial=0.0))
    return Difference(name, largest, largest / scale if scale else float("inf"), note)


# ---------------------------------------------------------------------------------------- running


@contextlib.contextmanager
def tree_of(commit: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The root of a commit's files, a worktree for as long as it is needed; or of a folder."""
    tree = ROOT if commit == "." else pathlib.Path(commit).resolve()
    if (tree / "ddim_jax").is_dir():
        yield tree
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    try:
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True)


def run(
    probe: str, tree: pathlib.Path, folder: pathlib.Path, cache: pathlib.Path, *options: str
) -> bool:
    """Whether a probe ran without a failure; it has printed what failed."""
    environment = {
        "PYTHONPATH": str(tree),
        "PYTHONHASHSEED": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MPLBACKEND": "Agg",
        "DDIM_JAX_TRACEBACK": "1",
        "DDIM_JAX_SHARED": os.environ.get("DDIM_JAX_SHARED", str(ROOT.parent / "shared")),
    }
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    probes = ROOT / "tests" / "same_bits_probes"
    command = [sys.executable, str(probes), probe, str(folder), *options]
    process = subprocess.Popen(
        command, cwd=tree, env=inherited | environment, start_new_session=True
    )
    try:
        return process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # no script of a stopped probe stays behind


def markdown(rows: list[Row], most: int = 8) -> str:
    """The table; under a row that differs the arrays that do, the largest differences first."""
    lines = ["| probe | what | equal bits / largest difference | relative |", "|---|---|---|---|"]
    for row in rows:
        found = f"equal, {row.num_arrays} arrays" if row.num_arrays else "nothing to compare"
        if row.differences:
            found = f"**{len(row.differences)} of {row.num_arrays} arrays differ**"
        if row.only_new:
            found += f"; {len(row.only_new)} only in NEW, such as {row.only_new[0]}"
        lines.append(f"| {row.probe} | {row.what} | {found} | |")
        worst = sorted(row.differences, key=lambda d: -(d.relative or float("inf")))
        for d in worst[:most]:
            found = d.note if d.largest is None else f"{d.largest:.3g} {d.note}".strip()
            relative = "" if d.relative is None else f"{d.relative:.2g}"
            lines.append(f"| | {d.name} | {found} | {relative} |")
        if len(worst) > most:
            lines.append(f"| | and {len(worst) - most} more | | |")
    return "\n".join(lines)


def wanted_probes(names: list[str]) -> list[str]:
    """The probes in order, with those whose runs they open."""
    wanted = set(names)
    for probe in reversed(PROBES):
        if wanted & set(NEEDS.get(probe, ())):
            wanted.add(probe)
    return [probe for probe in PROBES if probe in wanted]


def main() -> int:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="a commit or a folder")
    parser.add_argument("new", help="a commit or a folder")
    parser.add_argument("--quick", action="store_true", help="fewer combinations")
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the whole result")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that worktrees are removed

    started, failed = time.monotonic(), []
    quick = ["--quick"] if args.quick else []
    with tempfile.TemporaryDirectory(prefix="same_bits_") as temporary, contextlib.ExitStack() as s:
        folder = pathlib.Path(temporary)
        sides = {"OLD": args.old, "NEW": args.new}
        trees = {k: s.enter_context(tree_of(v, folder / f"tree_{k}")) for k, v in sides.items()}
        outs = {side: folder / side for side in (*sides, "CROSS")}
        for out in outs.values():
            out.mkdir()

        def timed(label: str, probe: str, side: str, out: pathlib.Path, *options: str) -> None:
            print(f"{label} ...", flush=True)
            before = time.monotonic()
            if not run(probe, trees[side], out, folder / "programs", *options):
                failed.append(label)
            print(f"{label}: {time.monotonic() - before:.0f} s", flush=True)

        probes = wanted_probes(args.probes)
        for probe in probes:
            for side in sides:
                timed(f"{probe} in {side}", probe, side, outs[side], *quick)
        rows = compare(collect(outs["OLD"]), collect(outs["NEW"]))
        if "sweep" in probes:
            old = str(outs["OLD"])
            timed("NEW goes on with OLD's runs", "go_on", "NEW", outs["CROSS"], "--old", old)
            crossed, wanted = collect(outs["CROSS"]), collect(outs["OLD"])
            for row in compare({key: wanted[key] for key in crossed}, crossed):
                rows.append(dataclasses.replace(row, what=f"{row.what}, OLD's run gone on with"))

    same = all(row.same for row in rows) and not failed
    seconds = time.monotonic() - started
    print(f"\n{markdown(rows)}\n")
    for label in failed:
        print(f"FAILED: {label}, see above")
    print(
        f"{'the same bits' if same else 'NOT the same bits'}: {args.old} and {args.new}, "
        f"{sum(row.num_arrays for row in rows)} arrays, {seconds:.0f} s"
    )
    if args.out:
        report = {"old": args.old, "new": args.new, "quick": args.quick, "probes": probes}
        report |= {"same": same, "failed": failed, "seconds": round(seconds)}
        rows_out = [dataclasses.asdict(row) for row in rows]
        args.out.write_text(json.dumps(report | {"rows": rows_out}, indent=1) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
