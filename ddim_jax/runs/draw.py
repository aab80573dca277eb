"""Drawing images from a run, on all devices, image i from (key, i) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from ddim_jax.data.pixels import nearest_levels
from ddim_jax.keys import initial_noise
from ddim_jax.parallel import (
    DeviceProgram,
    Devices,
    index_batches,
    joined,
    map_batches,
    over_devices,
)
from ddim_jax.runs.spec import RunParams, RunSpec
from ddim_jax.samplers import Sampler, ddim, sample
from ddim_jax.types import PRNGKey, Timesteps


class Pixels(NamedTuple):
    """Images on the device, and which of them were finite before they became whole numbers."""

    images: UInt8[Array, "B *shape"]
    finite: Bool[Array, "B"]


def to_pixels(x: Float[Array, "B *shape"]) -> Pixels:
    """The uint8 images of x in [-1, 1]."""
    return Pixels(nearest_levels(x), jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))))


def checked_images(pixels: Pixels) -> UInt8[np.ndarray, "B *shape"]:
    """The images. Raises FloatingPointError where one is not finite, which would show as black."""
    check_finite(pixels.finite)
    return np.asarray(pixels.images)


def check_finite(finite: Bool[Array, "B"] | Bool[np.ndarray, "B"]) -> None:
    """Raise FloatingPointError unless all images were finite."""
    finite = np.asarray(finite)
    if not finite.all():
        raise FloatingPointError(
            f"{np.sum(~finite)} of {len(finite)} images are not finite: the weights, or the "
            "sampler with these settings, diverged. Nothing was written of them."
        )


def marked_images(pixels: Pixels) -> UInt8[np.ndarray, "B H W C"]:
    """The images, a cross on white in place of each that is not finite: red if there are colours.

    For pictures that somebody looks at, of a computation that goes on whatever they show.
    """
    images, finite = np.array(pixels.images), np.asarray(pixels.finite)
    images[~finite] = _cross(*images.shape[1:])
    return images


def _cross(height: int, width: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    thickness = 0.6 / min(height, width)
    lines = np.minimum(abs(rows - columns), abs(rows + columns - 1)) < thickness
    image = np.full((height, width, channels), 255, np.uint8)
    image[lines] = (255, 0, 0) if channels == 3 else 0
    return image


class DrawInputs(NamedTuple):
    """What an image program takes beside the indices; every device gets all of it."""

    params: RunParams
    key: PRNGKey
    values: tuple[Any, ...] = ()
    """What the sampler is made of, such as eta."""


ImageProgram = Callable[[DrawInputs, Any], Pixels]
"""(inputs, indices (B,)) -> the images of these indices; B divides by the devices."""


def image_program(
    spec: RunSpec,
    timesteps: Timesteps,
    make_sampler: Callable[..., Sampler] = lambda: ddim(),
    *,
    label: int | None = None,
    guidance_scale: float = 1.0,
    devices: Devices | None = None,
) -> DeviceProgram:
    """A compiled program for `map_batches`: the images of any indices.

    `make_sampler(*values)` may be given traced values, so that one compilation for each batch size
    serves all weights, keys and values. Of a network with classes image i is drawn of class i % K,
    or all of the class `label`. Raises ValueError for a label or guidance the network cannot have.
    devices: others than this host's, such as those of a machine that is only compiled for.
    """
    classes = spec.num_classes
    if classes is None and (label is not None or guidance_scale != 1):
        raise ValueError(
            "label and guidance_scale must be left out for a network that was trained without "
            f"labels; got {label} and {guidance_scale:g}."
        )
    spec.check_guidance(guidance_scale)
    if label is not None:
        spec.check_label(label)

    def draw(inputs: DrawInputs, indices: jax.Array) -> Pixels:
        x_T, keys = initial_noise(inputs.key, indices, spec.latent_shape)
        labels = indices % (classes or 1) if label is None else jnp.full_like(indices, label)
        denoiser = spec.denoiser(inputs.params, labels, guidance_scale)
        sampler = make_sampler(*inputs.values)
        x_0 = sample(keys, denoiser, spec.schedule, x_T, timesteps, sampler)
        return to_pixels(spec.decode(inputs.params, x_0))

    return over_devices(draw, devices)


def image_batches(
    program: ImageProgram, inputs: DrawInputs, num_images: int, batch_size: int, start: int = 0
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Images start .. num_images - 1 of a program, in batches; none is dropped, none is more.

    With several processes each gets its share of the batches, by `index_batches`.
    """
    indices = index_batches(num_images, batch_size, start)
    return map(checked_images, map_batches(program, inputs, indices))


def draw_images(
    program: ImageProgram,
    inputs: DrawInputs,
    num_images: int,
    batch_size: int,
    on_rows: Callable[[int], object] | None = None,
) -> UInt8[np.ndarray, "B H W C"]:
    """Images 0 .. num_images - 1 of a program; with several processes, all of them in each.

    on_rows: called with the number of images of each batch that is drawn, to show progress.
    Raises ValueError for less than one image, or less than one at a time, FloatingPointError where
    one is not finite.
    """
    return checked_images(draw_pixels(program, inputs, num_images, batch_size, on_rows))


def draw_pixels(
    program: ImageProgram,
    inputs: DrawInputs,
    num_images: int,
    batch_size: int,
    on_rows: Callable[[int], object] | None = None,
) -> Pixels:
    """What `draw_images` draws, on the host, those that are not finite too."""
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    starts = range(0, num_images, batch_size)
    indices = (np.arange(start, min(start + batch_size, num_images)) for start in starts)
    return joined(map_batches(program, inputs, indices), on_rows)
