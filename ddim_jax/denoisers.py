"""Wrappers that turn one network into another `eps_fn`: parametrisations, guidance, clipping.

Convert once, at the edge; samplers and losses then speak of eps alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from ddim_jax.predict import (
    check_bounds,
    clip_epsilon,
    expand_level,
    predict_noise,
    score_to_epsilon,
    v_to_epsilon,
    widen,
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

    The eps it returns is at least float32, whatever x is.
    The published DDIM never clips; its sigma-hat rows and Ho et al. 2020 do. Not for encoding.
    Raises ValueError unless low < high.
    """
    check_bounds(low, high)
    return _ClippedEpsFn(eps_fn, schedule, low, high)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as a closure is
class _ClippedEpsFn:
    """A closure with a name, so that encoding can tell it from a network it can invert."""

    eps_fn: EpsFn
    schedule: Schedule
    low: float
    high: float

    def __call__(self, x, t):
        level = self.schedule.alpha_bar(t)
        # eps in bfloat16 could not say where x0_hat ends: at low levels it counts many times over.
        eps, x = widen(self.eps_fn(x, t)), widen(x)
        return clip_epsilon(eps, x, level, self.low, self.high)


def check_not_clipped(eps_fn: EpsFn) -> None:
    """Raise ValueError for what `clip_x0` returns: different x_t clip to the same x_prev."""
    if isinstance(eps_fn, _ClippedEpsFn):
        raise ValueError(
            "eps_fn must not clip its data prediction when encoding, since clipping cannot be "
            "inverted; got what clip_x0 returned. Pass the network that was given to clip_x0."
        )


def guided(cond_fn: EpsFn, uncond_fn: EpsFn, scale: Level) -> EpsFn:
    """Classifier-free guidance: uncond + scale (cond - uncond).

    scale = 1 is the conditional network, 0 the unconditional, above 1 sharpens; it may be traced.
    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with scale = 1 + w.
    """

    def eps_fn(x: jax.Array, t: jax.Array) -> jax.Array:
        cond, uncond = predict_noise(cond_fn, x, t), predict_noise(uncond_fn, x, t)
        return (uncond + expand_level(scale, x) * (cond - uncond)).astype(x.dtype)

    return eps_fn
