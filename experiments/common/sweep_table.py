"""A sweep's numbers as tables: rows, columns, what must be read with them, and the paper's."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from common import times
from common.exact import exact
from common.sweep_seeds import Line, Lines, over_seeds, seeds_of
from ddim_jax.runs import weights_called
from ddim_jax.schedule import Spacing

PaperTable: TypeAlias = Literal["cifar10", "celeba64", "bedroom", "church"]
PaperValues: TypeAlias = Mapping[tuple[int, float | str, str], float]
"""(S, eta or "sigma_hat", sub-sequence) -> the paper's number."""

PAPER_TABLES = pathlib.Path(__file__).with_name("paper_tables.json")
PAPER_SPACINGS: Mapping[PaperTable, Spacing] = {
    "cifar10": "quadratic", "celeba64": "uniform", "bedroom": "uniform", "church": "uniform"
}  # fmt: skip
WHOLE_CHAIN = 1000
PAPER_COLUMN = "fid"
"""What the paper's numbers are."""


def paper_values(paper: PaperTable | None) -> PaperValues:
    """The paper's FID, of the sub-sequence that it took for the data (appendix D.2).

    S = 1000 is all of T, whatever the sub-sequence. Source: Song et al. 2021, Tables 1 and 3.
    """
    if paper is None:
        return {}
    tables = json.loads(PAPER_TABLES.read_text())
    (table,) = (t for t in (tables["table1_fid"], tables["table3_fid"]) if paper in t)
    rows = {key: row for key, row in table[paper].items() if isinstance(row, list)}
    values: dict[tuple[int, float | str], float] = {
        (num_steps, "sigma_hat" if key == "sigma_hat" else float(key)): value
        for key, row in rows.items()
        for num_steps, value in zip(table["S"], row, strict=True)
    }
    if (whole_chain := table[paper].get("ddpm_1000")) is not None:
        values[WHOLE_CHAIN, 1.0] = (
            whole_chain  # DDPM's own, of the caption; eta = 1 is its variance
        )
    return {
        (num_steps, eta, spacing): value
        for (num_steps, eta), value in values.items()
        for spacing in (get_args(Spacing) if num_steps == WHOLE_CHAIN else [PAPER_SPACINGS[paper]])
    }


# ---------------------------------------------------------------------------------------------
# Rows and columns


class Row(NamedTuple):
    """One row of a table: all of a cell but S."""

    sampler: str
    eta: float | None
    guidance_scale: float
    spacing: str

    @property
    def method(self) -> str:
        """The sampler and its eta, as a person says them."""
        if self.eta is None:
            return self.sampler.replace("sigma_hat", "sigma-hat")
        names = {0.0: "DDIM, eta = 0", 1.0: "DDPM, eta = 1"}
        return names.get(self.eta) or f"eta = {exact(self.eta)}"


def row_of(line: Line) -> Row:
    """The row that a cell stands in."""
    return Row(line["sampler"], line["eta"], line["guidance_scale"], line["spacing"])


def papers_own(theirs: PaperValues, row: Row, num_steps: int) -> float | None:
    """The paper's number of a row and S, where it has one."""
    if row.guidance_scale != 1:
        return None
    return theirs.get((num_steps, row.sampler if row.eta is None else row.eta, row.spacing))


def rows_of(lines: Lines) -> dict[Row, str]:
    """The rows in order, and what to call each; spacing is named where there are several."""
    rows = list(dict.fromkeys(map(row_of, lines)))
    spacings = list(dict.fromkeys(row.spacing for row in rows))
    methods = ["ddim", "sigma_hat"]  # etas first, as in the paper
    methods += [row.sampler for row in rows if row.sampler not in methods]

    def order(row: Row) -> tuple[Any, ...]:
        eta = 0.0 if row.eta is None else row.eta
        return spacings.index(row.spacing), row.guidance_scale, methods.index(row.sampler), eta

    def name(row: Row) -> str:
        parts = [row.method]
        if row.guidance_scale != 1:
            parts.append(f"guidance {exact(row.guidance_scale)}")
        if len(spacings) > 1 or times.is_list(row.spacing):
            parts.append(times.shown(row.spacing))
        return ", ".join(parts)

    return {row: name(row) for row in sorted(rows, key=order)}


def steps_of(lines: Lines) -> list[int]:
    """The columns."""
    return sorted({line["S"] for line in lines})


def scores(lines: Lines) -> list[str]:
    """The numbers that get a table of their own: all but standard deviations of others."""
    return [name for name, measure in lines[0]["measures"].items() if measure["std_of"] is None]


def _std_of(name: str, line: Line) -> str | None:
    """The column with the standard deviation of the one called `name`."""
    return next((k for k, m in line["measures"].items() if m["std_of"] == name), None)


# ---------------------------------------------------------------------------------------------
# A table


class Entry(NamedTuple):
    """What stands in a table."""

    text: str
    best: bool = False
    calls: str = ""
    """What stands small below: network calls where they are not S, seeds where they are others."""


class Table(NamedTuple):
    """Head and rows of one number; the first column says what a row is."""

    head: list[str]
    rows: list[list[Entry]]


def table_of(name: str, lines: Lines, theirs: PaperValues) -> Table:
    """The table of one number; each followed by the paper's in brackets."""
    lines = over_seeds(lines)
    seeds = seeds_of(lines)
    steps, cells = steps_of(lines), {(row_of(line), line["S"]): line for line in lines}
    theirs = theirs if _is_distance_like_the_papers(name, lines) else {}
    best = _best(name, lines)
    rows = [
        [
            Entry(title),
            *(_entry(name, cells.get((row, s)), theirs, best.get(s), seeds) for s in steps),
        ]
        for row, title in rows_of(lines).items()
    ]
    return Table(["S", *map(str, steps)], [*rows, _time_row(lines, steps)])


def _entry(
    name: str, line: Line | None, theirs: PaperValues, best: Row | None, seeds: list[int]
) -> Entry:
    if line is None:
        return Entry("–")
    text = f"{line['values'][name]:.4g}"
    if line["spread"]:
        text += f" ± {line['spread'][name]:.2g}"
    elif len(seeds) == 1 and (std := _std_of(name, line)):
        text += f" ± {line['values'][std]:.2g}"
    if (paper := papers_own(theirs, row_of(line), line["S"])) is not None:
        text += f" ({paper:.2f})"
    small = [f"{line['network_calls']} calls"] if line["network_calls"] != line["S"] else []
    if sorted(line["seeds"]) != seeds:
        small.append(f"seed {' '.join(map(str, line['seeds']))} alone")
    return Entry(text, best == row_of(line), ", ".join(small))


def _best(name: str, lines: Lines) -> dict[int, Row]:
    """The row of the best number of each S."""
    choose = min if lines[0]["measures"][name]["direction"] == "lower" else max
    return {
        s: row_of(choose((x for x in lines if x["S"] == s), key=lambda x: x["values"][name]))
        for s in steps_of(lines)
    }


def _time_row(lines: Lines, steps: list[int]) -> list[Entry]:
    """What a cell takes, on average over those with S network calls if there are any."""
    plain = [line for line in lines if line["network_calls"] == line["S"]]
    name = "time for one" if len(plain) == len(lines) else "time for one of S calls"
    row = [Entry(name)]
    for num_steps in steps:
        seconds = [line["seconds"] for line in plain if line["S"] == num_steps]
        row.append(Entry(duration(sum(seconds) / len(seconds)) if seconds else "–"))
    return row


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------
# Words


def describe(line: Line, plain_spacing: str | None = None) -> str:
    """One finished cell for the terminal; its spacing is named unless it is the plain one."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in line["values"].items())
    row = rows_of([line])[row_of(line)]
    if plain_spacing != line["spacing"] and not times.is_list(line["spacing"]):
        row += f", {line['spacing']}"
    return (
        f"S = {line['S']:4d}  {row:13s}  seed {line['seed']}  {values}  {duration(line['seconds'])}"
    )


def _is_distance_like_the_papers(name: str, lines: Lines) -> bool:
    return lines[0]["measures"][name]["published_as"] == PAPER_COLUMN


def notes(name: str, lines: Lines, theirs: PaperValues) -> list[str]:
    """What must be read with the numbers."""
    measure = lines[0]["measures"][name]
    found = [f"{measure['direction'].capitalize()} is better."]
    if len(seeds := sorted({line["seed"] for line in lines})) > 1:
        found.append(
            f"Mean over the seeds {', '.join(map(str, seeds))}; after ±: their standard deviation."
        )
    elif std := _std_of(name, lines[0]):
        found.append(f"After ±: {lines[0]['measures'][std]['title']}.")
    if any(line["network_calls"] != line["S"] for line in lines):
        found.append("Calls: network evaluations for an image, where they are not S.")
    if theirs and _is_distance_like_the_papers(name, lines):
        found += _of_the_papers(name, measure["title"], lines, theirs)
    warnings = dict.fromkeys(line["measures"][name]["warning"] for line in lines)
    return found + [f"Warning: {warning}" for warning in warnings if warning]


def _of_the_papers(name: str, title: str, lines: Lines, theirs: PaperValues) -> list[str]:
    """What the paper's numbers are, and in what these are otherwise."""
    spacing = next(spacing for num_steps, _, spacing in theirs if num_steps != WHOLE_CHAIN)
    there = any(papers_own(theirs, row_of(line), line["S"]) is not None for line in lines)
    protocol = f"the {spacing} sub-sequence and N = 50000"
    if not there:
        return [f"No cell is one of the paper's, which are of {protocol}."]
    found = [f"In brackets: the FID the paper reports, of {protocol}."]
    if name != PAPER_COLUMN:
        found.append(
            f"It is another distance than {title}: compare the order of the methods, never the "
            "numbers."
        )
    if lines[0].get("clip_x0"):
        found.append("The paper clipped no x0_hat in its rows of eta; here it was clipped.")
    if lines[0].get("dtype", "float32") != "float32":
        found.append(f"The paper computed in float32; these are of {lines[0]['dtype']}.")
    return found


def protocol(lines: Lines) -> str:
    """Everything the numbers depend on, in a sentence or two."""
    line = lines[0]
    weights = line["weights"]
    spacings = " and ".join(dict.fromkeys(times.shown(line["spacing"]) for line in lines))
    runs = [i for i in dict.fromkeys(line.get("fingerprint_id") for line in lines) if i]
    return (
        f"N = {line['num_samples']} samples, {spacings} sub-sequence, "
        f"{weights_called(weights['kind'], weights['step'])}, hash {weights['hash'][:12]}, "
        + (f"run {' and '.join(runs)}, " if runs else "")
        + f"{_seeds(lines)}, {_computed(line)}pixels rounded to {line['rounding']}, batches of "
        f"{line['batch_size']}. {'. '.join(_measured(line))}. {line['device']}; "
        + ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        + "."
    )


def _computed(line: Line) -> str:
    """How the network was run, where that is not float32 as the device likes it."""
    parts = ["x0 clipped"] if line.get("clip_x0") else []
    if (dtype := line.get("dtype", "float32")) != "float32":
        parts.append(f"computed in {dtype}")
    if (precision := line.get("matmul_precision", "default")) != "default":
        parts.append(f"matrix products of precision {precision}")
    return "".join(f"{part}, " for part in parts)


def _seeds(lines: Lines) -> str:
    seeds = sorted({line["seed"] for line in lines})
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _measured(line: Line) -> list[str]:
    """For each metric of each network what its numbers depend on."""
    titles: dict[tuple[str, str], list[str]] = {}
    for measure in line["measures"].values():
        if measure["std_of"] is None:
            titles.setdefault((measure["features"], measure["metric"]), []).append(measure["title"])
    measures = {(m["features"], m["metric"]): m for m in line["measures"].values()}
    found = []
    for key, names in titles.items():
        m = measures[key]
        text = (
            f"{' and '.join(names)}: {m['description']}, {m['dim']} {m['features']} features, "
            f"network {m['network_hash'][:12]}"
        )
        if m["statistics_hash"]:
            text += (
                f", statistics {m['statistics_hash'][:12]} of "
                f"{m['statistics_num_samples'] or '?'} images of "
                f"{m['statistics_of'].get('name', 'unnamed data')}"
            )
        found.append(text)
    return found


def markdown_section(name: str, lines: Lines, theirs: PaperValues) -> str:
    """Heading, table and notes of one number."""
    table = table_of(name, lines, theirs)
    rows = [[", ".join(filter(None, (e.text, e.calls))) for e in row] for row in table.rows]
    rows = [table.head, ["---"] * len(table.head), *rows]
    return "\n".join(
        [
            f"## {lines[0]['measures'][name]['title']}\n",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            " ".join(notes(name, lines, theirs)),
            "",
        ]
    )
