"""A sweep's report: report.md, and report.html, one file a person can send on."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

import cycler
import matplotlib

from common.sweep_about import read_about, sentences
from common.sweep_seeds import over_seeds
from common.sweep_store import read_results
from common.sweep_table import (
    PAPER_COLUMN,
    Entry,
    Line,
    Lines,
    PaperTable,
    PaperValues,
    markdown_section,
    notes,
    paper_values,
    papers_own,
    protocol,
    row_of,
    rows_of,
    scores,
    steps_of,
    table_of,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from ddim_jax.files import write_whole


def write_report(out: pathlib.Path, paper: PaperTable | None) -> None:
    """Write report.md and report.html from the finished cells, if there are any.

    The paper's table is the one the sweep was begun with, if not given. The same files give the
    same bytes.
    """
    lines = read_results(out)
    if not lines:
        return
    facts = read_about(out)
    theirs = paper_values(paper or facts.get("paper"))
    head = sentences(facts, lines)
    sections = [markdown_section(name, lines, theirs) for name in scores(lines)]
    text = [f"# {_title(lines)}\n", *(f"{x}\n" for x in head), *sections, f"{protocol(lines)}\n"]
    write_whole(out / "report.md", "\n".join(text).encode())
    write_whole(out / "report.html", _page(out, lines, theirs, head).encode())


def _title(lines: Lines) -> str:
    return f"Samples over steps and methods, N = {lines[0]['num_samples']}"


# ---------------------------------------------------------------------------------------------
# Plots


STEPS = "steps S"
GREY = "#888888"
PLOT_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "ddim_jax",
    **{f"{part}.color": GREY for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": GREY for part in ("edgecolor", "labelcolor")},
    "axes.prop_cycle": cycler.cycler(linestyle=["-", "--", "-."])
    * cycler.cycler(color=["#2f81f7", "#3fb950", "#d29922", "#f0663f", "#a371f7", "#39c5cf"]),
}
"""Suits a light and a dark page. The paper's lines are dotted."""


def _plots(name: str, lines: Lines, theirs: PaperValues) -> tuple[str, str]:
    """The number against S, or network calls where those differ, and against seconds, as SVG."""
    lines = over_seeds(lines)
    same = all(line["network_calls"] == line["S"] for line in lines)
    label = STEPS if same else "network calls"
    with plt.rc_context(PLOT_STYLE):
        return (
            _plot(name, lines, "network_calls", label, theirs if name == PAPER_COLUMN else {}),
            _plot(name, lines, "seconds", f"seconds for N = {lines[0]['num_samples']}", {}),
        )


def _plot(
    name: str,
    lines: Lines,
    key: Literal["network_calls", "seconds"],
    label: str,
    theirs: PaperValues,
) -> str:
    """One line for each row; the paper's are dotted."""
    rows, steps, measure = rows_of(lines), steps_of(lines), lines[0]["measures"][name]
    columns = 3 if max(map(len, rows.values())) <= 16 else 2
    height = 3.6 + 0.25 * -(-len(rows) // columns)
    figure, axes = plt.subplots(figsize=(5, height), layout="constrained")
    for row, title in rows.items():
        cells = sorted((x for x in lines if row_of(x) == row), key=lambda x: x["S"])
        values = [x["values"][name] for x in cells]
        (ours,) = axes.plot([x[key] for x in cells], values, marker=".", label=title)
        if any(x["spread"] for x in cells):
            spread = [x["spread"].get(name, 0.0) for x in cells]
            axes.errorbar(
                [x[key] for x in cells], values, spread, color=ours.get_color(), linestyle="none",
                capsize=3,
            )  # fmt: skip
        paper = [(s, value) for s in steps if (value := papers_own(theirs, row, s)) is not None]
        if paper:
            axes.plot(*zip(*paper, strict=True), linestyle=":", color=ours.get_color())
    if _shows_papers(name, lines, theirs):
        axes.plot([], [], linestyle=":", color=GREY, label="the paper")
    axes.set(xscale="log", yscale=measure["axis"], xlabel=label, ylabel=measure["title"])
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    if label == STEPS:
        axes.set_xticks(steps, [str(s) for s in steps])
    size = 10 if columns == 3 else 8  # long names, two side by side
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=size)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def _legend(name: str, lines: Lines, theirs: PaperValues) -> str:
    """What the lines of the plots are."""
    found = ["Each line is a row of the table, each dot one of its cells."]
    if len({line["seed"] for line in lines}) > 1:
        found.append("Bars: the standard deviation over the seeds, to both sides of their mean.")
    if _shows_papers(name, lines, theirs):
        found.append("Dotted: the paper's numbers, in the colour of the same method.")
    return " ".join(found)


def _shows_papers(name: str, lines: Lines, theirs: PaperValues) -> bool:
    return name == PAPER_COLUMN and any(
        papers_own(theirs, row_of(x), x["S"]) is not None for x in lines
    )


def _inline_svg(svg: str, prefix: str) -> str:
    """The picture without its XML head, its ids made unique within the page."""
    svg = svg[svg.index("<svg") :]
    return (
        svg.replace('id="', f'id="{prefix}_')
        .replace('"#', f'"#{prefix}_')
        .replace("url(#", f"url(#{prefix}_")
    )


# ---------------------------------------------------------------------------------------------
# The page


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9.5rem;
  position: sticky; left: 0; background: Canvas; }
thead th:first-child { background: linear-gradient(var(--soft) 0 0), Canvas; }
td small { display: block; font-weight: 400; color: GrayText; }
tr + tr { border-top: 1px solid var(--line); } thead { background: var(--soft); }
tr:last-child, .note, figcaption { color: GrayText; }
.best { font-weight: 700; }
.note { font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
.plots { display: grid; gap: 1rem; margin-top: 1rem; }
@media (min-width: 45rem) { .plots { grid-template-columns: 1fr 1fr; } }
.cells { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
figure { margin: 0; } figcaption { font-size: .8rem; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
"""


def _page(out: pathlib.Path, lines: Lines, theirs: PaperValues, head: Iterable[str]) -> str:
    """The whole report as one page without any other file; `head` says what the sweep is."""
    body = [f'<p class="note">{html.escape(text)}</p>' for text in head]
    for name in scores(lines):
        body += [
            f"<h2>{html.escape(lines[0]['measures'][name]['title'])}</h2>",
            _html_table(name, lines, theirs),
            *(f'<p class="note">{html.escape(note)}</p>' for note in notes(name, lines, theirs)),
            '<div class="plots">',
            *(_inline_svg(x, f"{name}{i}") for i, x in enumerate(_plots(name, lines, theirs))),
            "</div>",
            f'<p class="note">{_legend(name, lines, theirs)}</p>',
        ]
    body += [
        "<h2>Samples</h2>",
        '<p class="note">The same latents in every cell: at eta = 0 images stay as S grows.</p>',
        *_html_samples(out, over_seeds(lines)),
        "<h2>Protocol</h2>",
        f'<p class="note">{html.escape(protocol(lines))}</p>',
    ]
    title = html.escape(_title(lines))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(name: str, lines: Lines, theirs: PaperValues) -> str:
    table = table_of(name, lines, theirs)

    def cell(entry: Entry) -> str:
        start = '<td class="best">' if entry.best else "<td>"
        calls = f"<small>{entry.calls}</small>" if entry.calls else ""
        text = html.escape(entry.text).replace(" = ", "&nbsp;=&nbsp;")  # lines break elsewhere
        return f"{start}{text}{calls}</td>"

    return "\n".join(
        [
            '<div class="scroll"><table>',
            f"<thead><tr>{''.join(f'<th>{text}</th>' for text in table.head)}</tr></thead><tbody>",
            *(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows),
            "</tbody></table></div>",
        ]
    )


def _html_samples(out: pathlib.Path, lines: Lines) -> Iterable[str]:
    """One row of pictures for each S."""
    rows = rows_of(lines)
    for num_steps in steps_of(lines):
        yield f'<h3>S = {num_steps}</h3><div class="cells">'
        cells = {row_of(line): line for line in lines if line["S"] == num_steps}
        for row, title in rows.items():
            if row in cells:
                yield from _figure(out, cells[row], html.escape(title))
        yield "</div>"


def _figure(out: pathlib.Path, line: Line, title: str) -> Iterable[str]:
    path = out / "samples" / f"{line['name']}.png"
    if path.exists():
        data = base64.b64encode(path.read_bytes()).decode()
        yield (
            f'<figure><img alt="samples, S = {line["S"]}, {title}" '
            f'src="data:image/png;base64,{data}"><figcaption>{title}</figcaption></figure>'
        )
