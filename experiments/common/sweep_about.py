"""What a sweep is, as its report's head says: model, weights, date, command, what is missing."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from common.sweep_seeds import Lines
from common.sweep_store import ABOUT, Cell, cell_of
from ddim_jax.files import read_json
from ddim_jax.runs import weights_called


def about(
    there: Mapping[str, Any], cells: Sequence[Cell], workdir: str, command: str, paper: str | None
) -> dict[str, Any]:
    """The facts for sweep.json; `there` is what it says already, whose cells are wanted too."""
    now = datetime.datetime.now().astimezone()
    before = there.get("cells", [])
    return {
        "model": workdir,
        # When an older version began one, nobody knows.
        "begun": there.get("begun") if there else now.isoformat(timespec="seconds"),
        "command": command,
        "cells": before + [list(cell) for cell in cells if list(cell) not in before],
        "paper": paper or there.get("paper"),
    }


def command_of(script: str, config: Any) -> str:
    """The command line that gives these settings: every option that has not its default."""
    words = ["python", script]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def read_about(out: pathlib.Path) -> dict[str, Any]:
    """What sweep.json says for the reader; of older versions' less, or nothing."""
    path = out / "sweep.json"
    content = read_json(path) if path.exists() else {}
    return {name: content[name] for name in ABOUT if content.get(name) is not None}


def sentences(facts: Mapping[str, Any], lines: Lines) -> list[str]:
    """The report's head, as paragraphs."""
    weights = lines[0]["weights"]
    runs = sorted({x["fingerprint_id"] for x in lines if x.get("fingerprint_id")})
    model = f"{facts['model']}, " if "model" in facts else ""
    found = [
        f"Model: {model}{weights_called(weights['kind'], weights['step'])}, hash "
        f"{weights['hash'][:12]}" + (f"; fingerprint {' and '.join(runs)}" if runs else "") + "."
    ]
    begun = f"Begun {facts['begun']}. " if "begun" in facts else ""
    if "cells" in facts:
        found.append(f"{begun}{_missing(facts['cells'], lines)}")
    if "command" in facts:
        found.append(f"Command: {facts['command']}")
    return found


def _missing(wanted: Sequence[Sequence[Any]], lines: Lines) -> str:
    """Whether all cells are there, and of which S the others are."""
    done = {cell_of(line) for line in lines}
    missing = [cell for cell in (Cell(*cell) for cell in wanted) if cell not in done]
    total = len(missing) + len(done)
    if not missing:
        return f"Complete: all {total} cells are measured."
    steps = sorted({cell.num_steps for cell in missing})
    return (
        f"Not complete: {len(missing)} of {total} cells are missing, of S = "
        f"{', '.join(map(str, steps))}; called again, the commands that asked for them go on."
    )
