"""Images between images, by interpolating their latents (section 5.3, appendix D.5).

python experiments/interpolate.py --workdir runs/digits
python experiments/interpolate.py --workdir runs/digits --images 0 1     # two real digits
"""

from __future__ import annotations

import dataclasses
import pathlib

import cli
import generate
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import panels
import real
from workdir import Trained, Weights, load_trained

from ddim_jax.data import to_model_range
from ddim_jax.keys import initial_noise
from ddim_jax.latents import interpolation_grid, interpolation_line, lerp, slerp
from ddim_jax.parallel import over_devices
from ddim_jax.samplers import encode, sample
from ddim_jax.schedule import Spacing, ddim_timesteps


@dataclasses.dataclass(frozen=True)
class InterpolateConfig:
    """A line between two latents, by slerp and by lerp, and a grid between four."""

    workdir: str
    """The model: a folder that train.py or convert.py wrote."""
    out: str = "out/interpolate"
    """Where interpolation.png goes."""
    images: tuple[int, int] | None = None
    """Indices of two real images to join, through their latents; noise is joined if not given."""
    data: str | None = None
    """digits, a TFDS name, a folder or a .npz file; the model's training data if not given."""
    split: str = "test"
    """Which part of the data the real images are from."""
    data_dir: str | None = None
    """Where TFDS sets stand."""
    num_points: int = 11
    """Images on the line, both ends included."""
    grid_size: int = 8
    """Rows, and columns, of the grid."""
    num_sample_steps: int = 50
    """S, to encode and to decode."""
    spacing: Spacing | None = None
    """Sub-sequence of time indices; the model's own if not given."""
    label: int = 0
    """The class drawn by a conditional network; the ends of a line must share one."""
    seed: int = 0
    """Of the latents that are noise."""
    batch_size: int = 256
    """Images drawn at once."""
    weights: Weights = "ema"
    """The averaged weights, or the raw ones."""


def main(config: InterpolateConfig) -> None:
    """Interpolate, decode, draw."""
    for name in ("num_points", "grid_size"):
        if getattr(config, name) < 2:
            raise ValueError(
                f"{name} must be at least 2, to include both ends; got {getattr(config, name)}."
            )
    trained = load_trained(config.workdir, config.weights)
    network = trained.network
    timesteps = ddim_timesteps(
        network.schedule.num_steps, config.num_sample_steps, config.spacing or network.spacing
    )
    network.check_label(config.label)
    noise, _ = initial_noise(jax.random.key(config.seed), jnp.arange(4), network.image_shape)
    originals = None
    ends = noise[:2]
    if config.images is not None:
        source = real.open_source(
            config.workdir, network, config.data, config.split, config.data_dir
        )
        originals = real.take(source, config.images).image
        ends = jnp.asarray(_encode(trained, timesteps, originals, config))

    lines = {
        "slerp": interpolation_line(ends[0], ends[1], config.num_points, slerp),
        "lerp": interpolation_line(ends[0], ends[1], config.num_points, lerp),
    }
    grid = interpolation_grid(noise, config.grid_size, config.grid_size)
    latents = np.concatenate([*lines.values(), *grid])
    images = _decode(trained, timesteps, latents, config)
    line_images, grid_images = np.split(images, [2 * config.num_points])

    out = pathlib.Path(config.out)
    rows = line_images.reshape(2, config.num_points, *network.image_shape)
    grid_images = grid_images.reshape(*grid.shape)
    norms = {name: relative_norms(line) for name, line in lines.items()}
    for name, norm in norms.items():
        print(f"{name}: norms of the latents / sqrt(d) from {norm.min():.3f} to {norm.max():.3f}")
    _draw(out / "interpolation.png", rows, originals, norms, grid_images)
    print(f"see {out / 'interpolation.png'}")


def relative_norms(latents) -> np.ndarray:
    """Norm of each latent over sqrt(d), the norm near which standard normal vectors lie."""
    flat = np.asarray(latents).reshape(len(latents), -1)
    return np.linalg.norm(flat, axis=1) / np.sqrt(flat.shape[1])


def _encode(trained: Trained, timesteps, images, config: InterpolateConfig):
    def program(params, image, label):
        eps_fn = trained.network.eps_fn(params, label)
        return encode(eps_fn, trained.network.schedule, to_model_range(image), timesteps)

    return _run(program, trained, images, config)


def _decode(trained: Trained, timesteps, latents, config: InterpolateConfig):
    def program(params, x_T, label):
        eps_fn = trained.network.eps_fn(params, label)
        x_0 = sample(None, eps_fn, trained.network.schedule, x_T, timesteps)
        return generate.to_pixels(x_0)

    return generate.on_host(_run(program, trained, latents, config))


def _run(program, trained: Trained, rows, config: InterpolateConfig):
    labels = np.full(len(rows), config.label, np.int32)
    return real.over_batches(
        over_devices(program), trained.params, config.batch_size, np.asarray(rows), labels
    )


def _draw(path: pathlib.Path, lines, originals, norms, grid) -> None:
    """Top the two lines, below them the norms of their latents; right the grid."""
    figure = plt.figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplot_mosaic([["line", "grid"], ["norm", "grid"]], width_ratios=(1.5, 1))
    names, title = list(norms), "a line between two latents"
    if originals is not None:  # the real images above the ends of the line
        top = np.full_like(lines[0], 255)
        top[0], top[-1] = originals
        lines, names = np.concatenate([top[None], lines]), ["real", *names]
        title = "a line between the latents of two real images"
    panels.show_images(axes["line"], lines, rows=names, title=title)
    for name, norm in norms.items():
        axes["norm"].plot(np.linspace(0, 1, len(norm)), norm, marker="o", label=name)
    axes["norm"].axhline(1, color="grey", linestyle=":", label="noise")
    axes["norm"].set(xlabel="fraction", ylabel="norm of the latent / sqrt(d)", ylim=(0, 1.2))
    axes["norm"].legend(loc="lower right")
    panels.show_images(axes["grid"], grid, title="slerp between four latents, at the corners")
    panels.save(figure, path)


if __name__ == "__main__":
    cli.run(main, InterpolateConfig)
