"""The algebra of x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

A network may predict the noise (eps), the data (x0), the velocity (v) or the score; given x_t and
its level each of the four determines the others, and `a_to_b(a, x_t, alpha_bar)` converts.

    x0    = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)       Song et al. 2021, eq. 9
    v     = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0            Salimans & Ho 2022, app. D
    score = grad log q(x_t) = -eps / sqrt(1 - alpha_bar)            Song et al. 2021, section 4.3

Everywhere `alpha_bar` is in [0, 1], a scalar or an array whose axes are the data's leading axes:
shape (B,) goes with data (B, H, W, C). Levels and arithmetic are float32 (or wider); the result has
x_t's dtype. Shapes that do not match raise ValueError. Dividing by a zero signal or noise level
gives inf or NaN, as the mathematics does: eps is undefined at alpha_bar = 1, and at alpha_bar = 0
it says nothing of x0. What steps consume is therefore the pair of both, `Prediction(x0, eps)`:
`predict` asks a network for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.checks import check_floating, check_same_shape
from ddim_jax.numerics import expand_level, safe_sqrt, widen
from ddim_jax.types import Data, Denoiser, Level, Prediction, Time


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


def velocity(x0: Data, eps: Data, alpha_bar: Level) -> Data:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, of x0's dtype: what a v-network learns."""
    check_same_shape("eps", eps, x0)
    signal, noise = _signal_and_noise(alpha_bar, x0)
    return (signal * eps - noise * x0).astype(x0.dtype)


def predict(eps_fn: Denoiser, x: Data, t: Time, alpha_bar: Level) -> Prediction:
    """The pair that eps_fn predicts at x, whichever of its two answers it gives.

    x and the pair are at least float32 for what follows, so that a step in bfloat16 rounds once.
    Raises ValueError for another shape than x's.
    """
    return as_prediction(checked_answer(eps_fn, x, t), x, alpha_bar)


def predict_noise(eps_fn: Denoiser, x: Data, t: Time) -> jax.Array:
    """The noise alone that eps_fn predicts at x; see `predict`."""
    answer = checked_answer(eps_fn, x, t)
    return answer.eps if isinstance(answer, Prediction) else answer


def as_prediction(eps: Data | Prediction, x_t: Data, alpha_bar: Level) -> Prediction:
    """The pair itself, or the one that goes with eps at x_t (eq. 9), x0 in at least float32."""
    check_floating("x_t", x_t)
    if isinstance(eps, Prediction):
        check_same_shape("eps.x0", eps.x0, x_t)
        check_same_shape("eps.eps", eps.eps, x_t)
        return eps
    return Prediction(epsilon_to_x0(eps, widen(x_t), alpha_bar), eps)


def clip_prediction(
    prediction: Prediction, x_t: Data, alpha_bar: Level, low: Level = -1.0, high: Level = 1.0
) -> Prediction:
    """The pair with x0 clipped to [low, high] and eps re-derived; untouched where nothing is cut.

    Bounds that are infinite, which may be traced, leave everything as it is.
    """
    x0, eps = prediction
    # Not re-derived where nothing is cut: the division by sqrt(1 - ab) would only add rounding.
    # Asked by the bounds, since a compiler may compute x0 twice and round it in two ways.
    cut = (x0 < low) | (x0 > high)
    # A network that says infinity has failed, and a clip must not hide it; low may be infinite.
    clipped = jnp.where(jnp.isinf(x0), jnp.nan, jnp.clip(x0, low, high))
    rederived = x0_to_epsilon(clipped, widen(x_t), alpha_bar)
    return Prediction(clipped, jnp.where(cut, rederived, widen(eps)))


_ARRAYS = (jax.Array, np.ndarray, np.generic, float, int)


def checked_answer(eps_fn: Denoiser, x: Data, t: Time) -> jax.Array | Prediction:
    """eps_fn(x, t), refused with a ValueError when it is no array, or pair, of x's shape."""
    if not callable(eps_fn):
        raise ValueError(f"eps_fn must be a function of (x, t); got {type(eps_fn).__name__}.")
    answer = eps_fn(x, t)  # pyright: ignore[reportArgumentType]
    arrays = answer if isinstance(answer, Prediction) else (answer,)
    for array in arrays:
        if not isinstance(array, _ARRAYS) or isinstance(array, bool):
            raise ValueError(
                f"eps_fn must return an array or a Prediction of two; got {type(array).__name__}."
            )
        if jnp.shape(array) != jnp.shape(x):
            raise ValueError(
                f"eps_fn must return an array of x's shape {jnp.shape(x)}; got {jnp.shape(array)}. "
                "A network that also predicts a variance has twice the channels: keep the first "
                "half."
            )
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise ValueError(
                "eps_fn must return floating point numbers; got dtype "
                f"{jnp.result_type(array)}. Cast what the network says."
            )
    return answer
