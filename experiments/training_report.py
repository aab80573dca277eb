"""How a training run goes: its losses and, with --fid-every, the distance of its samples.

python experiments/training_report.py runs/cifar10     # from runs/cifar10/metrics.jsonl, any time

Beside the FID of CIFAR-10 stands the curve that is published for DDPM's recipe.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import matplotlib.pyplot as plt
import tyro
from common import cli, figures
from matplotlib.axes import Axes

from ddim_jax.files import parsed, write_whole
from ddim_jax.paths import Folder, local_path
from ddim_jax.runs import read_config

PUBLISHED = {46_800: 9.16, 93_600: 5.78, 187_000: 4.08, 421_000: 3.31, 796_000: 3.19}
"""Updates -> the FID published for DDPM's recipe on CIFAR-10."""

NOT_DISTANCES = frozenset({"num_samples", "num_sample_steps", "held_out_loss", "num_held_out"})

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


def distance_of(lines: Sequence[Line]) -> str | None:
    """The column that --fid-every measured last; None without one."""
    measured = [name for line in lines if "num_samples" in line for name in line.keys() - {"step"}]
    return next((name for name in reversed(measured) if name not in NOT_DISTANCES), None)


def _series(lines: Sequence[Line], name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def _report(
    workdir: pathlib.Path,
    settings: Mapping[str, Any],
    lines: Sequence[Line],
    published: Mapping[int, float],
) -> str:
    """Markdown: what was measured at each step, the published numbers among them."""
    column = distance_of(lines)
    beside = published if column == "fid" else {}
    ours = {} if column is None else _series(lines, column)
    held_out, losses = _series(lines, "held_out_loss"), _series(lines, "loss")
    # Without --fid-every the last losses are all there is.
    steps = sorted({*ours, *held_out, *beside}) or [*losses][-10:]
    columns: dict[str, Mapping[int, float]] = {
        **({column: ours} if column else {}),
        **({"held_out_loss": held_out} if held_out else {}),
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
            _conditions(settings, lines, column, beside),
            "",
        ]
    )


def _loss_near(losses: Mapping[int, float], step: int) -> float:
    """The loss of the last line up to the step, else NaN."""
    before = [s for s in losses if s <= step]
    return losses[max(before)] if before else float("nan")


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4g}"


def _conditions(
    settings: Mapping[str, Any], lines: Sequence[Line], column: str | None, beside: Mapping
) -> str:
    parts = [
        f"Data {settings.get('data')}, batch {settings.get('batch_size')}, rate "
        f"{settings.get('learning_rate')}, average {settings.get('ema_decay')}; loss is the mean "
        "since the line before, of the weights in training, with dropout."
    ]
    measured = [line for line in lines if "num_samples" in line]
    if column is not None:
        sizes = sorted({(x["num_samples"], x["num_sample_steps"]) for x in measured})
        said = " and ".join(f"{n} samples in {s} steps" for n, s in sizes)
        parts.append(f"{column} is of {said} of DDIM, averaged weights, against fid_stats.")
    held_out = sorted({x["num_held_out"] for x in lines if "num_held_out" in x})
    if held_out:
        said = " and ".join(map(str, held_out))
        parts.append(
            f"held_out_loss is of {said} images that are not trained on, averaged weights, without "
            "dropout."
        )
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
    column, held_out = distance_of(lines), _series(lines, "held_out_loss")
    figure, axes = plt.subplots(
        1, 1 if column is None else 2, figsize=(5 if column is None else 10, 3.6),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    left = axes[0, 0]
    losses = _series(lines, "loss")
    left.plot(losses.keys(), losses.values(), label="loss in training")
    if held_out:
        left.plot(held_out.keys(), held_out.values(), marker="o", label="held out, average")
    left.set(yscale="log", xlabel="updates", ylabel="loss")
    left.legend(fontsize=8)
    if column is not None:
        _draw_distance(axes[0, 1], column, _series(lines, column), published)
    figures.save(figure, path)


def _draw_distance(
    axes: Axes, column: str, ours: Mapping[int, float], published: Mapping[int, float]
) -> None:
    axes.plot([*ours.keys()], [*ours.values()], marker="o", label="this run")
    if published and column == "fid":
        axes.plot(
            [*published.keys()],
            [*published.values()],
            marker="s",
            color="grey",
            linestyle=":",
            label="published for DDPM's recipe",
        )
        axes.set_xscale("log")
    axes.set(yscale="log", xlabel="updates", ylabel=column)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    cli.run(main, ReportConfig)
