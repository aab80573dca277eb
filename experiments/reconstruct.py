"""Encode real images to latents and decode them again (section 5.4, Table 2).

python experiments/reconstruct.py --workdir runs/cifar10 --data cifar10 --num-images 10000
python experiments/reconstruct.py --workdir runs/digits --steps 10 20 50 --fixed-point-iterations 6
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import cli, figures, real
from common.options import ModelOptions, RealImageOptions, SpacingOptions
from common.progress import Progress
from common.results import write_results

from ddim_jax.inversion import encode_fixed_point
from ddim_jax.parallel import map_rows, over_devices
from ddim_jax.paths import Folder
from ddim_jax.runs import Run, RunParams, RunSpec, checked_images, to_pixels
from ddim_jax.runs.options import MAX_BATCH, check_limits, option
from ddim_jax.samplers import encode, sample
from ddim_jax.types import Timesteps

PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Table 2: S -> error on the CIFAR-10 test set. Source: Song, Meng, Ermon 2021."""

NUM_SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructConfig(SpacingOptions, RealImageOptions, ModelOptions):
    """How much of an image survives encoding and decoding, over numbers of steps."""

    out: Folder = "out/reconstruct"
    """Where reconstruct.png and results.json go."""
    num_images: int | None = option(None, at_least=1)
    """The first so many images of the split, 16 if not given; the paper takes 10000."""
    steps: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000)
    """Numbers of steps S; encoding takes as many as decoding."""
    timesteps: tuple[int, ...] = ()
    """One list of time indices of your own, descending, in place of `steps`."""
    fixed_point_iterations: int | None = option(None, at_least=1)
    """Also encode each step implicitly, with so many network calls, and compare at equal calls."""
    batch_size: int = option(250, at_least=1, below=MAX_BATCH)
    """Images encoded at once."""


def main(config: ReconstructConfig) -> None:
    """Encode, decode, measure, draw."""
    check_limits(config)
    config.check_encodes()
    iterations = config.fixed_point_iterations
    run = config.load()
    grids = _grids(run.spec, config)
    data = real.open_source(config.workdir, run.spec, config)
    images = real.first(data.source, config.num_images, 16)

    def reconstruct(timesteps: Timesteps, num_iterations: int | None = None):
        program = reconstruction_program(run.spec, timesteps, num_iterations)
        error, *pictures = map_rows(
            program,
            run.params,
            config.batch_size,
            *images,
            on_rows=lambda rows: progress.add(rows * _calls(timesteps, num_iterations)),
        )
        return error, *map(checked_images, pictures)

    rows, decoded, latent = [], {}, None
    calls = sum(_calls(timesteps) for timesteps in grids.values())
    if iterations is not None:
        calls += sum(
            _calls(timesteps, iterations) + 2 * _plain_steps(run.spec, timesteps, iterations)
            for timesteps in grids.values()
        )
    with Progress("reconstruct.py", calls * len(images.image), "network calls") as progress:
        for num_steps, timesteps in grids.items():
            errors, latent, decoded[num_steps] = reconstruct(timesteps)
            row = {"S": num_steps, "mse": float(errors.mean())}
            if iterations is not None:
                row |= _implicit_row(reconstruct, run.spec, timesteps, config)
            rows.append(row)
            progress.say(f"S = {num_steps:4d}  error {row['mse']:.2e}")
    print(f"\n{_table(rows, iterations)}\n\n{_conditions(config, run, data, len(images.image))}")

    out = pathlib.Path(config.out)
    write_results(out, config, {"split": data.split, "rows": rows}, run)
    _draw(out / "reconstruct.png", rows, images.image, latent, decoded, run.spec.schedule.num_steps)
    print(f"see {out / 'reconstruct.png'}")


def _grids(spec: RunSpec, config: ReconstructConfig) -> dict[int, np.ndarray]:
    """S -> the times of its steps."""
    if config.timesteps:
        return {len(config.timesteps): np.asarray(spec.schedule.check_timesteps(config.timesteps))}
    if not config.steps:
        raise ValueError("steps must name at least one number of steps; got none.")
    return {s: spec.timesteps(s, config.spacing) for s in sorted(set(config.steps))}


def reconstruction_program(
    spec: RunSpec, timesteps: Timesteps, num_iterations: int | None = None
) -> Callable[..., Any]:
    """(params, uint8 images, labels) -> each image's error, its latent and its reconstruction.

    The error is the mean squared difference of pixels on [0, 1], before any rounding or clipping,
    to what the model's codec alone makes of the image; for a model of pixels that is the image.
    Latent and reconstruction are uint8 images, the latent at a third of its contrast and decoded
    by the codec too.
    """

    def reconstruct(params: RunParams, image, label):
        eps_fn, schedule = spec.denoiser(params, label), spec.schedule
        x_0 = spec.encode(params, image)
        if num_iterations is None:
            x_T = encode(eps_fn, schedule, x_0, timesteps)
        else:
            x_T = encode_fixed_point(eps_fn, schedule, x_0, timesteps, num_iterations)
        latent = spec.decode(params, x_T / 3)
        decoded = spec.decode(params, sample(None, eps_fn, schedule, x_T, timesteps))
        error = jnp.mean(((decoded - spec.decode(params, x_0)) / 2) ** 2, axis=(1, 2, 3))
        return error, to_pixels(latent), to_pixels(decoded)

    return over_devices(reconstruct)


def _calls(timesteps: Timesteps, num_iterations: int | None = None) -> int:
    """Network calls of one image's reconstruction, encoding by so many iterations each step."""
    return ((num_iterations or 1) + 1) * len(timesteps)


def _plain_steps(spec: RunSpec, timesteps: Timesteps, num_iterations: int) -> int:
    """Steps of the plain reconstruction with as many network calls, as far as there are times."""
    return min(_calls(timesteps, num_iterations) // 2, spec.schedule.num_steps)


def _implicit_row(
    reconstruct: Callable[..., Any],
    spec: RunSpec,
    timesteps: np.ndarray,
    config: ReconstructConfig,
) -> dict[str, float]:
    """The implicit error, and the plain one at as many network calls for encoding and decoding."""
    iterations = config.fixed_point_iterations or 0
    calls = _calls(timesteps, iterations)
    plain_steps = _plain_steps(spec, timesteps, iterations)
    implicit = reconstruct(timesteps, iterations)[0].mean()
    plain = reconstruct(spec.timesteps(plain_steps, config.spacing))[0].mean()
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


def _conditions(config: ReconstructConfig, run: Run, data: real.Opened, num_images: int) -> str:
    spacing = config.spacing or run.spec.spacing
    grid = "given timesteps" if config.timesteps else f"{spacing} sub-sequence"
    codec = "" if run.spec.codec.is_identity else ", to the codec's own reconstruction"
    return (
        f"Mean squared error of pixels on [0, 1]{codec}; first {num_images} images of "
        f"{data.source.name}, {data}; {grid}, {run.weights_called}, run {run.fingerprint_id}."
    )


def _draw(path: pathlib.Path, rows, images, latent, decoded, max_steps: int) -> None:
    """Left the images, their latents at the most steps and reconstructions; right the errors."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.4), width_ratios=(1.6, 1), layout="constrained"
    )
    steps = list(decoded)
    some = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    grid = np.stack([images, latent, *(decoded[s] for s in some)])[:, :NUM_SHOWN]
    figures.show_images(
        left,
        grid,
        rows=["original", f"latent, S = {steps[-1]}", *(f"S = {s}" for s in some)],
        title="plain encoding in S steps, and decoding in as many",
    )
    right.plot(steps, [row["mse"] for row in rows], marker="o", label="plain encoding")
    if "implicit_mse" in rows[0]:
        right.plot(steps, [r["implicit_mse"] for r in rows], marker="o", label="implicit encoding")
        right.plot(
            steps,
            [r["plain_mse"] for r in rows],
            marker="o",
            linestyle="--",
            label=f"plain, as many calls, S at most {max_steps}",
        )
        # Each of 2 S steps rounds numbers around 1 to 24 bits: a variance of (2^-24)^2 / 3.
        rounding = [2 * s * 2.0**-48 / 3 / 4 for s in steps]
        right.plot(steps, rounding, color="black", linestyle=":", label="rounding of float32")
    paper = {s: PAPER[s] for s in steps if s in PAPER}
    if paper:
        look = {"marker": "s", "color": "grey", "linestyle": ":"}
        right.plot(paper.keys(), paper.values(), label="paper, CIFAR-10", **look)
    right.set(yscale="log", ylabel="mean squared error on [0, 1]")
    figures.count_axis(right, steps, "steps S to encode, and to decode")
    right.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.17))
    figures.save(figure, path)


if __name__ == "__main__":
    cli.run(main, ReconstructConfig)
