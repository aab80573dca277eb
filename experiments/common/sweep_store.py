"""A sweep's folder: sweep.json, results.jsonl, partial.npz with the cell under way, and drawn.npz
with the one before it, as long as its numbers are being computed.

sweep.json has what all cells share and what decides their numbers, the run's fingerprint among it.
Every line of results.jsonl is a finished cell with its whole protocol. Both say "format": 3. Files
of format 2 are those of one seed, and files without a format are read by sweep_format_1.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from common import sweep_format_1, times
from common.exact import exact
from common.measures import Measure
from ddim_jax.checks import check_types
from ddim_jax.files import (
    differences,
    naming,
    parsed,
    read_json,
    read_npz,
    sealed,
    unsealed,
    write_json,
    write_whole,
)
from ddim_jax.metrics.metric import State, state_from_arrays, state_to_arrays
from ddim_jax.runs import Run
from ddim_jax.solvers import SAMPLERS

FORMAT = 3
_READ = (2, FORMAT)
ABOUT = ("model", "begun", "command", "cells", "paper")
"""What sweep.json has for the report's reader alone: nobody compares it. See `sweep_about`."""
PARTIAL, DRAWN = "partial.npz", "drawn.npz"
_TIMES = 2  # since when one step starts at noise, and T steps are all

States = dict[str, dict[str, State]]
"""Network -> name of the state -> the state."""


class Cell(NamedTuple):
    """One sampling setting: a row of the table, and its column S."""

    num_steps: int
    sampler: str
    """A name in SAMPLERS."""
    eta: float | None
    """None for all samplers but ddim."""
    guidance_scale: float
    spacing: str
    """A name, or an own list (`common.times`), which belongs to its own S alone."""
    seed: int = 0

    def name(self, plain_spacing: str, plain_seed: int = 0) -> str:
        """What the cell's files are called; spacing and seed are named unless they are plain."""
        parts = [f"S{self.num_steps:04d}"]
        parts.append(self.sampler if self.eta is None else f"eta_{exact(self.eta)}")
        if self.guidance_scale != 1:
            parts.append(f"guidance_{exact(self.guidance_scale)}")
        if self.spacing != plain_spacing:
            parts.append(times.file_name(self.spacing))
        if self.seed != plain_seed:
            parts.append(f"seed_{self.seed}")
        return "_".join(parts)

    def network_calls(self) -> int:
        """Network evaluations behind one image."""
        calls = SAMPLERS[self.sampler]().network_calls(self.num_steps)
        return calls if self.guidance_scale == 1 else 2 * calls

    def was_otherwise(self, num_steps: int) -> bool:
        """Whether an earlier version visited other times of the T = `num_steps` in this cell.

        Its one step was from t = 0, where there is no noise, and a quadratic list of T repeated
        the low indices.
        """
        if times.is_list(self.spacing):
            return False
        if self.num_steps == 1:
            return self.spacing != "trailing"
        return self.num_steps == num_steps and self.spacing == "quadratic"


class Progress(NamedTuple):
    """A cell under way: images measured so far, and the states of all metrics."""

    count: int
    seconds: float
    states: States


# ---------------------------------------------------------------------------------------------
# sweep.json


def sweep_settings(
    run: Run,
    measures: Sequence[Measure],
    num_samples: int,
    kept_features: int,
    save_images: bool,
) -> dict[str, Any]:
    """What every cell of a sweep has in common, and decides its numbers, or its files."""
    return {
        "format": FORMAT,
        "num_samples": num_samples,
        "kept_features": kept_features,
        "save_images": save_images,
        "measures": {column: f for measure in measures for column, f in measure.facts().items()},
        "fingerprint": run.fingerprint,
        "fingerprint_id": run.fingerprint_id,
    }


def find_settings(
    out: pathlib.Path,
    wanted: Mapping[str, Any],
    batch_size: int | None,
    run: Run,
    dtype: str | None,
) -> dict[str, Any] | None:
    """The settings of the sweep in `out`, in today's format; None without one.

    Raises ValueError if it is a sweep of other settings, naming each.
    """
    path = out / "sweep.json"
    if not path.exists():
        if left := [name for name in ("results.jsonl", PARTIAL, DRAWN) if (out / name).exists()]:
            raise ValueError(
                f"out {out} holds {' and '.join(left)} of a sweep whose sweep.json is gone, so "
                "nobody knows of which. Restore it, or give another folder."
            )
        return None
    way_out = "Restore it, or give another folder."
    there = read_json(path, way_out=way_out)
    _check_format(path, there)
    with naming(path):
        check_types(there, _SETTINGS, way_out)
    if "format" not in there:
        if dtype is not None:
            raise ValueError(
                f"dtype must be left out to continue the sweep in {out}, whose version had no such "
                f"option; got {dtype}."
            )
        print(
            f"{path} is of an older version, which wrote down weights and rounding alone of the "
            "model: check that its config.json is what it was",
            flush=True,
        )
        try:
            there = sweep_format_1.settings(there, wanted)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not describe a sweep: {error!r}. {way_out}") from error
        wanted = sweep_format_1.comparable(wanted, run)
    there.setdefault("save_images", (out / "images").is_dir())
    wanted = {**wanted, "batch_size": batch_size or there.get("batch_size")}
    ignored = {"format", "fingerprint_id", "spacing", "seed"}  # the latter two are the cells'
    ignored |= {*ABOUT}
    # Where those images stood is not what decides: their statistics' hash is compared.
    ignored |= {f"measures.{column}.statistics_of" for column in wanted["measures"]}
    if differ := differences(there, json.loads(json.dumps(wanted)), ignored):
        raise ValueError(
            f"out {out} holds another sweep: {'; '.join(differ)}. Give the same settings to "
            f"continue it{_step_there(there, wanted)}, or another folder."
        )
    return there


def _step_there(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How to go on with a sweep of a model that has trained on since."""
    old, new = (x["fingerprint"].get("weights", {}).get("step") for x in (there, wanted))
    return "" if old == new else f", --step {old} among them since the model has trained on"


_SETTINGS = {
    **dict.fromkeys(("batch_size", "num_samples", "seed", "kept_features"), int),
    **dict.fromkeys(("measures", "fingerprint", "weights"), dict),
    **dict.fromkeys(("spacing", "model", "command"), str),
    "cells": list,
    "save_images": bool,
    **dict.fromkeys(("paper", "begun"), str | None),
}


def write_settings(out: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Write sweep.json."""
    write_json(out / "sweep.json", settings)


def _check_format(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    if (found := content.get("format", FORMAT)) not in _READ:
        raise ValueError(
            f"{path} must be of format {' or '.join(map(str, _READ))}, or of none, which this "
            f"version reads; got {found!r}. Use the version that wrote it, or a newer one."
        )


# ---------------------------------------------------------------------------------------------
# results.jsonl


def read_results(out: pathlib.Path) -> list[dict[str, Any]]:
    """The finished cells of a sweep, in today's format."""
    path = out / "results.jsonl"
    if not path.exists():
        return []
    return [_read_line(path, text) for text in _texts(path)]


def _texts(path: pathlib.Path) -> list[str]:
    with naming(path):  # bytes that are no text
        return path.read_text(encoding="utf-8").splitlines()


_RESULT = {
    **dict.fromkeys(("S", "network_calls", "num_samples", "seed", "batch_size"), int),
    **dict.fromkeys(("guidance_scale", "seconds"), float),
    **dict.fromkeys(("values", "measures", "weights", "versions"), dict),
    **dict.fromkeys(("sampler", "spacing", "name", "rounding", "device"), str),
    **dict.fromkeys(("dtype", "matmul_precision"), str),
    "clip_x0": bool,
    "eta": float | None,
    "fingerprint_id": str | None,
}


def drop_other_times(out: pathlib.Path, cells: Sequence[Cell], num_steps: int) -> None:
    """Forget, and say so, what an earlier version measured at other times than now.

    Files since then say "times": 2. `cells` are those wanted, of which one may be under way.
    """
    path = out / "results.jsonl"
    lines = _texts(path) if path.exists() else []
    kept = []
    for text in lines:
        line = _read_line(path, text)
        if line.get("times", 1) >= _TIMES or not cell_of(line).was_otherwise(num_steps):
            kept.append(text)
        else:
            print(f"{line['name']} was measured from other times by an earlier version: once more")
    if len(kept) < len(lines):
        write_whole(path, "".join(text + "\n" for text in kept).encode())
    others = [cell for cell in cells if cell.was_otherwise(num_steps)]
    names = {
        cell.name(spacing, seed)
        for cell in others
        for spacing in (cell.spacing, "")
        for seed in (cell.seed, -1)
    }
    if names and (partial := out / "partial.npz").exists():
        arrays = read_npz(partial, "a cell under way", way_out=_DRAW_AGAIN)
        if str(arrays.get("cell")) in names and int(arrays.get("times", 1)) < _TIMES:
            partial.unlink()


def _read_line(path: pathlib.Path, text: str) -> dict[str, Any]:
    _check_line_format(path, text)
    try:
        line = unsealed(parsed(text), "")
        line = line if "format" in line else sweep_format_1.line(line)
        if missing := {"values", "seconds", "measures", *_CELL_KEYS} - line.keys():
            raise KeyError(", ".join(sorted(missing)))
        check_types(line, _RESULT)
        for values, kind in ((line["values"], float), (line["measures"], dict)):
            check_types(values, dict.fromkeys(values, kind))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete the bad line, or the "
            "file, to measure its cells again."
        ) from error
    return line


def _check_line_format(path: pathlib.Path, text: str) -> None:
    line = None
    with contextlib.suppress(ValueError):  # a damaged line, said where it is read
        line = parsed(text)
    if isinstance(line, dict):
        _check_format(path, line)


_CELL_KEYS = ("S", "sampler", "eta", "guidance_scale", "spacing", "seed")


def cell_of(line: Mapping[str, Any]) -> Cell:
    """The cell that a line of results.jsonl is about."""
    return Cell(*(line[key] for key in _CELL_KEYS))


def append_result(
    out: pathlib.Path,
    cell: Cell,
    progress: Progress,
    measures: Sequence[Measure],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Add a finished cell with its whole protocol; only seconds differ from call to call.

    A kill leaves the old file or the new one, never half a line.
    """
    line = _line(cell, progress, measures, settings)
    path = out / "results.jsonl"
    before = path.read_bytes() if path.exists() else b""
    write_whole(path, before + (json.dumps(sealed(line)) + "\n").encode())
    if _is_of(out / DRAWN, line["name"]):
        (out / DRAWN).unlink()
    return line


def _line(cell, progress, measures, settings) -> dict[str, Any]:
    values: dict[str, float] = {}
    shown: dict[str, dict[str, Any]] = {}
    for measure in measures:
        values |= measure.values(progress.states[measure.name])
        shown |= measure.shown(progress.states[measure.name])
    fingerprint = settings["fingerprint"]
    return {
        "format": FORMAT,
        "times": _TIMES,
        **dict(zip(_CELL_KEYS, cell, strict=True)),
        "network_calls": cell.network_calls(),
        "name": cell.name(settings["spacing"], settings["seed"]),
        "values": values,
        "seconds": round(progress.seconds, 3),
        **{key: settings[key] for key in ("num_samples", "batch_size", "kept_features")},
        "rounding": fingerprint["rounding"],
        "clip_x0": fingerprint.get("clip_x0", False),
        "dtype": fingerprint.get("model", {}).get("dtype", "float32"),
        "matmul_precision": fingerprint.get("matmul_precision", "default"),
        "weights": fingerprint["weights"],
        "fingerprint_id": settings["fingerprint_id"],
        "measures": {column: settings["measures"][column] | shown[column] for column in shown},
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("ddim_jax", "jax", "numpy")},
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a source tree on PYTHONPATH


# ---------------------------------------------------------------------------------------------
# partial.npz and drawn.npz


_DRAW_AGAIN = "Delete it to draw this cell again."


def save_progress(out: pathlib.Path, name: str, progress: Progress) -> None:
    """Keep the cell of that name so that another call goes on from there."""
    arrays: dict[str, Any] = {}
    for network, states in progress.states.items():
        for state_name, state in states.items():
            arrays |= state_to_arrays(state, f"{network}.{state_name}")
    file = io.BytesIO()
    np.savez(
        file,
        format=FORMAT,
        times=_TIMES,
        cell=name,
        count=progress.count,
        seconds=progress.seconds,
        **arrays,
    )
    write_whole(out / PARTIAL, file.getvalue())


def keep_drawn(out: pathlib.Path, name: str) -> None:
    """The cell under way is drawn: the next one may be, while its numbers are computed."""
    if _is_of(out / PARTIAL, name):  # or it is kept already, and this is of the next
        (out / PARTIAL).replace(out / DRAWN)


def under_way(out: pathlib.Path) -> list[str]:
    """The names of the cells of which something is kept."""
    names = []
    for path in (out / DRAWN, out / PARTIAL):
        if path.exists():
            arrays = read_npz(path, "a cell under way", ["cell"], way_out=_DRAW_AGAIN)
            names.append(str(arrays.get("cell")))
    return names


def _is_of(path: pathlib.Path, name: str) -> bool:
    """Whether the file keeps the cell of that name."""
    if not path.exists():
        return False
    with np.load(path) as file:
        return str(file["cell"]) == name


def no_progress(measures: Sequence[Measure]) -> Progress:
    """Of a cell of which nothing is measured yet."""
    return Progress(0, 0.0, {measure.name: measure.init() for measure in measures})


def load_progress(out: pathlib.Path, name: str, measures: Sequence[Measure]) -> Progress:
    """What was kept of the cell of that name; else nothing measured yet."""
    found = (_read_progress(out / file, name, measures) for file in (DRAWN, PARTIAL))
    there = next((progress for progress in found if progress is not None), None)
    return there or no_progress(measures)


def _read_progress(path: pathlib.Path, name: str, measures: Sequence[Measure]) -> Progress | None:
    if not path.exists():
        return None
    try:
        arrays = read_npz(path, "a cell under way", way_out=_DRAW_AGAIN)
    except (FileNotFoundError, ValueError):
        if path.exists():
            raise
        return None  # just now its numbers were done
    try:
        if str(arrays["cell"]) != name:
            return None
        if "format" not in arrays:
            arrays = sweep_format_1.progress(arrays, [measure.name for measure in measures])
        _check_format(path, {"format": int(arrays["format"])})
        states = {measure.name: _states(measure, arrays) for measure in measures}
        return Progress(int(arrays["count"]), float(arrays["seconds"]), states)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no cell under way: {error} {_DRAW_AGAIN}") from error


def _states(measure: Measure, arrays: Mapping[str, np.ndarray]) -> dict[str, State]:
    return {
        metric.state: state_from_arrays(metric, arrays, f"{measure.name}.{metric.state}")
        for metric in measure.metrics
    }
