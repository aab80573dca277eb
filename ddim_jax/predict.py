"""The algebra of x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

A network may predict the noise (eps), the data (x0), the velocity (v) or the score; given x_t and
its level each of the four determines the others, and `a_to_b(a, x_t, alpha_bar)` converts.

    x0    = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)       Song et al. 2021, eq. 9
    v     = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0            Salimans & Ho 2022, app. D
    score = grad log q(x_t) = -eps / sqrt(1 - alpha_bar)            Song et al. 2021, section 4.3

Everywhere `alpha_bar` is in (0, 1], a scalar or an array whose axes are the data's leading axes:
shape (B,) goes with data (B, H, W, C). Levels and arithmetic are float32 (or wider); the result has
x_t's dtype. Shapes that do not match raise ValueError. Dividing by a zero signal or noise level
gives inf or NaN, as the mathematics does: eps is undefined at alpha_bar = 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddim_jax.types import Data, EpsFn, Level


def as_level(alpha_bar: Level) -> Float[Array, "*level"]:
    """The level as an array of at least float32: bfloat16 cannot tell 0.9999 from 1."""
    return widen(jnp.asarray(alpha_bar))


def expand_level(alpha_bar: Level, x: jax.Array) -> Float[Array, "..."]:
    """The level with axes of size 1 appended, so that its axes meet x's leading axes."""
    level = as_level(alpha_bar)
    meets = all(n in (1, m) for n, m in zip(level.shape, x.shape, strict=False))
    if level.ndim > x.ndim or not meets:
        raise ValueError(
            "a noise level (alpha_bar, t, eta) must be a scalar or have the data's leading axes; "
            f"got level shape {level.shape} with data shape {x.shape}."
        )
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))


def check_same_shape(name: str, array: jax.Array, x: jax.Array) -> None:
    """Raise ValueError unless `array`, called `name` in the message, has x's shape."""
    if jnp.shape(array) != jnp.shape(x):
        raise ValueError(
            f"{name} must have the data's shape {jnp.shape(x)}; got {jnp.shape(array)}."
        )


def check_floating(name: str, x: jax.Array) -> None:
    """Raise ValueError unless `x`, called `name` in the message, is floating point."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array; got {type(x).__name__}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating point, data in [-1, 1]; got dtype {x.dtype}. "
            "Grey levels 0..255 become x / 127.5 - 1."
        )


def check_bounds(low: float, high: float) -> None:
    """Raise ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"low must be below high; got low={low}, high={high}.")


def widen(x: jax.Array) -> jax.Array:
    """`x` in at least float32, for arithmetic that is rounded once, at its end."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def safe_sqrt(value: Float[Array, "*level"]) -> Float[Array, "*level"]:
    """sqrt(max(value, 0)) with gradient 0 where it is 0, so that 0 * inf never makes a NaN."""
    empty = value <= 0
    return jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, value)))


def noise_kept(alpha_bar_prev: Level, sigma: Level) -> Float[Array, "..."]:
    """sqrt(1 - alpha_bar_prev - sigma^2), the factor of eps in eq. 7 and 12.

    NaN where sigma^2 exceeds 1 - alpha_bar_prev: no process adds that much noise.
    """
    return std_of(1 - as_level(alpha_bar_prev) - as_level(sigma) ** 2)


def std_of(variance: Float[Array, "*level"]) -> Float[Array, "*level"]:
    """sqrt(variance), 0 where rounding alone took it below 0, NaN where it is further below."""
    return safe_sqrt(jnp.where(variance < -1e-6, jnp.nan, variance))


def _signal_and_noise(alpha_bar: Level, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    check_floating("x_t", x)
    level = expand_level(alpha_bar, x)
    return safe_sqrt(level), safe_sqrt(1 - level)


def epsilon_to_x0(eps: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Predicted data from predicted noise (eq. 9)."""
    check_same_shape("eps", eps, x_t)
    signal, noise = _signal_and_noise(alpha_bar, x_t)
    return ((x_t - noise * eps) / signal).astype(x_t.dtype)


def x0_to_epsilon(x0: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Noise from data (eq. 9 solved for eps)."""
    check_same_shape("x0", x0, x_t)
    signal, noise = _signal_and_noise(alpha_bar, x_t)
    return ((x_t - signal * x0) / noise).astype(x_t.dtype)


def v_to_x0(v: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Data from velocity: sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
    check_same_shape("v", v, x_t)
    signal, noise = _signal_and_noise(alpha_bar, x_t)
    return (signal * x_t - noise * v).astype(x_t.dtype)


def v_to_epsilon(v: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Noise from velocity: sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v."""
    check_same_shape("v", v, x_t)
    signal, noise = _signal_and_noise(alpha_bar, x_t)
    return (noise * x_t + signal * v).astype(x_t.dtype)


def epsilon_to_v(eps: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Velocity from noise."""
    check_same_shape("eps", eps, x_t)
    signal, noise = _signal_and_noise(alpha_bar, x_t)
    return ((eps - noise * x_t) / signal).astype(x_t.dtype)


def x0_to_v(x0: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Velocity from data."""
    check_same_shape("x0", x0, x_t)
    signal, noise = _signal_and_noise(alpha_bar, x_t)
    return ((signal * x_t - x0) / noise).astype(x_t.dtype)


def epsilon_to_score(eps: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Score of q(x_t) from noise: -eps / sqrt(1 - alpha_bar)."""
    check_same_shape("eps", eps, x_t)
    _, noise = _signal_and_noise(alpha_bar, x_t)
    return (-eps / noise).astype(x_t.dtype)


def score_to_epsilon(score: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Noise from the score of q(x_t)."""
    check_same_shape("score", score, x_t)
    _, noise = _signal_and_noise(alpha_bar, x_t)
    return (-noise * score).astype(x_t.dtype)


def x0_to_score(x0: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Score of q(x_t) from data."""
    return epsilon_to_score(x0_to_epsilon(x0, x_t, alpha_bar), x_t, alpha_bar)


def score_to_x0(score: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Data from the score of q(x_t) (Tweedie's formula)."""
    return epsilon_to_x0(score_to_epsilon(score, x_t, alpha_bar), x_t, alpha_bar)


def v_to_score(v: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Score of q(x_t) from velocity."""
    return epsilon_to_score(v_to_epsilon(v, x_t, alpha_bar), x_t, alpha_bar)


def score_to_v(score: Data, x_t: Data, alpha_bar: Level) -> Data:
    """Velocity from the score of q(x_t)."""
    return epsilon_to_v(score_to_epsilon(score, x_t, alpha_bar), x_t, alpha_bar)


def clip_epsilon(
    eps: Data, x_t: Data, alpha_bar: Level, low: float = -1.0, high: float = 1.0
) -> Data:
    """The noise that agrees with x0_hat clipped to [low, high]; eps itself where nothing is cut."""
    x0 = epsilon_to_x0(eps, x_t, alpha_bar)
    clipped = jnp.clip(x0, low, high)
    # Not re-derived where nothing was cut: the division by sqrt(1 - ab) would only add rounding.
    return jnp.where(clipped == x0, eps, x0_to_epsilon(clipped, x_t, alpha_bar)).astype(eps.dtype)


def predict_noise(eps_fn: EpsFn, x: jax.Array, t: jax.Array) -> jax.Array:
    """eps_fn(x, t), refused with a ValueError when its shape is not x's."""
    eps = eps_fn(x, t)
    if not isinstance(eps, jax.Array | np.ndarray):
        raise ValueError(f"eps_fn must return an array; got {type(eps).__name__}.")
    if jnp.shape(eps) != jnp.shape(x):
        raise ValueError(
            f"eps_fn must return an array of x's shape {jnp.shape(x)}; got {jnp.shape(eps)}. "
            "A network that also predicts a variance has twice the channels: keep the first half."
        )
    return eps
