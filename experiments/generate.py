"""Drawing images from a network, on all devices, image i from (seed, i) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from workdir import Network

from ddim_jax.data import to_uint8
from ddim_jax.keys import initial_noise
from ddim_jax.parallel import over_devices
from ddim_jax.samplers import Sampler, Timesteps, ddim, ddpm, sample
from ddim_jax.solvers import dpm_solver_pp_2m, heun, probability_flow_euler

SamplerFn = Callable[..., Sampler]
"""(*values) -> Sampler; the values may be traced, so that one program serves all of them."""

SamplerName = Literal["ddim", "ddpm", "heun", "dpm_solver_pp_2m", "probability_flow_euler"]


def make_sampler(name: SamplerName, eta: float = 0.0, sigma_hat: bool = False) -> Sampler:
    """The sampler a command line names; `eta` and `sigma_hat` are DDIM's and refused elsewhere."""
    if name != "ddim" and (eta != 0 or sigma_hat):
        raise ValueError(
            f"eta and sigma_hat must be left out for the sampler {name}, which has neither; "
            f"got eta {eta:g}, sigma_hat {sigma_hat}. They are options of ddim."
        )
    match name:
        case "ddim":
            return ddim(eta, sigma_hat=sigma_hat)
        case "ddpm":
            return ddpm()
        case "heun":
            return heun()
        case "dpm_solver_pp_2m":
            return dpm_solver_pp_2m()
        case "probability_flow_euler":
            return probability_flow_euler()


class Pixels(NamedTuple):
    """Images on the device, and which of them were finite before they became whole numbers."""

    images: UInt8[Array, "B *shape"]
    finite: Bool[Array, "B"]


def to_pixels(x: Float[Array, "B *shape"]) -> Pixels:
    """The uint8 images of x in [-1, 1]."""
    return Pixels(to_uint8(x), jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))))


def on_host(pixels: Pixels) -> UInt8[np.ndarray, "B *shape"]:
    """The images. Raises FloatingPointError where one is not finite, which would show as black."""
    finite = np.asarray(pixels.finite)
    if not finite.all():
        raise FloatingPointError(
            f"{np.sum(~finite)} of {len(finite)} images are not finite: the weights, or the "
            "sampler with these settings, diverged. Nothing was written of them."
        )
    return np.asarray(pixels.images)


def image_program(
    network: Network,
    timesteps: Timesteps,
    make_sampler: SamplerFn = lambda: ddim(),
    *,
    label: int | None = None,
    guidance_scale: float = 1.0,
) -> Callable[..., Pixels]:
    """A compiled program (params, indices, seed, *values) -> the images of these indices.

    Of a network with classes image i is drawn of class i % K, or all of the class `label`.
    One compilation for each batch size serves all weights, seeds and values, such as eta.
    """
    classes = network.model.num_classes
    if classes is None and (label is not None or guidance_scale != 1):
        raise ValueError(
            "label and guidance_scale must be left out for a network that was trained without "
            f"labels; got {label} and {guidance_scale:g}."
        )
    if label is not None:
        network.check_label(label)

    def draw(everywhere, indices):
        params, seed, values = everywhere
        x_T, keys = initial_noise(jax.random.key(seed), indices, network.image_shape)
        labels = indices % (classes or 1) if label is None else jnp.full_like(indices, label)
        eps_fn = network.eps_fn(params, labels, guidance_scale)
        x_0 = sample(keys, eps_fn, network.schedule, x_T, timesteps, make_sampler(*values))
        return to_pixels(x_0)

    program = over_devices(draw)
    return lambda params, indices, seed, *values: program((params, seed, values), indices)


def image_batches(
    program: Callable[..., Any],
    params: Any,
    num_images: int,
    batch_size: int,
    seed: int,
    *values: Any,
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Images 0 .. num_images - 1 of a program, in batches; the last one is cut, none is dropped.

    A batch is rounded up to a multiple of the devices. One batch computes while the one before is
    handed out.
    """
    devices = jax.local_device_count()
    batch_size = -(-min(batch_size, num_images) // devices) * devices
    waiting = None
    for start in range(0, num_images, batch_size):
        pixels = program(params, jnp.arange(start, start + batch_size), seed, *values)
        if waiting is not None:
            yield on_host(waiting)
        waiting = Pixels(*(array[: num_images - start] for array in pixels))
    if waiting is not None:
        yield on_host(waiting)


def images(
    program: Callable[..., Any],
    params: Any,
    num_images: int,
    batch_size: int,
    seed: int,
    *values: Any,
) -> UInt8[np.ndarray, "B H W C"]:
    """All of `image_batches` as one array."""
    return np.concatenate([*image_batches(program, params, num_images, batch_size, seed, *values)])
