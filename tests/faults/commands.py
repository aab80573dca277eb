"""Command lines with something wrong in them: one line that says what, exit code 2, nothing lost.

PYTHONPATH=.:experiments python tests/faults/commands.py [--every 1] [--script sample.py]

Of each script one command that works in seconds, on a small model; each option, found in the
script's dataclass, is then given what it must not be. One of every so many is run, here.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import runpy
import shutil
import signal
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
SECONDS = 60
"""No command may take longer; the slowest that works takes a third of it."""

TINY = [
    *("--model.channels", "8", "--model.channel-mults", "1", "--model.num-res-blocks", "1"),
    *("--model.attention-resolutions", "--model.norm-groups", "4", "--batch-size", "8"),
    *("--max-steps", "2", "--sample-every", "0", "--warmup-steps", "1"),
]


class Script(NamedTuple):
    """A script, the class of its options, and arguments with which it works."""

    config: str
    arguments: list[str]


def scripts(place: pathlib.Path) -> dict[str, Script]:
    """By file name; what they need stands in `place`, and {out} is a new folder for each."""
    model = ["--workdir", f"{place}/model"]
    few = [*model, "--num-images", "2", "--out", "{out}"]
    return {
        "train.py": Script("TrainOptions", ["digits", *TINY, "--workdir", "{out}"]),
        "sample.py": Script("SampleConfig", [*few, "--num-sample-steps", "2"]),
        "fid_sweep.py": Script(
            "SweepConfig",
            [*model, "--stats", f"{place}/s.npz", "--out", "{out}", "--steps", "2", "--etas", "0",
             "--num-samples", "4", "--batch-size", "2"],
        ),
        "fid.py": Script("FidConfig", ["digits", "--stats", f"{place}/s.npz"]),
        "make_statistics.py": Script(
            "StatisticsConfig", ["digits", "--features", "pixels", "--out", "{out}/s.npz"]
        ),
        "convert.py": Script(
            "ConvertConfig", [*model, "--to", "diffusers", "--out", "{out}/foreign"]
        ),
        "reconstruct.py": Script("ReconstructConfig", [*few, "--steps", "2"]),
        "interpolate.py": Script(
            "InterpolateConfig", [*model, "--out", "{out}", "--num-sample-steps", "2"]
        ),
        "trajectory.py": Script(
            "TrajectoryConfig", [*model, "--out", "{out}", "--num-sample-steps", "2"]
        ),
        "likelihood.py": Script("LikelihoodConfig", [*few, "--num-sample-steps", "2"]),
        "same_latent.py": Script("SameLatentConfig", [*few, "--steps", "2", "3"]),
        "compare_solvers.py": Script("CompareConfig", ["--out", "{out}/solvers.png"]),
        "sweep_report.py": Script("ReportConfig", [f"{place}/sweep"]),
        "training_report.py": Script("ReportConfig", [f"{place}/model", "--out", "{out}"]),
        "train_classifier.py": Script(
            "ClassifierConfig", ["digits", "--out", "{out}", "--num-steps", "2"]
        ),
        "demo.py": Script("DemoConfig", ["--out", "{out}", "--train-steps", "1"]),
    }  # fmt: skip


NUMBERS = ["-1", "-7", "0", "nan", "inf", "1e99", "1000000000000000", "abc", ""]
WORDS = ["nope", "", "a/b", "\u00e9"]


def wrong_values(hint: Any, place: pathlib.Path) -> list[list[str]]:
    """What an option of this type must not, or may hardly, be given."""
    parts = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        kept = [part for part in parts if part is not type(None)]
        return [value for part in kept for value in wrong_values(part, place)]
    if origin is typing.Annotated:
        found = [str(x) for x in parts[1:]]
        if any("PathOption" in x for x in found):
            return [[str(place / name)] for name in ("no/such", "pipe", "a.txt", "empty", "s.npz")]
        return wrong_values(parts[0], place)
    if origin is tuple:
        return [*wrong_values(parts[0], place), []]
    if origin is Literal:
        return [[word] for word in WORDS[:2]]
    if hint in (int, float):
        return [[number] for number in NUMBERS]
    if hint is str:
        return [[word] for word in WORDS] + [[str(place / "pipe")]]
    return []


def options_of(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a dataclass and of those in it: name on the command line, type."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{field.name}.")  # pyright: ignore
        else:
            yield f"{prefix}{field.name}", hint


def commands(place: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """(script, arguments) with one option wrong; the last of an option counts."""
    for name, script in scripts(place).items():
        module = importlib.import_module(name.removesuffix(".py"))
        config = getattr(module, script.config)
        for option, hint in options_of(config):
            if "Positional" in str(hint):
                continue
            for value in wrong_values(hint, place):
                flag = f"--{option.replace('_', '-')}"
                yield name, [*script.arguments, flag, *value]


class Outcome(NamedTuple):
    """How a command ended."""

    code: int | None
    errors: str
    seconds_up: bool


class _TimeUp(BaseException):
    pass


def outcome(name: str, arguments: Sequence[str], out: pathlib.Path) -> Outcome:
    """Run it here, as `python NAME ARGUMENTS` would."""
    argv = [str(EXPERIMENTS / name), *(x.replace("{out}", str(out)) for x in arguments)]
    errors, before = io.StringIO(), (sys.argv, sys.unraisablehook, warnings.showwarning)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def up(number, frame):
        raise _TimeUp

    signal.signal(signal.SIGALRM, up)
    signal.alarm(SECONDS)
    code, seconds_up = 0, False
    try:
        sys.argv = argv
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except _TimeUp:
        code, seconds_up = None, True
    except BaseException as error:
        code = None
        errors.write(f"Traceback: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
        sys.argv, sys.unraisablehook, warnings.showwarning = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(code, errors.getvalue(), seconds_up)


def fault_of(name: str, arguments: Sequence[str], out: pathlib.Path) -> str | None:
    """What is wrong with how it ended; None if it worked, or was refused as it should be."""
    code, errors, seconds_up = outcome(name, arguments, out)
    if seconds_up:
        return f"more than {SECONDS} s"
    if code is None:
        return errors[-300:]
    if code == 0:
        return None
    if "For full helptext, " in errors and code == 2:  # the parser's own words
        return None
    lines = [x for x in errors.strip().splitlines() if not x.startswith("warning:")]
    if code not in (1, 2) or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"code {code}: {errors[-300:]}"
    if code == 2 and any(out.rglob("*.npz")):
        return f"refused after the work: {lines[0]}"
    return None


def prepare(place: pathlib.Path) -> None:
    """A model, statistics, a sweep, and things that are none."""
    (place / "empty").mkdir()
    (place / "a.txt").write_text("a")
    os.mkfifo(place / "pipe")
    for name, arguments in (
        ("train.py", ["digits", *TINY, "--workdir", f"{place}/model", "--log-every", "1"]),
        ("make_statistics.py", ["digits", "--features", "pixels", "--out", f"{place}/s.npz"]),
        ("fid_sweep.py", [x.replace("{out}", f"{place}/sweep")
                          for x in scripts(place)["fid_sweep.py"].arguments]),
    ):  # fmt: skip
        found = outcome(name, arguments, place)
        assert found.code == 0, (name, found)


def main() -> int:
    """Run them; print what was wrong, and how many; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--script")
    parser.add_argument("--verbose", action="store_true", help="name each before it is run")
    asked = parser.parse_args()
    ends: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        prepare(place)
        for name, script in scripts(place).items():
            out = place / f"right_{name}"
            out.mkdir()
            if name != "demo.py":  # minutes
                found = outcome(name, script.arguments, out)
                assert found.code == 0, f"{name}: {found.errors[-2000:]}"
        chosen = [x for x in commands(place) if asked.script in (None, x[0])][:: asked.every]
        for i, (name, arguments) in enumerate(chosen):
            out = place / f"out_{i}"
            out.mkdir()
            if asked.verbose:
                print(name, *arguments[-3:], flush=True)
            if fault := fault_of(name, arguments, out):
                said = " ".join(fault.split())
                print(f"{name} ... {' '.join(arguments[-2:])}: {said}", flush=True)
            ends["wrong" if fault else "right"] += 1
            shutil.rmtree(out, ignore_errors=True)
    print(f"{len(chosen)} command lines, {ends['wrong']} faults")
    return ends["wrong"]


if __name__ == "__main__":
    np.seterr(all="ignore")
    raise SystemExit(min(main(), 1))
