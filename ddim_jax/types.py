"""Shapes and the one protocol everything else is built on.

Floor 0: imports nothing of ours. A floor imports only lower floors (tests/test_api.py).
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer, Key, UInt32

Data: TypeAlias = Float[Array, "*shape"]
"""Data, noise or a state: any shape at all, images are (..., H, W, C) in [-1, 1]."""

Level: TypeAlias = Float[Array, "..."] | Float[np.ndarray, "..."] | np.floating | float
"""A noise level alpha_bar in (0, 1]: a scalar, or an array over the data's leading axes."""

Index: TypeAlias = Integer[Array, "*index"] | Integer[np.ndarray, "*index"] | np.integer | int
"""A time index t in [-1, T - 1]; -1 is clean data."""

PRNGKey: TypeAlias = Key[Array, "..."] | UInt32[Array, "... 2"]
"""One key, or a leading axis of keys, one for each image. Old-style uint32 keys work too."""


@runtime_checkable  # so that the shape checks of the tests can meet it
class EpsFn(Protocol):
    """Predicts the noise in x at index t; a network is one example, a closed form another.

    `x` has any shape, `t` is an int32 scalar when sampling and has shape (B,) when training.
    Returns an array of x's shape. Paper: epsilon_theta^{(t)}(x), section 3.
    """

    def __call__(self, x: jax.Array, t: jax.Array, /) -> jax.Array: ...  # noqa: D102


def is_traced(value: object) -> bool:
    """Whether JAX is tracing `value`, so that it cannot be checked now."""
    return isinstance(value, Tracer)
