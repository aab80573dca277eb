"""How a training run goes: its losses and, with --fid-every, the distance of its samples.

python experiments/training_report.py runs/cifar10     # from runs/cifar10/metrics.jsonl, any time

Beside the FID of CIFAR-10 stands the curve that is published for DDPM's recipe.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import tyro
from common import cli, figures
from matplotlib.axes import Axes

from ddim_jax.files import parsed, write_whole
from ddim_jax.paths import Folder, local_path
from ddim_jax.runs import read_config
from ddim_jax.runs.measure import PROTOCOL

PUBLISHED = {46_800: 9.16, 93_600: 5.78, 187_000: 4.08, 421_000: 3.31, 796_000: 3.19}
"""Updates -> the FID published for DDPM's recipe on CIFAR-10."""

NOT_DISTANCES = frozenset(
    {"step", "num_samples", "num_sample_steps", "held_out_loss", "num_held_out", PROTOCOL}
)

Line = Mapping[str, Any]
"""One of metrics.jsonl."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report of one training run."""

    workdir: Annotated[Folder, tyro.conf.Positional]
    """The run's folder."""
    out: Folder | None = None
    """Where training.md and training.png go; the run's folder if not given."""


def main(config: ReportConfig) -> None:
    """Write training.md and training.png."""
    workdir = local_path(config.workdir, "workdir")
    settings = read_config(workdir)
    lines = read_lines(workdir / "metrics.jsonl")
    out = workdir if config.out is None else pathlib.Path(config.out)
    published = PUBLISHED if _is_cifar10(settings) else {}
    report = _report(workdir, settings, lines, published)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "training.md", report.encode())
    _draw(out / "training.png", lines, published)
    print(f"{report}\nsee {out / 'training.md'} and {out / 'training.png'}")


def read_lines(path: pathlib.Path) -> list[Line]:
    """What a run said, in order; a line that is being written now is left out.

    Raises ValueError where there is nothing, or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; train.py writes it. Give the folder of a run.")
    try:
        text = path.read_text()
        lines = [parsed(x) for x in text.splitlines(keepends=True) if x.endswith("\n")]
        ordered = sorted(lines, key=lambda line: line["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a damaged line ({error}); delete that line.") from error
    if not ordered:
        raise ValueError(f"{path} has no line yet; train for log_every updates first.")
    return ordered


def _is_cifar10(settings: Mapping[str, Any]) -> bool:
    return str(settings.get("data", "")).partition(":")[0] == "cifar10"


class Curve(NamedTuple):
    """Numbers of one kind, measured in one way all along."""

    column: str
    """What metrics.jsonl calls them."""
    said: str
    """What they are of, in words."""
    values: Mapping[int, float]
    """By step."""


def distances_of(lines: Sequence[Line]) -> list[Curve]:
    """What --fid-every measured: a curve for each statistics, number of samples and S."""

    def said(line: Line) -> str:
        against = line.get(PROTOCOL, {}).get("statistics")
        return (
            f"{line['num_samples']} samples in {line['num_sample_steps']} steps of DDIM"
            f"{f' against statistics {against[:12]}' if against else ''}"
        )

    measured = [line for line in lines if "num_samples" in line]
    return _curves(measured, lambda line: line.keys() - NOT_DISTANCES, said)


def held_out_of(lines: Sequence[Line]) -> list[Curve]:
    """The losses of images that are not trained on: a curve for each set of them."""

    def said(line: Line) -> str:
        of = line.get(PROTOCOL, {}).get("held_out")
        return f"{line['num_held_out']} images{f' ({of[:19]})' if of else ''}"

    measured = [line for line in lines if "num_held_out" in line]
    return _curves(measured, lambda line: {"held_out_loss"}, said)


def _curves(
    lines: Sequence[Line],
    columns: Callable[[Line], Collection[str]],
    said: Callable[[Line], str],
) -> list[Curve]:
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        for column in sorted(columns(line)):
            curve = found.setdefault((column, said(line)), {})
            if line[column] is not None:
                curve[line["step"]] = line[column]
    return [Curve(column, of, values) for (column, of), values in found.items()]


def _names(curves: Sequence[Curve]) -> list[str]:
    """What to call each: its column, and a number where several share one."""
    columns = [curve.column for curve in curves]
    return [
        column if columns.count(column) == 1 else f"{column} ({columns[:i].count(column) + 1})"
        for i, column in enumerate(columns)
    ]


def _series(lines: Sequence[Line], name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def _report(
    workdir: pathlib.Path,
    settings: Mapping[str, Any],
    lines: Sequence[Line],
    published: Mapping[int, float],
) -> str:
    """Markdown: what was measured at each step, the published numbers among them."""
    curves, losses = [*distances_of(lines), *held_out_of(lines)], _series(lines, "loss")
    beside = published if any(curve.column == "fid" for curve in curves) else {}
    # Without --fid-every the last losses are all there is.
    steps = sorted({*beside}.union(*(curve.values for curve in curves))) or [*losses][-10:]
    columns: dict[str, Mapping[int, float]] = {
        **{name: curve.values for name, curve in zip(_names(curves), curves, strict=True)},
        "loss": {s: _loss_near(losses, s) for s in steps if s <= lines[-1]["step"]},
        **({"published, DDPM's recipe": beside} if beside else {}),
    }
    head = ["step", *columns]
    rows = [[f"{s}", *(_number(x.get(s)) for x in columns.values())] for s in steps]
    return "\n".join(
        [
            f"# Training of {workdir.name}\n",
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            _conditions(settings, lines, beside),
            "",
        ]
    )


def _loss_near(losses: Mapping[int, float], step: int) -> float:
    """The loss of the last line up to the step, else NaN."""
    before = [s for s in losses if s <= step]
    return losses[max(before)] if before else float("nan")


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4g}"


def _conditions(settings: Mapping[str, Any], lines: Sequence[Line], beside: Mapping) -> str:
    parts = [
        f"Data {settings.get('data')}, batch {settings.get('batch_size')}, rate "
        f"{settings.get('learning_rate')}, average {settings.get('ema_decay')}; loss is the mean "
        "since the line before, of the weights in training, with dropout."
    ]
    distances, held_out = distances_of(lines), held_out_of(lines)
    for name, curve in zip(_names(distances), distances, strict=True):
        parts.append(f"{name} is of {curve.said}, averaged weights.")
    for name, curve in zip(_names(held_out), held_out, strict=True):
        parts.append(
            f"{name} is of {curve.said} that are not trained on, averaged weights, without dropout."
        )
    warnings = dict.fromkeys(
        warning for line in lines for warning in line.get(PROTOCOL, {}).get("warnings", ())
    )
    parts += [f"Warning: {warning}" for warning in warnings]
    if beside:
        parts.append(
            "The published curve is of DDPM's recipe on CIFAR-10. A distance of fewer samples than "
            "the 50,000 behind such numbers is higher by its bias, so that only the shapes compare."
        )
    elif _is_cifar10(settings):
        parts.append(
            "The curve published for DDPM's recipe is of FID, of Inception's features, which this "
            "run did not measure."
        )
    return "\n".join(parts)


def _draw(path: pathlib.Path, lines: Sequence[Line], published: Mapping[int, float]) -> None:
    """Left the losses; right the distance, where there is one."""
    distances, held_out = distances_of(lines), held_out_of(lines)
    figure, axes = plt.subplots(
        1, 2 if distances else 1, figsize=(10 if distances else 5, 3.6),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    left = axes[0, 0]
    losses = _series(lines, "loss")
    left.plot(losses.keys(), losses.values(), label="loss in training")
    for name, curve in zip(_names(held_out), held_out, strict=True):
        label = f"held out, average{name.removeprefix('held_out_loss')}"
        left.plot(curve.values.keys(), curve.values.values(), marker="o", label=label)
    left.set(yscale="log", xlabel="updates", ylabel="loss")
    left.legend(fontsize=8)
    if distances:
        _draw_distances(axes[0, 1], distances, published)
    figures.save(figure, path)


def _draw_distances(axes: Axes, distances: Sequence[Curve], published: Mapping[int, float]) -> None:
    for name, curve in zip(_names(distances), distances, strict=True):
        label = "this run" if len(distances) == 1 else f"this run, {name}"
        axes.plot([*curve.values], [*curve.values.values()], marker="o", label=label)
    columns = dict.fromkeys(curve.column for curve in distances)
    if published and "fid" in columns:
        axes.plot(
            [*published.keys()],
            [*published.values()],
            marker="s",
            color="grey",
            linestyle=":",
            label="published for DDPM's recipe",
        )
        axes.set_xscale("log")
    axes.set(yscale="log", xlabel="updates", ylabel=" and ".join(columns))
    axes.legend(fontsize=8)


if __name__ == "__main__":
    cli.run(main, ReportConfig)
