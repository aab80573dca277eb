"""Exact DDIM inversion: latents that the sampler maps back to the data to rounding error."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddim_jax.checks import check_callable, check_count, check_floating, check_schedule
from ddim_jax.denoisers import check_not_clipped
from ddim_jax.numerics import expand
from ddim_jax.predict import checked_answer, x0_to_epsilon
from ddim_jax.steps import ddim_step
from ddim_jax.types import Data, Denoiser, Level, NoiseSchedule, Prediction, Timesteps


def encode_fixed_point(
    eps_fn: Denoiser,
    schedule: NoiseSchedule,
    x_0: Data,
    timesteps: Timesteps,
    num_iterations: int = 6,
) -> Data:
    """x_T whose DDIM decoding over the same timesteps is x_0, each step inverted exactly.

    `encode` asks the network at the wrong end of each step, and only gets near. Here every step
    solves x = ddim_step(x_next, eps_fn(x_next, t_next)) for x_next: find eps with
    eps = eps_fn(ddim_step(x, eps upwards), t_next), from the eps of the step before, by Anderson's
    method of depth 1. x_0 is (B, ...), each image solved by itself.

    Exactly len(timesteps) * num_iterations network calls, against len(timesteps) of `encode`. Six
    bring smooth networks at 50 steps to float32's rounding. A decoding step that leaves little of
    the noise is hard to invert, and impossible where the network merges different x_next (data
    without width, such as a black background): there, prefer lists with small low steps, such as
    "quadratic", to more iterations.
    Raises ValueError for num_iterations < 1, and as `encode` does.
    Source: the implicit form of eq. 12; Anderson 1965 (doi:10.1145/321296.321305).
    """
    check_count("num_iterations", num_iterations)
    check_callable("eps_fn", eps_fn)
    check_schedule(schedule)
    check_floating("x_0", x_0)
    ascending = schedule.check_timesteps(timesteps)[::-1]
    x_0 = check_not_clipped(eps_fn, schedule, x_0, ascending)

    def body(carry, inputs):
        x, eps = carry
        t, t_next = inputs
        ab, ab_next = schedule.alpha_bar(t), schedule.alpha_bar(t_next)

        def network(eps):
            answer = checked_answer(eps_fn, ddim_step(x, eps, ab, ab_next), t_next)
            return _noise_at(x, ab, answer).astype(x.dtype)

        eps = _anderson(network, eps, num_iterations)
        return (ddim_step(x, eps, ab, ab_next), eps), None

    t_from = jnp.append(schedule.clean, ascending[:-1])
    (x_T, _), _ = jax.lax.scan(body, (x_0, jnp.zeros_like(x_0)), (t_from, ascending))
    return x_T


def _noise_at(x: jax.Array, ab: Level, answer: jax.Array | Prediction) -> jax.Array:
    """The noise in x at level ab by what the network answers at the next level."""
    if not isinstance(answer, Prediction):
        return answer
    # Where there is little signal x_next is nearly its own eps, and at alpha_bar = 0 any eps would
    # be a solution: there x0 tells them apart.
    noisy = ab < 0.5
    by_x0 = x0_to_epsilon(answer.x0, x, jnp.where(noisy, ab, 0.5))
    return jnp.where(noisy, by_x0, answer.eps)


def _anderson(f: Callable[[jax.Array], jax.Array], x: jax.Array, num_calls: int) -> jax.Array:
    """x with x = f(x), after `num_calls` calls of f from the first guess x (B, ...)."""

    def body(carry, i):
        x, value_before, residual_before = carry
        value = f(x)
        residual = value - x
        change = residual - residual_before
        # How far to go back towards the previous value, so that the residual, taken as linear,
        # is smallest. Per image: a neighbour in the batch must not change the answer.
        size = _dot(change, change)
        # Nothing to go back to yet, or there already; the division is then by 1, for the gradient.
        usable = (i > 0) & (size > 1e-30)
        weight = jnp.where(usable, _dot(change, residual) / jnp.where(usable, size, 1.0), 0.0)
        x = value - expand("weight", weight, x) * (value - value_before)
        return (x.astype(value.dtype), value, residual), None

    (x, _, _), _ = jax.lax.scan(body, (x, x, x), jnp.arange(num_calls))
    return x


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner product of each image with its partner, (B, ...) -> (B,), at least float32."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(dtype) * b.astype(dtype), axis=tuple(range(1, a.ndim)))
