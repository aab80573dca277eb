"""What a sweep found, to look at: report.md, and report.html, one file a person can send on.

python experiments/sweep_report.py DIR     # anew, from DIR/results.jsonl
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import cli
import cycler
import matplotlib
import tyro

from ddim_jax.metrics.frechet import few_samples_warning

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

Eta: TypeAlias = float | Literal["sigma_hat"]
PaperTable: TypeAlias = Literal["cifar10", "celeba64", "bedroom", "church"]
Line: TypeAlias = Mapping[str, Any]
"""One finished cell, as in results.jsonl."""

TITLES = {"fid": "FID", "fd_classifier": "fd_classifier", "fd_pixels": "fd_pixels"}
PAPER_TABLES = pathlib.Path(__file__).with_name("paper_tables.json")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write the report of a sweep again."""

    out: Annotated[str, tyro.conf.Positional]
    """The sweep's folder."""
    paper: PaperTable | None = None
    """Show these numbers of the paper beside the sweep's."""


def main(config: ReportConfig) -> None:
    """Write report.md and report.html."""
    out = pathlib.Path(config.out)
    if not read_results(out):
        raise ValueError(f"{out} has no results.jsonl; make one with experiments/fid_sweep.py.")
    write_report(out, config.paper)
    print(out / "report.html")


def read_results(out: pathlib.Path) -> list[dict[str, Any]]:
    """The finished cells of a sweep."""
    path = out / "results.jsonl"
    if not path.exists():
        return []
    return [read_json(path, line) for line in path.read_text().splitlines()]


def read_json(path: pathlib.Path, text: str) -> dict[str, Any]:
    """The text as JSON; a ValueError that names its file if it is damaged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete the bad line, or the file, to measure its cells "
            "again."
        ) from error


def method_name(eta: Eta) -> str:
    """What a row of the table is called."""
    names: dict[Eta, str] = {0.0: "DDIM, eta = 0", 1.0: "DDPM, eta = 1", "sigma_hat": "sigma-hat"}
    return names.get(eta) or f"eta = {eta:g}"


def cell_name(num_steps: int, eta: Eta) -> str:
    """What a cell's files are called."""
    return f"S{num_steps:04d}_" + ("sigma_hat" if eta == "sigma_hat" else f"eta_{eta:g}")


def describe(line: Line) -> str:
    """One finished cell for the terminal."""
    distances = ", ".join(f"{name} {value:.4g}" for name, value in line["distances"].items())
    return (
        f"S = {line['S']:4d}  {method_name(line['eta']):13s}  {distances}  "
        f"{duration(line['seconds'])}"
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def paper_values(paper: PaperTable) -> dict[tuple[int, Eta], float]:
    """(S, eta) -> the paper's FID. Source: Song et al. 2021, Tables 1 and 3."""
    tables = json.loads(PAPER_TABLES.read_text())
    (table,) = (t for t in (tables["table1_fid"], tables["table3_fid"]) if paper in t)
    rows = {key: row for key, row in table[paper].items() if isinstance(row, list)}
    return {
        (num_steps, "sigma_hat" if key == "sigma_hat" else float(key)): value
        for key, row in rows.items()
        for num_steps, value in zip(table["S"], row, strict=True)
    }


def write_report(out: pathlib.Path, paper: PaperTable | None) -> None:
    """Write report.md, distance.svg and report.html from the finished cells, if there are any."""
    lines = read_results(out)
    if not lines:
        return
    theirs = {} if paper is None else paper_values(paper)
    sections = [markdown_section(name, lines, theirs) for name in lines[0]["distances"]]
    (out / "report.md").write_text(
        f"# Distance over steps and eta\n\n{chr(10).join(sections)}\n{protocol(lines)}\n"
    )
    (out / "report.html").write_text(_html(out, lines, theirs))


def _table(
    name: str, lines: list[dict[str, Any]], theirs: Mapping[tuple[int, Eta], float]
) -> list[list[str]]:
    """Head and rows; each number followed by the paper's in brackets."""
    steps, etas = _axes(lines)
    values = {(line["S"], line["eta"]): line["distances"][name] for line in lines}

    def entry(num_steps: int, eta: Eta) -> str:
        ours = f"{values[num_steps, eta]:.4g}" if (num_steps, eta) in values else "–"
        paper = f" ({theirs[num_steps, eta]:.2f})" if (num_steps, eta) in theirs else ""
        return ours + paper

    rows = [[method_name(eta), *(entry(s, eta) for s in steps)] for eta in etas]
    seconds = [[line["seconds"] for line in lines if line["S"] == s] for s in steps]
    time_row = ["time for one", *(duration(sum(x) / len(x)) for x in seconds)]
    return [["S", *map(str, steps)], *rows, time_row]


def _axes(lines: Iterable[Line]) -> tuple[list[int], list[Eta]]:
    steps = sorted({line["S"] for line in lines})
    etas = {line["eta"] for line in lines}
    return steps, sorted(etas, key=lambda eta: float("inf") if eta == "sigma_hat" else eta)


def _notes(name: str, lines: list[dict[str, Any]], theirs: Mapping) -> list[str]:
    """What must be read with the numbers."""
    measure = lines[0]["measures"][name]
    notes = ["Lower is better."]
    if theirs and name == "fid":
        notes.append("In brackets: the FID the paper reports, with N = 50000.")
    elif theirs:
        notes.append(
            "In brackets: the FID the paper reports. It is another distance than "
            f"{TITLES[name]}: compare the order of the methods, never the numbers."
        )
    if warning := few_samples_warning(lines[0]["num_samples"], measure["dim"]):
        notes.append(f"Warning: {warning}")
    return notes


def protocol(lines: list[dict[str, Any]]) -> str:
    """Everything the numbers depend on, in a sentence or two."""
    line = lines[0]
    weights = line["weights"]
    made = [
        f"{TITLES[name]}: {m['dim']} {m['features']} features, network {m['network_hash'][:12]}, "
        f"statistics {m['statistics_hash'][:12]} of {m['statistics_num_samples'] or '?'} images of "
        f"{m['statistics_of'].get('name', 'unnamed data')}"
        for name, m in line["measures"].items()
    ]
    return (
        f"N = {line['num_samples']} samples, {line['spacing']} sub-sequence, {weights['kind']} "
        f"weights {weights['hash'][:12]} of step {weights['step']}, seed {line['seed']}, pixels "
        f"rounded to {line['rounding']}, batches of {line['batch_size']}. {'. '.join(made)}. "
        f"{line['device']}; "
        + ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        + "."
    )


def markdown_section(
    name: str, lines: list[dict[str, Any]], theirs: Mapping[tuple[int, Eta], float]
) -> str:
    """Heading, table and notes of one distance."""
    head, *rows = _table(name, lines, theirs)
    table = [head, ["---"] * len(head), *rows]
    return "\n".join(
        [
            f"## {TITLES[name]}\n",
            *("| " + " | ".join(row) + " |" for row in table),
            "",
            " ".join(_notes(name, lines, theirs)),
            "",
        ]
    )


def _plots(
    name: str, lines: list[dict[str, Any]], theirs: Mapping[tuple[int, Eta], float]
) -> tuple[str, str]:
    """Distance against S and against seconds, as SVG that suits a light and a dark page."""
    grey = "#888888"
    style: dict[Any, Any] = {
        "svg.hashsalt": "ddim_jax",
        **{f"{part}.color": grey for part in ("text", "xtick", "ytick")},
        **{f"axes.{part}": grey for part in ("edgecolor", "labelcolor")},
        "axes.prop_cycle": cycler.cycler(
            color=["#2f81f7", "#3fb950", "#d29922", "#f0663f", "#a371f7", "#39c5cf"]
        ),
    }
    with plt.rc_context(style):
        return (
            _plot(name, lines, "S", "steps S", theirs if name == "fid" else {}),
            _plot(name, lines, "seconds", f"seconds for N = {lines[0]['num_samples']}", {}),
        )


def _plot(name: str, lines, key: Literal["S", "seconds"], label: str, theirs) -> str:
    """One line for each eta; the paper's are dotted."""
    figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
    steps, etas = _axes(lines)
    for eta in etas:
        cells = sorted((x for x in lines if x["eta"] == eta), key=lambda x: x["S"])
        values = [x["distances"][name] for x in cells]
        (ours,) = axes.plot([x[key] for x in cells], values, ".-", label=method_name(eta))
        if paper := [(s, theirs[s, eta]) for s in steps if (s, eta) in theirs]:
            axes.plot(*zip(*paper, strict=True), ":", color=ours.get_color())
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=TITLES[name])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    if key == "S":
        axes.set_xticks(steps, [str(s) for s in steps])
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
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


def _html(out: pathlib.Path, lines: list[dict[str, Any]], theirs: Mapping) -> str:
    """The whole report as one page without any other file."""
    names = list(lines[0]["distances"])
    body = []
    for name in names:
        body += [
            f"<h2>{TITLES[name]}</h2>",
            _html_table(name, lines, theirs),
            *(f'<p class="note">{html.escape(note)}</p>' for note in _notes(name, lines, theirs)),
            '<div class="plots">',
            *(_inline_svg(x, f"{name}{i}") for i, x in enumerate(_plots(name, lines, theirs))),
            "</div>",
        ]
    body += [
        "<h2>Samples</h2>",
        '<p class="note">The same latents in every cell: at eta = 0 images stay as S grows.</p>',
        *_html_samples(out, lines),
        "<h2>Protocol</h2>",
        f'<p class="note">{html.escape(protocol(lines))}</p>',
    ]
    title = f"Distance over steps and eta, N = {lines[0]['num_samples']}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(name: str, lines, theirs) -> str:
    head, *rows = _table(name, lines, theirs)
    best = {
        str(s): min((x for x in lines if x["S"] == s), key=lambda x: x["distances"][name])["eta"]
        for s in _axes(lines)[0]
    }

    def cell(text: str, row: str, column: str) -> str:
        bold = column in best and row == method_name(best[column])
        return f'<td class="best">{text}</td>' if bold else f"<td>{html.escape(text)}</td>"

    return "\n".join(
        [
            '<div class="scroll"><table>',
            f"<thead><tr>{''.join(f'<th>{text}</th>' for text in head)}</tr></thead><tbody>",
            *(
                f"<tr>{''.join(cell(t, row[0], s) for t, s in zip(row, head, strict=True))}</tr>"
                for row in rows
            ),
            "</tbody></table></div>",
        ]
    )


def _html_samples(out: pathlib.Path, lines: list[dict[str, Any]]) -> Iterable[str]:
    """One row of pictures for each S."""
    steps, etas = _axes(lines)
    for num_steps in steps:
        yield f'<h3>S = {num_steps}</h3><div class="cells">'
        for eta in etas:
            path = out / "samples" / f"{cell_name(num_steps, eta)}.png"
            if path.exists():
                data = base64.b64encode(path.read_bytes()).decode()
                name = method_name(eta)
                yield (
                    f'<figure><img alt="samples, S = {num_steps}, {name}" '
                    f'src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
                )
        yield "</div>"


def _inline_svg(svg: str, prefix: str) -> str:
    """The picture without its XML head, its ids made unique within the page."""
    svg = svg[svg.index("<svg") :]
    return (
        svg.replace('id="', f'id="{prefix}_')
        .replace('"#', f'"#{prefix}_')
        .replace("url(#", f"url(#{prefix}_")
    )


if __name__ == "__main__":
    cli.run(main, ReportConfig)
