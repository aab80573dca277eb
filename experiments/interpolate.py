"""Images between images, by interpolating their latents (section 5.3, appendix D.5).

python experiments/interpolate.py --workdir runs/digits
python experiments/interpolate.py --workdir runs/digits --images 0 1     # two real digits
python experiments/interpolate.py --workdir runs/digits --images a.png b.png
python experiments/interpolate.py --workdir runs/digits --images 0 1 --data photos/
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import cli, figures, real
from common.options import DrawOptions, ModelOptions, RealImageOptions, StepsOptions
from common.progress import Progress
from jaxtyping import Float, UInt8

from ddim_jax.keys import initial_noise, seed_key
from ddim_jax.latents import interpolation_grid, interpolation_line, lerp, slerp
from ddim_jax.parallel import map_rows, over_devices
from ddim_jax.paths import File, Folder
from ddim_jax.runs import Run, RunParams, RunSpec, checked_images, to_pixels
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import encode, sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolateConfig(DrawOptions, StepsOptions, RealImageOptions, ModelOptions):
    """A line between two latents, by slerp and by lerp, and a grid between four."""

    out: Folder = "out/interpolate"
    """Where interpolation.png goes."""
    images: tuple[int, int] | tuple[File, File] | None = None
    """Two real images to join, through their latents: indices in the data, or two image files.
    Those of another size are resized and cropped to the model's. Noise is joined if not given."""
    num_points: int = option(11, at_least=2, below=10_001)
    """Images on the line, both ends included."""
    grid_size: int = option(8, at_least=2)
    """Rows, and columns, of the grid."""
    label: int = 0
    """The class drawn by a conditional network; the ends of a line must share one."""


def main(config: InterpolateConfig) -> None:
    """Interpolate, decode, draw."""
    check_limits(config)
    if config.images is not None:
        config.check_encodes()
    run = config.load()
    spec = run.spec
    timesteps = spec.timesteps(config.num_sample_steps, config.spacing)
    spec.check_label(config.label)
    noise, _ = initial_noise(seed_key(config.seed), jnp.arange(4), spec.latent_shape)
    originals = None
    ends = noise[:2]
    if config.images is not None:
        originals, named = _originals(config, spec)
        print(f"real images: {named}")
        ends = jnp.asarray(_encode(run, timesteps, originals, config))

    lines = {
        "slerp": interpolation_line(ends[0], ends[1], config.num_points, slerp),
        "lerp": interpolation_line(ends[0], ends[1], config.num_points, lerp),
    }
    grid = interpolation_grid(noise, config.grid_size, config.grid_size)
    latents = np.concatenate([*lines.values(), *grid])
    images = _decode(run, timesteps, latents, config)
    line_images, grid_images = np.split(images, [2 * config.num_points])

    out = pathlib.Path(config.out)
    rows = line_images.reshape(2, config.num_points, *spec.image_shape)
    grid_images = grid_images.reshape(config.grid_size, config.grid_size, *spec.image_shape)
    norms = {name: relative_norms(line) for name, line in lines.items()}
    for name, norm in norms.items():
        print(f"{name}: norms of the latents / sqrt(d) from {norm.min():.3f} to {norm.max():.3f}")
    _draw(out / "interpolation.png", rows, originals, norms, grid_images)
    print(f"run {run.fingerprint_id}, see {out / 'interpolation.png'}")


def _originals(
    config: InterpolateConfig, spec: RunSpec
) -> tuple[UInt8[np.ndarray, "N H W C"], str]:
    """The two real images as the model's, and what to call them."""
    indices = [int(i) for i in config.images or () if str(i).isdecimal()]
    if indices and len(indices) < 2:
        raise ValueError(f"images must be two indices or two files; got {config.images}.")
    if indices:
        data = real.open_any_size(config.workdir, spec, config)
        images = real.in_shape(real.take(data.source, indices).image, spec.image_shape)
        return images, f"{indices[0]} and {indices[1]} of {data.source.name}, {data}"
    if config.data is not None or config.split is not None:
        raise ValueError(
            "data and split must be left out where images are files; got "
            f"{config.data or config.split}. Indices go with them."
        )
    paths = [str(path) for path in config.images or ()]
    return real.read_files(paths, spec.image_shape), " and ".join(paths)


def relative_norms(latents: Float[jax.Array, "N *shape"]) -> Float[np.ndarray, "N"]:
    """Norm of each latent over sqrt(d), the norm near which standard normal vectors lie."""
    flat = np.asarray(latents).reshape(len(latents), -1)
    return np.linalg.norm(flat, axis=1) / np.sqrt(flat.shape[1])


def _encode(
    run: Run, timesteps, images: UInt8[np.ndarray, "N H W C"], config: InterpolateConfig
) -> Float[np.ndarray, "N *shape"]:
    def program(params: RunParams, image, label):
        eps_fn = run.spec.denoiser(params, label)
        return encode(eps_fn, run.spec.schedule, run.spec.encode(params, image), timesteps)

    return _map(program, run, images, config)


def _decode(
    run: Run, timesteps, latents: Float[np.ndarray, "N *shape"], config: InterpolateConfig
) -> UInt8[np.ndarray, "N H W C"]:
    def program(params: RunParams, x_T, label):
        eps_fn = run.spec.denoiser(params, label)
        x_0 = sample(None, eps_fn, run.spec.schedule, x_T, timesteps)
        return to_pixels(run.spec.decode(params, x_0))

    return checked_images(_map(program, run, latents, config))


def _map(program: Callable[..., Any], run: Run, rows: np.ndarray, config: InterpolateConfig):
    labels, run_rows = np.full(len(rows), config.label, np.int32), over_devices(program)
    with Progress("interpolate.py", len(rows), "images") as progress:
        return map_rows(run_rows, run.params, config.batch_size, rows, labels, on_rows=progress.add)


def _draw(path: pathlib.Path, lines, originals, norms, grid) -> None:
    """Top the two lines, below them the norms of their latents; right the grid."""
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplot_mosaic([["line", "grid"], ["norm", "grid"]], width_ratios=(1.5, 1))
    names, title = list(norms), "a line between two latents"
    if originals is not None:  # the real images above the ends of the line
        top = np.full_like(lines[0], 255)
        top[0], top[-1] = originals
        lines, names = np.concatenate([top[None], lines]), ["real", *names]
        title = "a line between the latents of two real images"
    figures.show_images(axes["line"], lines, rows=names, title=title)
    for name, norm in norms.items():
        axes["norm"].plot(np.linspace(0, 1, len(norm)), norm, marker="o", label=name)
    axes["norm"].axhline(1, color="grey", linestyle=":", label="x_T of noise")
    axes["norm"].set(xlabel="fraction of the way", ylabel="norm / √d", ylim=(0, 1.2))
    axes["norm"].legend(loc="lower center", ncols=3)
    title = "norm of the latent: lerp loses it"
    if originals is not None and min(norms["slerp"][[0, -1]]) < 0.9:
        title += "\n(real images begin with less: none where images never vary)"
    axes["norm"].set_title(title, fontsize=10)
    figures.show_images(axes["grid"], grid, title="slerp between four latents, at the corners")
    figures.save(figure, path)


if __name__ == "__main__":
    cli.run(main, InterpolateConfig)
