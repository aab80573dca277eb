"""Noise levels against data: shapes that meet, and arithmetic that keeps its digits."""

from __future__ import annotations

import contextlib
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddim_jax.checks import check_one_of, check_real
from ddim_jax.types import Level

Precision = Literal["default", "high", "highest"]
"""How products of float32 matrices and convolutions are computed: in the device's quickest way,
bfloat16 on a TPU and TF32 on newer GPUs; in between; or in float32."""


def check_precision(precision: str | None) -> None:
    """Raise ValueError for what is no `Precision`; None is JAX's own setting."""
    if precision is not None:
        check_one_of("precision", precision, get_args(Precision))


def matmul_precision(precision: Precision | None) -> contextlib.AbstractContextManager[object]:
    """What is traced in this context has that precision; JAX's own setting if None."""
    if precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)


def as_real(name: str, value: Level) -> Float[Array, "*level"]:
    """The number, or array of them, in at least float32; ValueError for what is no real number."""
    check_real(name, value)
    # A whole number is taken by way of Python's float: JAX knows none beyond int64.
    return widen(jnp.asarray(float(value) if isinstance(value, int | np.integer) else value))


def as_level(alpha_bar: Level, name: str = "alpha_bar") -> Float[Array, "*level"]:
    """The level as an array of at least float32: bfloat16 cannot tell 0.9999 from 1.

    Raises ValueError for a number outside [0, 1]; in a JAX array, whose values may not be known
    yet, it becomes NaN.
    """
    level = as_real(name, alpha_bar)
    if not isinstance(alpha_bar, jax.Array):
        known = np.asarray(alpha_bar, np.float64)
        if np.any((known < 0) | (known > 1)):
            raise ValueError(
                f"{name} must be in [0, 1], a level, not an index; got {alpha_bar!r}. The level of "
                "index t is schedule.alpha_bar(t)."
            )
        return level
    return jnp.where((level >= 0) & (level <= 1), level, jnp.nan)


def expand_level(alpha_bar: Level, x: jax.Array, name: str = "alpha_bar") -> Float[Array, "..."]:
    """The level with axes of size 1 appended, so that its axes meet x's leading axes."""
    return _expanded(as_level(alpha_bar, name), x)


def expand(name: str, value: Level, x: jax.Array) -> Float[Array, "..."]:
    """The same for any real number: a std, a scale."""
    return _expanded(as_real(name, value), x)


def _expanded(level: jax.Array, x: jax.Array) -> jax.Array:
    meets = all(n in (1, m) for n, m in zip(level.shape, x.shape, strict=False))
    if level.ndim > x.ndim or not meets:
        raise ValueError(
            "a noise level (alpha_bar, t, eta) must be a scalar or have the data's leading axes; "
            f"got level shape {level.shape} with data shape {x.shape}."
        )
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))


def widen(x: jax.Array) -> jax.Array:
    """`x` in at least float32, for arithmetic that is rounded once, at its end."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def safe_sqrt(value: Float[Array, "*level"]) -> Float[Array, "*level"]:
    """sqrt(max(value, 0)) with gradient 0 where it is 0, so that 0 * inf never makes a NaN."""
    empty = value <= 0
    return jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, value)))


def std_of(variance: Float[Array, "*level"]) -> Float[Array, "*level"]:
    """sqrt(variance), 0 where rounding alone took it below 0, NaN where it is further below."""
    return safe_sqrt(jnp.where(variance < -1e-6, jnp.nan, variance))


def noise_kept(alpha_bar_prev: Level, sigma: Level) -> Float[Array, "..."]:
    """sqrt(1 - alpha_bar_prev - sigma^2), the factor of eps in eq. 7 and 12.

    NaN where sigma^2 exceeds 1 - alpha_bar_prev: no process adds that much noise.
    """
    return std_of(1 - as_level(alpha_bar_prev, "alpha_bar_prev") - as_real("sigma", sigma) ** 2)
