"""Wrappers that turn one network into another: parametrisations, guidance, clipping.

Convert once, at the edge; samplers and losses then speak of the pair (x0, eps) alone. A network
that predicts something else than the noise is a wrapper here and an entry of `PARAMETRIZATIONS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ddim_jax.checks import check_bounds, check_callable, check_floating, check_real, check_schedule
from ddim_jax.numerics import expand, expand_level, safe_sqrt, widen
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
from ddim_jax.types import Data, Denoiser, Level, NoiseSchedule, Prediction, is_traced

NetworkFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, t) -> eps, v, x0 or score, of x's shape."""

CLIPPED = "ddim_jax.clip_x0"
"""The name of a clipped x0_hat in what JAX traces: so that encoding finds it in any function."""


def from_v(v_fn: NetworkFn, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of a network that predicts v (Salimans & Ho 2022, appendix D).

    x0 and eps are each computed from v, at any level: by way of eps, x0 would lose three digits at
    the noisy end, and all of them at alpha_bar = 0.
    """

    check_callable("v_fn", v_fn)
    check_schedule(schedule)

    def denoiser(x: jax.Array, t: jax.Array) -> Prediction:
        v, x, level = _own(v_fn, x, t), widen(x), schedule.alpha_bar(t)
        return Prediction(v_to_x0(v, x, level), v_to_epsilon(v, x, level))

    return denoiser


def from_x0(x0_fn: NetworkFn, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of a network that predicts the data x0."""

    check_callable("x0_fn", x0_fn)
    check_schedule(schedule)

    def denoiser(x: jax.Array, t: jax.Array) -> Prediction:
        x0, x = _own(x0_fn, x, t), widen(x)
        return Prediction(x0, x0_to_epsilon(x0, x, schedule.alpha_bar(t)))

    return denoiser


def from_score(score_fn: NetworkFn, schedule: NoiseSchedule) -> Denoiser:
    """The denoiser of a network that predicts the score of q(x_t); x0 by Tweedie's formula."""

    check_callable("score_fn", score_fn)
    check_schedule(schedule)

    def denoiser(x: jax.Array, t: jax.Array) -> Prediction:
        score, x, level = _own(score_fn, x, t), widen(x), schedule.alpha_bar(t)
        ab = expand_level(level, x)
        x0 = (x + (1 - ab) * score) / safe_sqrt(ab)
        return Prediction(x0, score_to_epsilon(score, x, level))

    return denoiser


def _own(network_fn: NetworkFn, x: jax.Array, t: jax.Array) -> jax.Array:
    """What the network itself says at x, in at least float32."""
    check_floating("x", x)
    answer = checked_answer(network_fn, x, t)
    if isinstance(answer, Prediction):
        raise ValueError(
            "the network to be wrapped must return one array; got a Prediction, as a wrapper makes."
        )
    return widen(jnp.asarray(answer))


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
    check_callable("eps_fn", eps_fn)
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
    check_callable("eps_fn", eps_fn)
    check_schedule(schedule)
    check_bounds(low, high)
    return _Clipped(eps_fn, schedule, low, high, keeps_eps=True)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as a closure is
class _Clipped:
    """What both clipping wrappers return."""

    eps_fn: Denoiser
    schedule: NoiseSchedule
    low: float
    high: float
    keeps_eps: bool

    def __call__(self, x: jax.Array, t: jax.Array) -> Prediction:
        level = self.schedule.alpha_bar(t)
        # In bfloat16 eps could not say where x0_hat ends: at low levels it counts many times over.
        check_floating("x", x)
        pair = as_prediction(_widened(checked_answer(self.eps_fn, x, t)), widen(x), level)
        if self.keeps_eps:
            clipped = Prediction(jnp.clip(pair.x0, self.low, self.high), pair.eps)
        else:
            clipped = clip_prediction(pair, x, level, self.low, self.high)
        return clipped._replace(x0=checkpoint_name(clipped.x0, CLIPPED))


def _widened(answer: jax.Array | Prediction) -> jax.Array | Prediction:
    return jax.tree.map(widen, answer)


def check_not_clipped(
    eps_fn: Denoiser, schedule: NoiseSchedule, x: Data, timesteps: jax.Array
) -> Data:
    """x itself, which is about to be encoded; raises ValueError where eps_fn clips.

    Different x_t clip to the same x_prev. What `clip_x0` returned is known wherever it is called
    from, `guided` or a lambda. Another network whose program may cut as much as x is tried far
    outside the data at the ends of the timesteps: clipping gives one and the same x0_hat there,
    however far, and another on the other side, and comes to it with a kink, where tanh does not.
    So a clip of one's own is found unless something is added to what it cut, as `guided` does.
    Where that is only known inside jit, all of x is NaN. With jit disabled, where a network need
    not be traceable, `clip_x0`'s own answer alone is refused.
    """
    if isinstance(eps_fn, _Clipped):
        raise ValueError(_MUST_NOT_CLIP.format("what clip_x0 returned"))
    if jax.config.jax_disable_jit:  # pyright: ignore
        return x
    jaxpr = jax.make_jaxpr(lambda x, t: checked_answer(eps_fn, x, t))(x, timesteps[0])
    equations = [*_equations(jaxpr.jaxpr)]
    if any(e.primitive.name == "name" and e.params["name"] == CLIPPED for e in equations):
        raise ValueError(_MUST_NOT_CLIP.format("what clip_x0 returned"))
    if not any(_may_cut(equation, jnp.size(x)) for equation in equations):
        return x
    clips = _is_cut_far_outside(eps_fn, schedule, x, timesteps[0])
    clips |= _is_cut_far_outside(eps_fn, schedule, x, timesteps[-1])
    if is_traced(clips):
        return jnp.where(clips, jnp.nan, x)
    if clips:
        raise ValueError(_MUST_NOT_CLIP.format("a network that does"))
    return x


_MUST_NOT_CLIP = (
    "eps_fn must not clip its data prediction when encoding, since clipping cannot be inverted; "
    "got {}. Pass the network that was given to clip_x0."
)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a traced function, those of the functions that it calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _may_cut(equation: Any, size: int) -> bool:
    """Whether it is of a kind that clipping is made of, on as many floats."""
    return equation.primitive.name in ("clamp", "min", "max", "select_n") and any(
        out.aval.size == size and jnp.issubdtype(out.aval.dtype, jnp.floating)
        for out in equation.outvars
    )


def _is_cut_far_outside(
    eps_fn: Denoiser, schedule: NoiseSchedule, x: Data, t: jax.Array
) -> jax.Array:
    """Whether x0_hat is at its ends far outside, or goes with the direction alone, and comes to
    that with a kink.
    """
    index = jnp.arange(jnp.size(x)).reshape(jnp.shape(x))
    far = 30 * (1 + index / jnp.size(x)) * jnp.where(index % 2, -1, 1)

    def x0(scale: jax.Array) -> jax.Array:
        point = (scale * far).astype(x.dtype)
        answer = _widened(checked_answer(eps_fn, point, t))
        return as_prediction(answer, widen(point), schedule.alpha_bar(t)).x0

    values = jax.lax.map(x0, jnp.array([1.0, 2.0, -1.0]))
    here, farther, opposite = values
    low, high = values.min(), values.max()
    by_direction = jnp.all((abs(here - farther) < 1e-2) & (abs(here - opposite) > 2e-2))
    # Some are on their way from one end to the other, where the network is far from linear.
    at_ends = jnp.mean(jnp.minimum(abs(values - low), abs(values - high)) < 1e-2) > 0.5
    at_ends &= jnp.size(x) >= 8  # of few values the least and the largest are always there
    at_ends &= jnp.any(values.max(axis=0) - values.min(axis=0) > 2e-2)

    def has_kink() -> jax.Array:
        # Values within the last twentieth, and still growing, are many where tanh saturates: a
        # factor of four of the distance lies there. Clipping's are few, and what rescales grows no
        # more.
        grid = jax.lax.map(x0, 2.0 ** jnp.arange(-9.0, 2.0))
        relative = (grid - low) / (high - low)
        relative = jnp.maximum(relative, 1 - relative)
        grown = relative[1:] - relative[:-1]
        smooth = (relative[1:] > 0.95) & (grown > 1e-3) & (grown < 0.15)
        return smooth.mean() < 0.12

    return jax.lax.cond(by_direction | at_ends, has_kink, lambda: jnp.array(False))


def guided(cond_fn: Denoiser, uncond_fn: Denoiser, scale: Level) -> Denoiser:
    """Classifier-free guidance: uncond + scale (cond - uncond), of eps and, where given, of x0.

    scale = 1 is the conditional network, 0 the unconditional, above 1 sharpens; it may be traced.
    Raises ValueError if one of them returns eps and the other a pair.
    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with scale = 1 + w.
    """
    check_callable("cond_fn", cond_fn)
    check_callable("uncond_fn", uncond_fn)
    check_real("scale", scale)

    def mix(cond: jax.Array, uncond: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return (uncond + expand("scale", scale, uncond) * (cond - uncond)).astype(dtype)

    def denoiser(x: jax.Array, t: jax.Array) -> jax.Array | Prediction:
        check_floating("x", x)
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
