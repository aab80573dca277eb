"""Wrappers that turn one network into another: parametrisations, guidance, clipping.

Convert once, at the edge; samplers and losses then speak of the pair (x0, eps) alone. A network
that predicts something else than the noise is a wrapper here and an entry of `PARAMETRIZATIONS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ddim_jax.checks import check_bounds, check_schedule
from ddim_jax.numerics import expand_level, safe_sqrt, widen
from ddim_jax.predict import (
    as_prediction,
    checked_answer,
    clip_prediction,
    score_to_epsilon,
    v_to_epsilon,
    v_to_x0,
    velocity,
    x0_to_epsilon,
)
from ddim_jax.types import Data, Denoiser, Level, NoiseSchedule, Prediction

NetworkFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, t) -> eps, v, x0 or score, of x's shape."""


def from_v(v_fn: NetworkFn, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of a network that predicts v (Salimans & Ho 2022, appendix D).

    x0 and eps are each computed from v, at any level: by way of eps, x0 would lose three digits at
    the noisy end, and all of them at alpha_bar = 0.
    """

    check_schedule(schedule)

    def denoiser(x: jax.Array, t: jax.Array) -> Prediction:
        v, x, level = widen(v_fn(x, t)), widen(x), schedule.alpha_bar(t)
        return Prediction(v_to_x0(v, x, level), v_to_epsilon(v, x, level))

    return denoiser


def from_x0(x0_fn: NetworkFn, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of a network that predicts the data x0."""

    check_schedule(schedule)

    def denoiser(x: jax.Array, t: jax.Array) -> Prediction:
        x0, x = widen(x0_fn(x, t)), widen(x)
        return Prediction(x0, x0_to_epsilon(x0, x, schedule.alpha_bar(t)))

    return denoiser


def from_score(score_fn: NetworkFn, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of a network that predicts the score of q(x_t); x0 by Tweedie's formula."""

    check_schedule(schedule)

    def denoiser(x: jax.Array, t: jax.Array) -> Prediction:
        score, x, level = widen(score_fn(x, t)), widen(x), schedule.alpha_bar(t)
        ab = expand_level(level, x)
        x0 = (x + (1 - ab) * score) / safe_sqrt(ab)
        return Prediction(x0, score_to_epsilon(score, x, level))

    return denoiser


class Parametrization(NamedTuple):
    """What a network predicts: the denoiser it makes, and what it is trained to say."""

    denoiser: Callable[[NetworkFn, NoiseSchedule], Denoiser]
    target: Callable[[Data, Data, Level], Data]
    """(x0, eps, alpha_bar) -> the right answer, of x0's shape."""


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "eps": Parametrization(lambda eps_fn, schedule: eps_fn, lambda x0, eps, alpha_bar: eps),
    "v": Parametrization(from_v, velocity),
    "x0": Parametrization(from_x0, lambda x0, eps, alpha_bar: x0),
}
"""What a run may say its network predicts. To add one is to write its wrapper and this entry."""


def clip_x0(
    eps_fn: Denoiser, schedule: NoiseSchedule, low: float = -1.0, high: float = 1.0
) -> Denoiser:
    """The denoiser whose x0 lies in [low, high]: x0_hat is clipped and eps re-derived.

    The pair it returns is at least float32, whatever x is.
    The published DDIM never clips; its sigma-hat rows and Ho et al. 2020 do. Not for encoding.
    Raises ValueError unless low < high.
    """
    check_schedule(schedule)
    check_bounds(low, high)
    return _Clipped(eps_fn, schedule, low, high, keeps_eps=False)


def clip_x0_keep_eps(
    eps_fn: Denoiser, schedule: NoiseSchedule, low: float = -1.0, high: float = 1.0
) -> Denoiser:
    """`clip_x0` without re-deriving eps: what diffusers does with `clip_sample`.

    The two predictions then disagree, so that a step with them is no longer eq. 12. Offered to
    reproduce that tool's images.
    """
    check_schedule(schedule)
    check_bounds(low, high)
    return _Clipped(eps_fn, schedule, low, high, keeps_eps=True)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as a closure is
class _Clipped:
    """A closure with a name, so that encoding can tell it from a network it can invert."""

    eps_fn: Denoiser
    schedule: NoiseSchedule
    low: float
    high: float
    keeps_eps: bool

    def __call__(self, x: jax.Array, t: jax.Array) -> Prediction:
        level = self.schedule.alpha_bar(t)
        # In bfloat16 eps could not say where x0_hat ends: at low levels it counts many times over.
        pair = as_prediction(_widened(self.eps_fn(x, t)), widen(x), level)
        if self.keeps_eps:
            return Prediction(jnp.clip(pair.x0, self.low, self.high), pair.eps)
        return clip_prediction(pair, x, level, self.low, self.high)


def _widened(answer: jax.Array | Prediction) -> jax.Array | Prediction:
    return jax.tree.map(widen, answer)


def check_not_clipped(eps_fn: Denoiser) -> None:
    """Raise ValueError for what `clip_x0` returns: different x_t clip to the same x_prev."""
    if isinstance(eps_fn, _Clipped):
        raise ValueError(
            "eps_fn must not clip its data prediction when encoding, since clipping cannot be "
            "inverted; got what clip_x0 returned. Pass the network that was given to clip_x0."
        )


def guided(cond_fn: Denoiser, uncond_fn: Denoiser, scale: Level) -> Denoiser:
    """Classifier-free guidance: uncond + scale (cond - uncond), of eps and, where given, of x0.

    scale = 1 is the conditional network, 0 the unconditional, above 1 sharpens; it may be traced.
    Raises ValueError if one of them returns eps and the other a pair.
    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with scale = 1 + w.
    """

    def mix(cond: jax.Array, uncond: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return (uncond + expand_level(scale, uncond) * (cond - uncond)).astype(dtype)

    def denoiser(x: jax.Array, t: jax.Array) -> jax.Array | Prediction:
        cond, uncond = checked_answer(cond_fn, x, t), checked_answer(uncond_fn, x, t)
        if isinstance(cond, Prediction) and isinstance(uncond, Prediction):
            # On a line between two pairs x_t = sqrt(ab) x0 + sqrt(1 - ab) eps holds everywhere.
            return Prediction(*(mix(c, u, c.dtype) for c, u in zip(cond, uncond, strict=True)))
        if isinstance(cond, Prediction) or isinstance(uncond, Prediction):
            raise ValueError(
                "cond_fn and uncond_fn must both return eps, or both a Prediction; got one of "
                "each. Wrap both in the same wrapper, such as from_v."
            )
        return mix(cond, uncond, x.dtype)

    return denoiser
