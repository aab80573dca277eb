"""Wrappers that turn one network into another `eps_fn`: parametrisations, guidance, clipping.

Convert once, at the edge; samplers and losses then speak of eps alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from ddim_jax.predict import (
    check_bounds,
    clip_epsilon,
    expand_level,
    predict_noise,
    score_to_epsilon,
    v_to_epsilon,
    x0_to_epsilon,
)
from ddim_jax.schedule import Schedule
from ddim_jax.types import EpsFn, Level

Prediction = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, t) -> v, x0 or score, of x's shape."""


def from_v(v_fn: Prediction, schedule: Schedule) -> EpsFn:
    """`eps_fn` of a network that predicts v (Salimans & Ho 2022, appendix D)."""
    return lambda x, t: v_to_epsilon(v_fn(x, t), x, schedule.alpha_bar(t))


def from_x0(x0_fn: Prediction, schedule: Schedule) -> EpsFn:
    """`eps_fn` of a network that predicts the data x0."""
    return lambda x, t: x0_to_epsilon(x0_fn(x, t), x, schedule.alpha_bar(t))


def from_score(score_fn: Prediction, schedule: Schedule) -> EpsFn:
    """`eps_fn` of a network that predicts the score of q(x_t)."""
    return lambda x, t: score_to_epsilon(score_fn(x, t), x, schedule.alpha_bar(t))


def clip_x0(eps_fn: EpsFn, schedule: Schedule, low: float = -1.0, high: float = 1.0) -> EpsFn:
    """`eps_fn` whose data prediction lies in [low, high]: x0_hat is clipped and eps re-derived.

    The published DDIM never clips; its sigma-hat rows and Ho et al. 2020 do.
    Raises ValueError unless low < high.
    """
    check_bounds(low, high)
    return lambda x, t: clip_epsilon(eps_fn(x, t), x, schedule.alpha_bar(t), low, high)


def guided(cond_fn: EpsFn, uncond_fn: EpsFn, scale: Level) -> EpsFn:
    """Classifier-free guidance: uncond + scale (cond - uncond).

    scale = 1 is the conditional network, 0 the unconditional, above 1 sharpens; it may be traced.
    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with scale = 1 + w.
    """

    def eps_fn(x: jax.Array, t: jax.Array) -> jax.Array:
        cond, uncond = predict_noise(cond_fn, x, t), predict_noise(uncond_fn, x, t)
        return (uncond + expand_level(scale, x) * (cond - uncond)).astype(x.dtype)

    return eps_fn
