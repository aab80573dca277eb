"""Images as bytes, and as the numbers in [-1, 1] that networks see."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def to_model_range(
    image: UInt8[Array, "*shape"] | UInt8[np.ndarray, "*shape"],
) -> Float[Array, "*shape"]:
    """The float32 images in [-1, 1] of uint8 ones: x / 127.5 - 1, no dequantisation."""
    # A sum of whole numbers, then one product: the ends are exact and jit changes no bit.
    return (2 * jnp.asarray(image, jnp.float32) - 255) * (1 / 255)


def to_uint8(x: Float[Array, "*shape"] | Float[np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """The uint8 images nearest to x in [-1, 1]; values outside are clipped.

    Rounds to nearest, so it inverts `to_model_range`. Tools that truncate instead give darker
    images and another Frechet distance.
    """
    levels = (jnp.asarray(x, jnp.float32) + 1) * 127.5
    return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)
