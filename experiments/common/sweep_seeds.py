"""One cell drawn from several seeds: one line with the mean of each number, and its spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from common.sweep_store import cell_of

Line: TypeAlias = Mapping[str, Any]
"""A finished cell, as read_results gives it, or several of them as `over_seeds` does."""
Lines: TypeAlias = Sequence[Line]


def over_seeds(lines: Lines) -> list[dict[str, Any]]:
    """One line for each cell whatever its seed, in the order of the first of each.

    It has "seeds", the mean of values and seconds, and the "spread" of each value: the standard
    deviation over the seeds (divided by their number less one), where there are several. What else
    it says is the first one's, and so is its picture.
    """
    cells: dict[Any, list[Line]] = {}
    for line in lines:
        cells.setdefault(cell_of(line)._replace(seed=0), []).append(line)
    return [_pooled(found) for found in cells.values()]


def _pooled(lines: Lines) -> dict[str, Any]:
    values = {name: [line["values"][name] for line in lines] for name in lines[0]["values"]}
    spread = {name: statistics.stdev(x) for name, x in values.items()} if len(lines) > 1 else {}
    return {
        **lines[0],
        "seeds": [line["seed"] for line in lines],
        "values": {name: statistics.fmean(x) for name, x in values.items()},
        "spread": spread,
        "seconds": statistics.fmean(line["seconds"] for line in lines),
    }


def seeds_of(lines: Lines) -> list[int]:
    """All seeds behind the lines, in order."""
    return sorted({seed for line in lines for seed in line["seeds"]})
