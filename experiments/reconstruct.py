"""Encode real images to latents and decode them again (section 5.4, Table 2).

python experiments/reconstruct.py --workdir runs/cifar10 --data cifar10 --num-images 10000
python experiments/reconstruct.py --workdir runs/digits --steps 10 20 50 --fixed-point-iterations 6
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import cli
import generate
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import panels
import real
from workdir import Network, Trained, Weights, load_trained

from ddim_jax.data import to_model_range
from ddim_jax.inversion import encode_fixed_point
from ddim_jax.parallel import over_devices
from ddim_jax.samplers import Timesteps, encode, sample
from ddim_jax.schedule import Spacing, check_timesteps, ddim_timesteps

PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Table 2: S -> error on the CIFAR-10 test set. Source: Song, Meng, Ermon 2021."""

NUM_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """How much of an image survives encoding and decoding, over numbers of steps."""

    workdir: str
    """The model: a folder that train.py or convert.py wrote."""
    out: str = "out/reconstruct"
    """Where reconstruct.png and results.json go."""
    data: str | None = None
    """digits, a TFDS name, a folder or a .npz file; the model's training data if not given."""
    split: str = "test"
    """Which part of the data to encode."""
    data_dir: str | None = None
    """Where TFDS sets stand."""
    num_images: int = 16
    """The first so many images of the split; the paper takes 10000."""
    steps: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000)
    """Numbers of steps S; encoding takes as many as decoding."""
    timesteps: tuple[int, ...] = ()
    """One list of time indices of your own, descending, in place of `steps`."""
    spacing: Spacing | None = None
    """Sub-sequence of time indices; the model's own if not given."""
    fixed_point_iterations: int | None = None
    """Also encode each step implicitly, with so many network calls, and compare at equal calls."""
    batch_size: int = 250
    """Images encoded at once."""
    weights: Weights = "ema"
    """The averaged weights, or the raw ones."""


def main(config: ReconstructConfig) -> None:
    """Encode, decode, measure, draw."""
    iterations = config.fixed_point_iterations
    cli.check_at_least(config, fixed_point_iterations=1, batch_size=1)
    if not config.steps:
        raise ValueError("steps must name at least one number of steps; got none.")
    trained = load_trained(config.workdir, config.weights)
    network = trained.network
    spacing = config.spacing or network.spacing
    num_levels = network.schedule.num_steps
    if config.timesteps:
        check_timesteps(config.timesteps, num_levels)
        grids = {len(config.timesteps): np.asarray(config.timesteps)}
    else:
        grids = {s: ddim_timesteps(num_levels, s, spacing) for s in sorted(set(config.steps))}
    source = real.open_source(config.workdir, network, config.data, config.split, config.data_dir)
    images = real.first(source, config.num_images)

    def run(timesteps: Timesteps, num_iterations: int | None = None):
        program = reconstruction_program(network, timesteps, num_iterations)
        error, *pictures = real.over_batches(program, trained.params, config.batch_size, *images)
        return error, *map(generate.on_host, pictures)

    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows, decoded, latent = [], {}, None
    for num_steps, timesteps in grids.items():
        errors, latent, decoded[num_steps] = run(timesteps)
        row = {"S": num_steps, "mse": float(errors.mean())}
        if iterations is not None:
            row |= _implicit_row(run, timesteps, iterations, num_levels, spacing)
        rows.append(row)
        print(f"S = {num_steps:4d}  error {row['mse']:.2e}", flush=True)
    print(f"\n{_table(rows, iterations)}\n\n{_conditions(config, trained, spacing, source.name)}")

    (out / "results.json").write_text(
        json.dumps(dataclasses.asdict(config) | {"rows": rows}, indent=2) + "\n"
    )
    _draw(out / "reconstruct.png", rows, images.image, latent, decoded)
    print(f"see {out / 'reconstruct.png'}")


def reconstruction_program(
    network: Network, timesteps: Timesteps, num_iterations: int | None = None
):
    """(params, uint8 images, labels) -> each image's error, its latent and its reconstruction.

    The error is the mean squared difference of pixels on [0, 1], before any rounding or clipping;
    latent and reconstruction are uint8, the latent at a third of its contrast.
    """

    def reconstruct(params, image, label):
        eps_fn, schedule = network.eps_fn(params, label), network.schedule
        x_0 = to_model_range(image)
        if num_iterations is None:
            x_T = encode(eps_fn, schedule, x_0, timesteps)
        else:
            x_T = encode_fixed_point(eps_fn, schedule, x_0, timesteps, num_iterations)
        decoded = sample(None, eps_fn, schedule, x_T, timesteps)
        error = jnp.mean(((decoded - x_0) / 2) ** 2, axis=(1, 2, 3))
        return error, generate.to_pixels(x_T / 3), generate.to_pixels(decoded)

    return over_devices(reconstruct)


def _implicit_row(run, timesteps, iterations: int, num_levels: int, spacing: Spacing):
    """The implicit error, and the plain one at as many network calls for encoding and decoding."""
    calls = (iterations + 1) * len(timesteps)
    plain_steps = min(calls // 2, num_levels)
    implicit = run(timesteps, iterations)[0].mean()
    plain = run(ddim_timesteps(num_levels, plain_steps, spacing))[0].mean()
    return {
        "implicit_mse": float(implicit),
        "calls": calls,
        "plain_steps": plain_steps,
        "plain_mse": float(plain),
    }


def _table(rows, iterations: int | None) -> str:
    """Markdown: the errors beside the paper's, and the implicit ones at equal network calls."""
    lines = ["| S | error | paper, CIFAR-10 |", "|---|---|---|"]
    lines += [f"| {r['S']} | {r['mse']:.2e} | {PAPER.get(r['S'], '')} |" for r in rows]
    if iterations is not None:
        lines += [
            "",
            f"| S | network calls | implicit, {iterations} a step | plain, same calls | ratio |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['S']} | {r['calls']} | {r['implicit_mse']:.2e} | {r['plain_mse']:.2e} "
            f"(S = {r['plain_steps']}) | {r['plain_mse'] / r['implicit_mse']:.3g} |"
            for r in rows
        ]
    return "\n".join(lines)


def _conditions(config: ReconstructConfig, trained: Trained, spacing: str, name: str) -> str:
    grid = "given timesteps" if config.timesteps else f"{spacing} sub-sequence"
    return (
        f"Mean squared error of pixels on [0, 1]; first {config.num_images} images of {name}, "
        f"split {config.split}; {grid}, {config.weights} weights of step {trained.step}."
    )


def _draw(path: pathlib.Path, rows, images, latent, decoded) -> None:
    """Left the images, their latents at the most steps and reconstructions; right the errors."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(1.5, 1), layout="constrained"
    )
    steps = list(decoded)
    some = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    grid = np.stack([images, latent, *(decoded[s] for s in some)])[:, :NUM_SHOWN]
    panels.show_images(
        left, grid, rows=["original", f"latent, S = {steps[-1]}", *(f"S = {s}" for s in some)]
    )
    right.plot(steps, [row["mse"] for row in rows], marker="o", label="plain encoding")
    if "implicit_mse" in rows[0]:
        right.plot(steps, [r["implicit_mse"] for r in rows], marker="o", label="implicit encoding")
        right.plot(
            steps,
            [r["plain_mse"] for r in rows],
            marker="o",
            linestyle="--",
            label="plain, calls of the implicit one",
        )
    paper = {s: PAPER[s] for s in steps if s in PAPER}
    right.plot(
        paper.keys(),
        paper.values(),
        marker="s",
        color="grey",
        linestyle=":",
        label="paper, CIFAR-10",
    )
    right.set(yscale="log", ylabel="mean squared error on [0, 1]")
    panels.count_axis(right, steps, "steps S to encode, and to decode")
    right.legend(fontsize=8)
    panels.save(figure, path)


if __name__ == "__main__":
    cli.run(main, ReconstructConfig)
