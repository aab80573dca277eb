"""The paper's claim on a laptop: few DDIM steps give better samples than few DDPM steps.

Trains the digits preset (or takes the model that is there), samples it over numbers of steps and
over eta, and measures how far the samples are from the real digits, by a classifier's features and
by the pixels themselves.

    python experiments/demo.py --out out/demo
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import fid_sweep
import jax
import jax.numpy as jnp
import make_statistics
import matplotlib
import numpy as np
import train
import train_classifier
from common import cli, pictures
from common.sweep_store import read_results
from common.sweep_table import markdown_section, protocol, row_of, rows_of, scores
from presets import PRESETS

from ddim_jax.checks import NUM_SEEDS
from ddim_jax.data.load import load_images
from ddim_jax.data.pixels import to_model_range
from ddim_jax.data.stream import sequential_batches
from ddim_jax.keys import initial_noise, seed_key
from ddim_jax.metrics.features import CLASSIFIER_FILE, FeatureName
from ddim_jax.metrics.frechet import frechet_distance_from_features
from ddim_jax.paths import Folder
from ddim_jax.runs import (
    DrawInputs,
    Run,
    checked_images,
    draw_images,
    image_program,
    load_trained,
    to_pixels,
)
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import ddim_or_sigma_hat, sample_trajectory

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

BATCH = 112
PICTURE_BATCH = 8
"""Images drawn at once for the pictures, which show 8 or 64."""
Drawer = Callable[[int, float], np.ndarray]
"""(num_images, eta) -> uint8 images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train on handwritten digits, sample, compare."""

    out: Folder = "out/demo"
    """Where the model, the pictures and the table go."""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Numbers of sampling steps S."""
    num_samples: int = option(448, at_least=2)
    """Samples behind each number of the table."""
    train_steps: int = option(1200, at_least=1)
    """Updates of the training run."""
    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Of everything."""


def main(config: DemoConfig) -> None:
    """Train, sample, measure, draw."""
    check_limits(config)
    started = time.monotonic()
    out = pathlib.Path(config.out)
    recipe = dataclasses.replace(
        PRESETS["digits"][1],
        workdir=str(out / "model"),
        max_steps=config.train_steps,
        seed=config.seed,
    )
    train.main(recipe)
    stats = [_statistics(out, features) for features in ("classifier", "pixels")]
    fid_sweep.main(
        fid_sweep.SweepConfig(
            workdir=recipe.workdir,
            stats=tuple(stats),
            out=str(out / "sweep"),
            steps=config.steps,
            etas=(0.0, 0.5, 1.0, "sigma_hat"),
            spacing="uniform",
            num_samples=config.num_samples,
            seed=config.seed,
            batch_size=BATCH,
        )
    )

    _draw_everything(out, load_trained(recipe.workdir), config)
    print(f"{time.monotonic() - started:.0f} s in all; see {out / 'README.md'}")


def _draw_everything(out: pathlib.Path, run: Run, config: DemoConfig) -> None:
    """The pictures, and the README that shows them."""
    draw = {num_steps: _drawer(run, num_steps, config.seed) for num_steps in config.steps}
    real = np.concatenate([b["image"] for b in sequential_batches(load_images("digits"), 1024)])
    floor = _pixel_distance(real[::2], real[1::2])
    lines = read_results(out / "sweep")
    _plot_distances(out / "distance.png", lines, floor)
    _draw_real_beside_samples(out / "real_and_samples.png", real[:64], draw[max(config.steps)])
    _draw_consistency(out / "consistency.png", draw)
    _draw_denoising(out / "denoising.png", run, config.seed)
    (out / "README.md").write_text(_report(lines, floor))


def _statistics(out: pathlib.Path, features: FeatureName) -> str:
    """The file with the statistics of all digits, and beside it the classifier if it needs one."""
    path = out / "classifier" / f"{features}.npz"
    if features == "classifier" and not (path.parent / CLASSIFIER_FILE).exists():
        settings = train_classifier.PRESETS["digits"][1]
        train_classifier.main(dataclasses.replace(settings, out=str(path.parent)))
    make_statistics.main(
        make_statistics.StatisticsConfig(data="digits", out=str(path), features=features)
    )
    return str(path)


def _drawer(run: Run, num_steps: int, seed: int) -> Drawer:
    """Draws in so many steps; one compiled program serves every eta."""
    program = image_program(run.spec, run.spec.timesteps(num_steps, "uniform"), ddim_or_sigma_hat)

    def draw(num_images: int, eta: float) -> np.ndarray:
        inputs = DrawInputs(run.params, seed_key(seed), (eta, False))
        return draw_images(program, inputs, num_images, PICTURE_BATCH)

    return draw


def _pixel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """What fd_pixels is between two sets of images."""
    flat = (to_model_range(x).reshape(len(x), -1) for x in (a, b))
    return frechet_distance_from_features(*map(np.asarray, flat))


def _plot_distances(path: pathlib.Path, lines: list[dict[str, Any]], floor: float) -> None:
    """Distance against S, one panel for each kind of feature."""
    names = scores(lines)
    figure, panels = plt.subplots(1, len(names), figsize=(9, 4), layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        for row, title in rows_of(lines).items():
            cells = [line for line in lines if row_of(line) == row]
            steps, values = zip(*((x["S"], x["values"][name]) for x in cells), strict=True)
            axes.plot(steps, values, marker="o", label=title)
        axes.set(xscale="log", yscale="log", xlabel="sampling steps S", ylabel=name)
        axes.set_xticks(steps, [str(s) for s in steps])
        if name == "fd_pixels":
            axes.axhline(floor, color="grey", linestyle=":", label="two halves of the real digits")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    panels[-1].legend()
    figure.suptitle("The same network, sampled in S steps")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_real_beside_samples(path: pathlib.Path, real: np.ndarray, draw: Drawer) -> None:
    """Real digits left, DDIM samples right."""
    _save_side_by_side(path, pictures.tile(real, 8), pictures.tile(draw(64, 0.0), 8))


def _draw_consistency(path: pathlib.Path, draw: dict[int, Drawer]) -> None:
    """Each row one x_T, each column one S: DDIM left, DDPM right (section 5.2)."""
    panels = []
    for eta in (0.0, 1.0):
        rows = np.stack([drawer(8, eta) for drawer in draw.values()], axis=1)
        panels.append(pictures.tile(rows.reshape(-1, *rows.shape[2:]), len(draw)))
    _save_side_by_side(path, *panels)


def _save_side_by_side(path: pathlib.Path, left: np.ndarray, right: np.ndarray) -> None:
    pictures.save_png(path, pictures.enlarge(pictures.beside(left, right), 560))


def _draw_denoising(path: pathlib.Path, run: Run, seed: int) -> None:
    """Rows in pairs: the state x_t, and x0_hat seen from it, at ten of 50 DDIM steps."""
    spec = run.spec
    x_T, _ = initial_noise(seed_key(seed), jnp.arange(4), spec.latent_shape)
    timesteps = spec.timesteps(50, "uniform")
    states, x0s = jax.jit(
        lambda params, x_T: sample_trajectory(
            None, spec.denoiser(params), spec.schedule, x_T, timesteps
        )
    )(run.params, x_T)
    shown = np.linspace(0, 49, 10).round().astype(int)
    # (states or predictions, step, image, ...) -> image, states or predictions, step
    both = checked_images(to_pixels(jnp.stack([states[:-1][shown], x0s[shown]])))
    rows = both.transpose(2, 0, 1, 3, 4, 5)
    pictures.save_png(
        path, pictures.enlarge(pictures.tile(rows.reshape(-1, *rows.shape[3:]), 10), 560)
    )


def _report(lines: list[dict[str, Any]], floor: float) -> str:
    tables = "\n".join(markdown_section(name, lines, {}) for name in scores(lines))
    return f"""# DDIM on handwritten digits

{tables}
{protocol(lines)} By fd_pixels the two halves of the real digits are
{floor:.3f} apart.

![distance against steps](distance.png)

Real digits left, DDIM samples right:

![real digits and samples](real_and_samples.png)

One row is one x_T, one column one S of the table. DDIM (left) draws the same digit whatever S is;
DDPM (right) draws another each time:

![consistency](consistency.png)

Denoising in 50 steps: x_t, and below it the network's x0_hat.

![denoising](denoising.png)

sweep/report.html shows every cell of the tables; the model is in model/.
"""


if __name__ == "__main__":
    cli.run(main, DemoConfig)
