"""The paper's claim on a laptop: few DDIM steps give better samples than few DDPM steps.

Trains the digits preset (or takes the model that is there), samples it over numbers of steps and
over eta, and measures how far the samples are from the real digits, by a classifier's features and
by the pixels themselves.

    python experiments/demo.py --out out/demo
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import fid_sweep
import jax
import jax.numpy as jnp
import make_statistics
import matplotlib.pyplot as plt
import numpy as np
import train
import train_classifier
from common import cli, figures
from common.measures import check_seeds
from common.sweep_seeds import Line, Lines, over_seeds
from common.sweep_store import read_results
from common.sweep_table import (
    markdown_section,
    protocol,
    row_of,
    rows_of,
    scores,
    steps_of,
)
from matplotlib import ticker
from presets import PRESETS

from ddim_jax.data.load import load_images
from ddim_jax.data.stream import sequential_batches
from ddim_jax.files import read_json, write_whole
from ddim_jax.keys import initial_noise, seed_key
from ddim_jax.metrics.features import CLASSIFIER_FILE, FeatureName, FeatureNetwork, network_of
from ddim_jax.metrics.frechet import frechet_distance_from_features, frechet_metric
from ddim_jax.metrics.metric import column_name
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
from ddim_jax.runs.folder import saved_steps
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import ddim_or_sigma_hat, sample_trajectory

BATCH = 128
PICTURE_BATCH = 8
"""Images drawn at once for the pictures."""
NUM_JUDGED = 256
"""Samples whose classes the classifier is asked for."""
TRAIN_STEPS, NUM_SAMPLES = 5000, 512
NUM_SPLITS = 20
"""Random splits of the real digits behind the floor."""
Drawer = Callable[[int, float], np.ndarray]
"""(num_images, eta) -> uint8 images."""


class Floor(NamedTuple):
    """The distance of real images from each other, over random splits."""

    mean: float
    spread: float
    """Standard deviation."""
    small: int
    """Images in the one part."""
    large: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train on handwritten digits, sample, compare."""

    out: Folder = "out/demo"
    """Where the model, the pictures and the table go."""
    steps: tuple[int, ...] = (5, 10, 20, 50)
    """Numbers of sampling steps S."""
    num_samples: int = option(NUM_SAMPLES, at_least=2)
    """Samples behind each number of the table, of each seed."""
    train_steps: int = option(TRAIN_STEPS, at_least=1)
    """Updates of the training run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first is of the training and the pictures too; the table has mean and spread of all."""


def main(config: DemoConfig) -> None:
    """Train, sample, measure, draw."""
    check_limits(config)
    check_seeds(config.seeds)
    started = time.monotonic()
    out = pathlib.Path(config.out)
    _check_same(out, config)
    recipe = dataclasses.replace(
        PRESETS["digits"][1],
        workdir=str(out / "model"),
        max_steps=config.train_steps,
        seed=config.seeds[0],
    )
    gflops = _yardstick()
    print(
        f"a fixed matrix product: {gflops:.0f} GFLOP/s; training first, then sampling", flush=True
    )
    train.main(recipe)
    trained = time.monotonic() - started
    stats = {features: _statistics(out, features) for features in ("classifier", "pixels")}
    fid_sweep.main(
        fid_sweep.SweepConfig(
            workdir=recipe.workdir,
            stats=tuple(stats.values()),
            out=str(out / "sweep"),
            steps=config.steps,
            etas=(0.0, 0.5, 1.0, "sigma_hat"),
            spacing="uniform",
            num_samples=config.num_samples,
            seeds=config.seeds,
            batch_size=BATCH,
        )
    )
    measured = time.monotonic() - started
    timing = (
        f"In the last call training took {trained:.0f} s, all but pictures {measured:.0f} s, on "
        f"{os.cpu_count()} CPU cores that multiply two fixed matrices of float32 at "
        f"{gflops:.0f} GFLOP/s."
    )
    _draw_everything(out, load_trained(recipe.workdir), config, stats, timing)
    print(f"{time.monotonic() - started:.0f} s in all; see {out / 'README.md'}")


def _check_same(out: pathlib.Path, config: DemoConfig) -> None:
    """Raise ValueError, before anything is computed, for another demo than the one in `out`."""
    there = {}
    if (sweep := out / "sweep" / "sweep.json").exists():
        there["num_samples"] = read_json(sweep).get("num_samples")
    if (steps := saved_steps(out / "model")) and max(steps) > config.train_steps:
        there["train_steps"] = max(steps)
    for name, value in there.items():
        if value != (wanted := getattr(config, name)):
            raise ValueError(
                f"{name} must be that of the demo in {out}, {value}; got {wanted}. Give another "
                "folder."
            )


def _draw_everything(
    out: pathlib.Path, run: Run, config: DemoConfig, stats: Mapping[str, str], timing: str
) -> None:
    """The pictures, and the README that shows them."""
    draw = {s: _drawer(run, s, config.seeds[0]) for s in config.steps}
    real, held_out = _digits("train"), _digits("test")
    networks = {features: network_of(features, None, path) for features, path in stats.items()}
    column = frechet_metric().numbers[0]
    floors = {
        column_name(column, features): _floor(np.asarray(network(real)), config.num_samples)
        for features, network in networks.items()
    }
    lines = read_results(out / "sweep")
    most = max(config.steps)
    samples = draw[most](NUM_JUDGED, 0.0)
    sure = {
        "real digits it never saw": _confidence(networks["classifier"], held_out),
        "those it was trained on": _confidence(networks["classifier"], real),
        f"DDIM samples of S = {most}": _confidence(networks["classifier"], samples),
    }
    _plot_distances(out / "distance.png", lines, floors)
    _draw_real_beside_samples(out / "real_and_samples.png", real[:64], samples[:64], most)
    _draw_consistency(out / "consistency.png", draw)
    _draw_denoising(out / "denoising.png", run, config.seeds[0])
    write_whole(out / "README.md", _report(lines, floors, sure, timing).encode())


def _digits(split: str) -> np.ndarray:
    images = load_images("digits", split=split)
    return np.concatenate([batch["image"] for batch in sequential_batches(images, 1024)])


def _confidence(classifier: FeatureNetwork, images: np.ndarray) -> float:
    """Mean probability that the classifier gives to the class it takes an image for."""
    logits = classifier.apply_fn(classifier.params, images)["logits"]
    return float(jax.nn.softmax(logits).max(axis=-1).mean())


def _floor(features: np.ndarray, num_samples: int) -> Floor:
    """How far real images are from each other: two random parts of them, many times.

    A distance has a bias of about 1 / (size of the one) + 1 / (size of the other), so the parts
    have the sizes at which theirs is that of the samples against all, or are halves.
    """
    total, rng = len(features), np.random.default_rng(0)
    product = total / (1 / num_samples + 1 / total)  # small * (total - small), if it can be
    small = round((total - max(total**2 - 4 * product, 0) ** 0.5) / 2)
    distances = []
    for _ in range(NUM_SPLITS):
        order = rng.permutation(total)
        parts = features[order[:small]], features[order[small:]]
        distances.append(float(frechet_distance_from_features(*parts)))
    return Floor(float(np.mean(distances)), float(np.std(distances, ddof=1)), small, total - small)


def _yardstick() -> float:
    """GFLOP/s of a product of two 1024 x 1024 matrices of float32, the best of ten."""
    a = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(11):  # the first compiles
        started = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds[1:]) / 1e9


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


def _plot_distances(path: pathlib.Path, lines: Lines, floors: Mapping[str, Floor]) -> None:
    """Distance against S, one panel for each kind of feature; bars are the spread of the seeds."""
    names, cells = scores(lines), over_seeds(lines)
    figure, panels = plt.subplots(1, len(names), figsize=(9.5, 4.2), layout="constrained")
    for axes, name in zip(panels, names, strict=True):
        for row, title in rows_of(lines).items():
            own = [x for x in cells if row_of(x) == row]
            steps, values = [x["S"] for x in own], [x["values"][name] for x in own]
            spread = [x["spread"].get(name, 0.0) for x in own]
            axes.errorbar(steps, values, spread, marker="o", markersize=4, capsize=3, label=title)
        mean, spread, *_ = floors[name]
        axes.axhspan(mean - spread, mean + spread, color="grey", alpha=0.15, linewidth=0)
        axes.axhline(mean, color="grey", linestyle=":", label="real digits among themselves")
        axes.set(xscale="log", yscale="log", xlabel="sampling steps S", title=name)
        axes.set_xticks(steps, [str(s) for s in steps])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figures.save(figure, path)


def _draw_real_beside_samples(
    path: pathlib.Path, real: np.ndarray, samples: np.ndarray, num_steps: int
) -> None:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.4, 4.2), layout="constrained", gridspec_kw={"wspace": 0.06}
    )
    for axes, images, title in (
        (left, real, "real digits"),
        (right, samples, f"DDIM samples, S = {num_steps}, eta = 0"),
    ):
        figures.show_images(axes, images.reshape(8, 8, *images.shape[1:]), title=title)
    figures.save(figure, path)


def _draw_consistency(path: pathlib.Path, draw: dict[int, Drawer]) -> None:
    """Each row one x_T, each column one S: DDIM left, DDPM right (section 5.2)."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 6.4), layout="constrained")
    for axes, (title, eta) in zip(panels, (("DDIM", 0.0), ("DDPM", 1.0)), strict=True):
        figures.show_images(
            axes,
            np.stack([drawer(8, eta) for drawer in draw.values()], axis=1),
            columns=[f"S = {num_steps}" for num_steps in draw],
            title=f"{title}, eta = {eta:g}: each row from one x_T",
        )
    figures.save(figure, path)


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
    # (states or predictions, step, image, ...) -> (image and states or predictions, step, ...)
    both = checked_images(to_pixels(jnp.stack([states[:-1][shown], x0s[shown]])))
    rows = both.transpose(2, 0, 1, 3, 4, 5).reshape(8, 10, *both.shape[3:])
    figure, axes = plt.subplots(figsize=(8, 6.6), layout="constrained")
    figures.show_images(
        axes,
        rows,
        rows=["x_t", "x0_hat"] * 4,
        columns=[f"t={t}" for t in timesteps[shown]],
        title="denoising in 50 steps: the state, and the image that the network sees in it",
    )
    figures.save(figure, path)


def _who_is_ahead(lines: Lines) -> str:
    """Where DDIM has the smallest distance, where another has, and by how much of the spread."""
    titles, pooled, sentences = rows_of(lines), over_seeds(lines), []
    for name in scores(lines):
        nearest, close, before_ddpm, clauses = [], [], [], []
        for num_steps in steps_of(lines):
            cells = [x for x in pooled if x["S"] == num_steps]
            plain = next(x for x in cells if x["eta"] == 0)
            best = min((x for x in cells if x is not plain), key=lambda x: x["values"][name])
            gap, spread = _gap(name, plain, best)
            if abs(gap) < 1e-3 * plain["values"][name]:
                clauses.append(f"at S = {num_steps} {titles[row_of(best)]} is as near")
            elif gap > 0:
                nearest.append(num_steps)
                close += [num_steps] if spread is not None and gap <= spread else []
            else:
                clauses.append(
                    f"at S = {num_steps} {titles[row_of(best)]} is, by {-gap:.2g}"
                    f"{_of_the_spread(-gap, spread)}"
                )
            for ddpm in (x for x in cells if x["eta"] == 1):
                gap, spread = _gap(name, plain, ddpm)
                before_ddpm += [num_steps] if spread is not None and gap > spread else []
        first = f"DDIM is nearest at S = {_listed(nearest)}" if nearest else "DDIM is never nearest"
        if close:
            where = "" if close == nearest else f" at S = {_listed(close)}"
            first += f",{where} by less than the seeds' spread"
        if before_ddpm:
            clauses.append(
                f"of DDPM it is ahead by more than the spread at S = {_listed(before_ddpm)}"
            )
        sentences.append(f"By {name} {'; '.join([first, *clauses])}.")
    if len({line["seed"] for line in lines}) == 1:
        sentences.append("Of one seed nobody knows how much is chance.")
    return " ".join(sentences)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _gap(name: str, one: Line, other: Line) -> tuple[float, float | None]:
    """By how much the other is farther, and the spread of both; None of one seed."""
    gap = other["values"][name] - one["values"][name]
    if not (one["spread"] and other["spread"]):
        return gap, None
    return gap, (one["spread"][name] ** 2 + other["spread"][name] ** 2) ** 0.5


def _of_the_spread(gap: float, spread: float | None) -> str:
    if spread is None:
        return ""
    return f", {'within' if gap <= spread else 'beyond'} the seeds' spread of {spread:.2g}"


def _report(
    lines: Lines, floors: Mapping[str, Floor], sure: Mapping[str, float], timing: str
) -> str:
    tables = "\n".join(markdown_section(name, lines, {}) for name in scores(lines))
    apart = ", ".join(f"{x.mean:.3g} ± {x.spread:.2g} by {name}" for name, x in floors.items())
    small, large = next(iter(floors.values()))[2:]
    judged = ", ".join(f"{value:.3f} for {name}" for name, value in sure.items())
    return f"""# DDIM on handwritten digits

{_who_is_ahead(lines)}

Real digits are from each other {apart} (mean and standard
deviation of {NUM_SPLITS} random splits into {small} and {large}, which have about the bias of these
samples against all): no sampler can be much nearer, and what is within this has no order.

{tables}
{protocol(lines)}

The classifier's mean confidence is {judged}.

![distance against steps](distance.png)

![real digits and samples](real_and_samples.png)

DDIM draws the same digit whatever S is; DDPM draws another each time:

![consistency](consistency.png)

![denoising](denoising.png)

sweep/report.html shows every cell of the tables; the model is in model/.

{timing}
"""


if __name__ == "__main__":
    cli.run(main, DemoConfig)
