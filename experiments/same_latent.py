"""The same x_T drawn in few and in many steps: DDIM keeps the image, DDPM does not (section 5.2).

python experiments/same_latent.py --workdir runs/digits
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from common import cli, figures
from common.options import DrawOptions, ModelOptions, SpacingOptions
from common.progress import Progress
from common.results import write_results
from jaxtyping import Float, UInt8

from ddim_jax.keys import seed_key
from ddim_jax.metrics.classifier import TrainedClassifier, apply_classifier, load_classifier
from ddim_jax.paths import File, Folder
from ddim_jax.runs import DrawInputs, Run, draw_images, image_program
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import Sampler, ddim, ddpm
from ddim_jax.steps import Variance

METHODS = ("DDIM", "DDPM")

NUM_SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SameLatentConfig(DrawOptions, SpacingOptions, ModelOptions):
    """How far an image drawn in S steps is from the one drawn in the most steps."""

    out: Folder = "out/same_latent"
    """Where same_latent.png and results.json go."""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200, 500, 1000)
    """Numbers of steps S; distances are to the images of the largest."""
    num_images: int = option(16, at_least=1, below=10_001)
    """Latents x_T behind each number."""
    variance: Variance = "fixed_small"
    """DDPM's: fixed_small is eta = 1, fixed_large its larger one."""
    classifier: File | None = None
    """Also measure in the features of this classifier (train_classifier.py)."""


def main(config: SameLatentConfig) -> None:
    """Draw, measure, plot."""
    check_limits(config)
    steps = sorted(set(config.steps))
    if len(steps) < 2:
        raise ValueError(f"steps must name at least two numbers of steps; got {config.steps}.")
    if config.classifier is not None and not pathlib.Path(config.classifier).is_file():
        raise ValueError(f"classifier must be a file; got {config.classifier}.")
    classifier = None if config.classifier is None else load_classifier(config.classifier)
    run = config.load()
    images = _draw_images(run, steps, config)

    distances = {
        method: {"pixels": [pixel_distance(x, drawn[-1]) for x in drawn]}
        | ({"features": _feature_distances(drawn, classifier)} if classifier else {})
        for method, drawn in images.items()
    }
    print(_table(steps, distances))
    print(
        f"\nRoot mean squared difference of pixels on [0, 1] to the image of S = {steps[-1]}, mean "
        f"over {config.num_images} latents; eta = 0 and {_ddpm(config)}, {run.weights_called}, "
        f"seed {config.seed}, run {run.fingerprint_id}."
    )
    out = pathlib.Path(config.out)
    write_results(out, config, {"S": steps, "distances": distances}, run)
    ddpm_row = "eta = 1" if config.variance == "fixed_small" else "fixed_large"
    titles = {"DDIM": "DDIM, eta = 0", "DDPM": f"DDPM, {ddpm_row}"}
    _draw(out / "same_latent.png", steps, images, distances, titles)
    print(f"see {out / 'same_latent.png'}")


def _draw_images(
    run: Run, steps: list[int], config: SameLatentConfig
) -> dict[str, UInt8[np.ndarray, "S N H W C"]]:
    """Method -> images; one program for each S serves both methods, unless DDPM is of its own."""
    samplers: dict[str, tuple[Callable[..., Sampler], tuple[float, ...]]]
    samplers = {"DDIM": (ddim, (0.0,)), "DDPM": (ddim, (1.0,))}
    if config.variance == "fixed_large":
        samplers["DDPM"] = (functools.partial(ddpm, "fixed_large"), ())
    grids = [run.spec.timesteps(s, config.spacing) for s in steps]
    images: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    calls = len(samplers) * config.num_images * sum(map(len, grids))
    with Progress("same_latent.py", calls, "network calls") as progress:
        for timesteps in grids:
            made = {make for make, _ in samplers.values()}
            programs = {make: image_program(run.spec, timesteps, make) for make in made}
            for method, (make, values) in samplers.items():
                drawn = draw_images(
                    programs[make],
                    DrawInputs(run.params, seed_key(config.seed), values),
                    config.num_images,
                    config.batch_size,
                    on_rows=lambda rows: progress.add(rows * timesteps.size),  # noqa: B023
                )
                images[method].append(drawn)
    return {method: np.stack(drawn) for method, drawn in images.items()}


def _ddpm(config: SameLatentConfig) -> str:
    """The row DDPM, and whether the predictions of both are clipped."""
    row = "1" if config.variance == "fixed_small" else "DDPM with fixed_large"
    return f"{row}, x0 clipped" if config.clip_x0 else row


def pixel_distance(a: UInt8[np.ndarray, "N H W C"], b: UInt8[np.ndarray, "N H W C"]) -> float:
    """Root mean squared difference of the pixels on [0, 1] of each pair, mean over pairs."""
    difference = (a.astype(np.float64) - b) / 255
    return float(np.sqrt((difference**2).mean(axis=(1, 2, 3))).mean())


def _feature_distances(
    drawn: UInt8[np.ndarray, "S N H W C"], classifier: TrainedClassifier
) -> list[float]:
    """Euclidean distance of each pair's features, mean over pairs."""
    features: list[Float[np.ndarray, "N D"]] = [
        np.asarray(apply_classifier(classifier.model, classifier.params, images).features)
        for images in drawn
    ]
    return [float(np.linalg.norm(f - features[-1], axis=-1).mean()) for f in features]


def _table(steps: list[int], distances) -> str:
    """Markdown: distances over S, and how many times smaller DDIM's are."""
    lines = ["| S | " + " | ".join(map(str, steps[:-1])) + " |", "|---" * len(steps) + "|"]
    for measure in distances["DDIM"]:
        for method in METHODS:
            values = [f"{d:.4f}" for d in distances[method][measure][:-1]]
            lines.append(f"| {method}, {measure} | " + " | ".join(values) + " |")
        pairs = zip(distances["DDPM"][measure], distances["DDIM"][measure], strict=True)
        ratios = [f"{b / a:.1f}" if a > 0 else "-" for b, a in list(pairs)[:-1]]
        lines.append(f"| ratio, {measure} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def _draw(path: pathlib.Path, steps: list[int], images, distances, titles) -> None:
    """One row is one x_T, one column one S; right the distances."""
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 3.5), width_ratios=(1.15, 1.15, 1), layout="constrained"
    )
    for method, grid_axes in zip(METHODS, axes, strict=False):
        figures.show_images(
            grid_axes,
            images[method][:, :NUM_SHOWN].swapaxes(0, 1),
            columns=[f"S={s}" for s in steps],
            title=f"{titles[method]}: each row from one x_T",
        )
        axes[2].plot(steps[:-1], distances[method]["pixels"][:-1], marker="o", label=method)
    axes[2].set(yscale="log", ylabel="root mean squared difference on [0, 1]")
    axes[2].set_title(f"distance to the image of S = {steps[-1]}", fontsize=10)
    figures.count_axis(axes[2], steps[:-1], "sampling steps S")
    axes[2].legend()
    figures.save(figure, path)


if __name__ == "__main__":
    cli.run(main, SameLatentConfig)
