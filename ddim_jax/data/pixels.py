"""Images as bytes, and as the numbers in [-1, 1] that networks see."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ddim_jax.checks import check_floating, check_grey_levels
from ddim_jax.types import is_traced


def to_model_range(
    image: UInt8[Array, "*shape"] | UInt8[np.ndarray, "*shape"],
) -> Float[Array, "*shape"]:
    """The float32 images in [-1, 1] of uint8 ones: x / 127.5 - 1, no dequantisation."""
    check_grey_levels("image", image)
    # A sum of whole numbers, then one product: the ends are exact and jit changes no bit.
    return (2 * jnp.asarray(image, jnp.float32) - 255) * (1 / 255)


def to_uint8(x: Float[Array, "*shape"] | Float[np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """The uint8 images nearest to x in [-1, 1]; values outside are clipped.

    Rounds to nearest, so it inverts `to_model_range`. Tools that truncate instead give darker
    images and another Frechet distance.
    A NaN, which has no uint8, is a FloatingPointError; under jit, where it is not known, black.
    """
    check_floating("x", x)
    if not is_traced(x) and (count := int(jnp.isnan(x).sum())):
        raise FloatingPointError(
            f"x must be finite to become uint8: {count} of its {x.size} values are NaN, and would "
            "be black. The weights, or the sampler with these settings, diverged."
        )
    return nearest_levels(x)


def nearest_levels(
    x: Float[Array, "*shape"] | Float[np.ndarray, "*shape"],
) -> UInt8[Array, "*shape"]:
    """`to_uint8` of what is known to be finite, or is looked at beside (`runs.to_pixels`)."""
    check_floating("x", x)
    levels = (jnp.asarray(x, jnp.float32) + 1) * 127.5
    return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)
