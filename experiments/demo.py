"""The paper's claim on a laptop: few DDIM steps give better samples than few DDPM steps.

Trains the digits preset (or takes the model that is there), samples it over numbers of steps and
over eta, and measures how far the samples are from the real digits.

    python experiments/demo.py --out out/demo
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import cli
import generate
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pictures
import train
from presets import PRESETS
from workdir import Trained, load_trained

from ddim_jax.data import load_images, sequential_batches, to_uint8
from ddim_jax.keys import initial_noise
from ddim_jax.metrics.frechet import frechet_distance_from_features
from ddim_jax.samplers import ddim, sample_trajectory
from ddim_jax.schedule import ddim_timesteps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS: dict[str, tuple[float, bool]] = {
    "eta = 0 (DDIM)": (0.0, False),
    "eta = 0.5": (0.5, False),
    "eta = 1 (DDPM)": (1.0, False),
    "sigma-hat (DDPM)": (0.0, True),
}
"""Rows of the paper's Table 1: eta, and whether sigma-hat takes its place."""

BATCH = 256
Drawer = Callable[[int, float, bool], np.ndarray]


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Train on handwritten digits, sample, compare."""

    out: str = "out/demo"
    """Where the model, the pictures and the table go."""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Numbers of sampling steps S."""
    num_samples: int = 512
    """Samples behind each number of the table."""
    train_steps: int = 2000
    """Updates of the training run."""
    seed: int = 0
    """Of everything."""


def main(config: DemoConfig) -> None:
    """Train, sample, measure, draw."""
    started = time.monotonic()
    out = pathlib.Path(config.out)
    recipe = dataclasses.replace(
        PRESETS["digits"][1],
        workdir=str(out / "model"),
        max_steps=config.train_steps,
        seed=config.seed,
    )
    train.run(recipe)
    trained = load_trained(recipe.workdir)
    batches = sequential_batches(load_images("digits"), 1024)
    real = np.concatenate([batch["image"] for batch in batches])

    draw = {num_steps: _drawer(trained, num_steps, config.seed) for num_steps in config.steps}
    cells = []
    for num_steps in config.steps:
        cells += _sample_cells(draw[num_steps], num_steps, real, config, out / "samples")
    floor = _distance(real[::2], real[1::2])

    table = _table(cells, config, floor, len(real))
    (out / "results.json").write_text(json.dumps({"floor": floor, "cells": cells}, indent=2))
    _plot_distances(out / "distance.png", cells, config, floor)
    _draw_real_beside_samples(out / "real_and_samples.png", real, draw[sorted(config.steps)[-2]])
    _draw_consistency(out / "consistency.png", draw)
    _draw_denoising(out / "denoising.png", trained, config)
    (out / "README.md").write_text(_report(table))
    print(table)
    print(f"\n{time.monotonic() - started:.0f} s in all; see {out / 'README.md'}")


def _drawer(trained: Trained, num_steps: int, seed: int) -> Drawer:
    """(num_images, eta, sigma_hat) -> uint8 images; one compiled program serves all methods."""
    program = generate.image_program(
        trained.network,
        ddim_timesteps(trained.network.schedule.num_steps, num_steps),
        lambda eta, sigma_hat: ddim(eta, sigma_hat=sigma_hat),
    )

    def draw(num_images: int, eta: float, sigma_hat: bool) -> np.ndarray:
        padded = -(-num_images // BATCH) * BATCH  # so that one program is compiled, not two
        images = generate.images(program, trained.params, padded, BATCH, seed, eta, sigma_hat)
        return images[:num_images]

    return draw


def _sample_cells(draw: Drawer, num_steps: int, real, config: DemoConfig, folder: pathlib.Path):
    """One cell of the table for each method."""
    draw(1, 0.0, False)  # compiled now, so that the seconds below are sampling alone
    cells: list[dict[str, Any]] = []
    for method, (eta, sigma_hat) in METHODS.items():
        started = time.monotonic()
        images = draw(config.num_samples, eta, sigma_hat)
        seconds = time.monotonic() - started
        name = "sigma_hat" if sigma_hat else f"eta_{eta:g}"
        pictures.save_grid(folder / f"S{num_steps:03d}_{name}.png", images[:64])
        distance = _distance(images, real)
        print(f"S = {num_steps:3d}  {method:17s} distance {distance:6.3f}  {seconds:5.1f} s")
        cells.append({"S": num_steps, "method": method, "distance": distance, "seconds": seconds})
    return cells


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance on raw pixels, scaled to [-1, 1]."""
    flat_a, flat_b = (x.reshape(len(x), -1) / 127.5 - 1.0 for x in (a, b))
    return frechet_distance_from_features(flat_a, flat_b)


def _value(cells, method: str, num_steps: int, key: str) -> float:
    return next(c[key] for c in cells if c["method"] == method and c["S"] == num_steps)


def _table(cells, config: DemoConfig, floor: float, num_real: int) -> str:
    head = "| S | " + " | ".join(str(s) for s in config.steps) + " |"
    lines = [head, "|---" * (len(config.steps) + 1) + "|"]
    for method in METHODS:
        values = [f"{_value(cells, method, s, 'distance'):.3f}" for s in config.steps]
        lines.append(f"| {method} | " + " | ".join(values) + " |")
    ddim_name = next(iter(METHODS))
    seconds = [f"{_value(cells, ddim_name, s, 'seconds'):.1f}" for s in config.steps]
    lines.append("| seconds | " + " | ".join(seconds) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"Frechet distance on raw pixels in [-1, 1] (lower is better), {config.num_samples} "
            f"samples against all {num_real} digits; the two halves of the real digits are "
            f"{floor:.3f} apart. Uniform sub-sequence, EMA weights, rounding to nearest, "
            f"seed {config.seed}; {jax.default_backend()}, JAX {jax.__version__}.",
        ]
    )


def _plot_distances(path: pathlib.Path, cells, config: DemoConfig, floor: float) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in METHODS:
        values = [_value(cells, method, s, "distance") for s in config.steps]
        axes.plot(config.steps, values, marker="o", label=method)
    axes.axhline(floor, color="grey", linestyle=":", label="two halves of the real digits")
    axes.set(xscale="log", yscale="log", xlabel="sampling steps S")
    axes.set_ylabel("Frechet distance (pixels)")
    axes.set_xticks(config.steps, [str(s) for s in config.steps])
    axes.minorticks_off()
    axes.set_title("The same network, sampled in S steps")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_real_beside_samples(path: pathlib.Path, real: np.ndarray, draw: Drawer) -> None:
    """Real digits left, DDIM samples right."""
    _save_side_by_side(path, pictures.tile(real[:64], 8), pictures.tile(draw(64, 0.0, False), 8))


def _draw_consistency(path: pathlib.Path, draw: dict[int, Drawer]) -> None:
    """Each row one x_T, each column one S: DDIM left, DDPM right (section 5.2)."""
    panels = []
    for eta in (0.0, 1.0):
        rows = np.stack([drawer(8, eta, False) for drawer in draw.values()], axis=1)
        panels.append(pictures.tile(rows.reshape(-1, *rows.shape[2:]), len(draw)))
    _save_side_by_side(path, *panels)


def _save_side_by_side(path: pathlib.Path, left: np.ndarray, right: np.ndarray) -> None:
    pictures.save_png(path, pictures.enlarge(pictures.beside(left, right), 560))


def _draw_denoising(path, trained, config: DemoConfig) -> None:
    """Rows in pairs: the state x_t, and x0_hat seen from it, at ten of 50 DDIM steps."""
    network = trained.network
    x_T, _ = initial_noise(jax.random.key(config.seed), jnp.arange(4), network.image_shape)
    timesteps = ddim_timesteps(network.schedule.num_steps, 50)
    states, x0s = jax.jit(
        lambda params, x_T: sample_trajectory(
            None, network.eps_fn(params), network.schedule, x_T, timesteps
        )
    )(trained.params, x_T)
    shown = np.linspace(0, 49, 10).round().astype(int)
    # (states or predictions, step, image, ...) -> image, states or predictions, step
    both = np.asarray(to_uint8(jnp.stack([states[:-1][shown], x0s[shown]])))
    rows = both.transpose(2, 0, 1, 3, 4, 5)
    pictures.save_png(
        path, pictures.enlarge(pictures.tile(rows.reshape(-1, *rows.shape[3:]), 10), 560)
    )


def _report(table: str) -> str:
    return f"""# DDIM on handwritten digits

{table}

![distance against steps](distance.png)

Real digits left, DDIM samples right:

![real digits and samples](real_and_samples.png)

One row is one x_T, one column one S of the table. DDIM (left) draws the same digit whatever S is;
DDPM (right) draws another each time:

![consistency](consistency.png)

Denoising in 50 steps: x_t, and below it the network's x0_hat.

![denoising](denoising.png)

One grid for each cell of the table is in samples/; the model is in model/.
"""


if __name__ == "__main__":
    cli.run(main, DemoConfig)
