"""Samplers and the scans that run them.

A `Sampler` is two pure functions; `sample` scans its step over a sub-sequence of time indices.
Nothing here is jitted: wrap the call in `jax.jit` together with your network. To add a sampler,
write one function that returns a `Sampler`; solvers.py has three to copy from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddim_jax.denoisers import check_not_clipped
from ddim_jax.keys import check_keys, draw_noise, fold_in, typed_key
from ddim_jax.predict import (
    check_bounds,
    check_floating,
    clip_epsilon,
    epsilon_to_x0,
    predict_noise,
)
from ddim_jax.schedule import Schedule, check_timesteps
from ddim_jax.steps import (
    Variance,
    check_eta,
    check_variance,
    ddim_step,
    ddim_step_clip_data,
    ddpm_step,
    is_zero,
    sigma_hat_step,
)
from ddim_jax.types import Data, EpsFn, Level, PRNGKey, is_traced

Timesteps = Sequence[int] | Int[np.ndarray, "S"] | Int[Array, "S"]


class SamplerState(NamedTuple):
    """What the next step needs, and the prediction a person wants to see."""

    x: jax.Array
    """The state x_t, any shape."""
    x0: jax.Array
    """x0_hat of the step that led here (eq. 9), same shape; zeros before the first step."""


class Sampler(NamedTuple):
    """A sampling method. Its state is any pytree with fields `x` and `x0`, as in `SamplerState`."""

    init: Callable[[jax.Array], Any]
    """x_T -> state."""
    step: Callable[..., Any]
    """(key, state, eps_fn, schedule, t, t_prev) -> state at t_prev; t_prev = -1 is clean data."""


def init_state(x_T: Data) -> SamplerState:
    """The state most samplers start from."""
    return SamplerState(x=x_T, x0=jnp.zeros_like(x_T))


def ddim(eta: Level = 0.0, *, sigma_hat: bool | jax.Array = False) -> Sampler:
    """DDIM with the paper's eta: 0 is deterministic, 1 is DDPM, between them the family of eq. 16.

    `sigma_hat=True` takes the paper's sigma-hat steps instead (appendix D.3), whatever eta is. Both
    may be traced, so one compiled program serves every row of the paper's Table 1.
    Raises ValueError for a known eta below 0, and for a flag that is no scalar.
    Source: Song et al. 2021, eq. 12 and 16.
    """
    check_eta(eta)
    if jnp.ndim(sigma_hat) != 0:
        raise ValueError(f"sigma_hat must be one flag; got shape {jnp.shape(sigma_hat)}.")
    known_flag = not is_traced(sigma_hat)
    never, always = known_flag and not sigma_hat, known_flag and bool(sigma_hat)
    deterministic = never and is_zero(eta)

    def step(key, state, eps_fn, schedule, t, t_prev):
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        eps = predict_noise(eps_fn, state.x, t)
        noise = None if deterministic else draw_noise(key, state.x)
        if always:
            x, x0 = _sigma_hat(state.x, eps, ab, ab_prev, noise)
        else:
            x = ddim_step(state.x, eps, ab, ab_prev, eta=eta, noise=noise)
            x0 = epsilon_to_x0(eps, state.x, ab)
        if not known_flag:
            x_hat, x0_hat = _sigma_hat(state.x, eps, ab, ab_prev, noise)
            x, x0 = jnp.where(sigma_hat, x_hat, x), jnp.where(sigma_hat, x0_hat, x0)
        return SamplerState(x, x0)

    return Sampler(init_state, step)


def _sigma_hat(x, eps, ab, ab_prev, noise):
    x0 = epsilon_to_x0(clip_epsilon(eps, x, ab), x, ab)
    return sigma_hat_step(x, eps, ab, ab_prev, noise=noise), x0


def ddpm(variance: Variance = "fixed_small") -> Sampler:
    """DDPM's ancestral sampler, on any sub-sequence. See `ddpm_step` for the two variances.

    Ho et al. clip x0_hat to [-1, 1]; here that is a wrapper: `clip_x0(eps_fn, schedule)`.
    """
    check_variance(variance)

    def step(key, state, eps_fn, schedule, t, t_prev):
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        eps = predict_noise(eps_fn, state.x, t)
        noise = draw_noise(key, state.x)
        x = ddpm_step(state.x, eps, ab, ab_prev, noise=noise, variance=variance)
        return SamplerState(x, epsilon_to_x0(eps, state.x, ab))

    return Sampler(init_state, step)


def ddim_clip_data(eta: Level = 0.0, *, low: float = -1.0, high: float = 1.0) -> Sampler:
    """DDIM as diffusers runs it with `clip_sample`: x0_hat clipped, eps kept (not eq. 12)."""
    check_eta(eta)
    check_bounds(low, high)

    def step(key, state, eps_fn, schedule, t, t_prev):
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        eps = predict_noise(eps_fn, state.x, t)
        noise = None if is_zero(eta) else draw_noise(key, state.x)
        x = ddim_step_clip_data(state.x, eps, ab, ab_prev, eta=eta, noise=noise, low=low, high=high)
        return SamplerState(x, jnp.clip(epsilon_to_x0(eps, state.x, ab), low, high))

    return Sampler(init_state, step)


def sample(
    key: PRNGKey | None,
    eps_fn: EpsFn,
    schedule: Schedule,
    x_T: Data,
    timesteps: Timesteps,
    sampler: Sampler = ddim(),  # noqa: B008 (immutable)
) -> Data:
    """x_0, from noise x_T ~ N(0, I) of any shape, in exactly len(timesteps) steps.

    `key` is one key; or one for each image, shape (B,), and then image i depends on key i alone,
    whatever the batch; or None for a deterministic sampler. `timesteps` descends inside
    [0, T - 1], such as `ddim_timesteps(1000, 50)`; the last step goes to clean data.
    Keeps no trajectory: memory does not grow with the number of steps.
    Raises ValueError for timesteps out of order or range, and for an `eps_fn` that changes shapes.
    """
    state, _ = _scan(key, eps_fn, schedule, x_T, timesteps, sampler, lambda state: None)
    return state.x


def sample_trajectory(
    key: PRNGKey | None,
    eps_fn: EpsFn,
    schedule: Schedule,
    x_T: Data,
    timesteps: Timesteps,
    sampler: Sampler = ddim(),  # noqa: B008 (immutable)
) -> tuple[Float[Array, "states *shape"], Float[Array, "steps *shape"]]:
    """Every state and every data prediction of `sample`, whose arguments these are.

    states[0] is x_T and states[-1] is x_0; x0_predictions[i] is x0_hat seen from states[i].
    """
    _, (states, x0s) = _scan(
        key, eps_fn, schedule, x_T, timesteps, sampler, lambda state: (state.x, state.x0)
    )
    return jnp.concatenate([x_T[None], states]), x0s


def _scan(key, eps_fn, schedule, x_T, timesteps, sampler, output):
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"sampler must be a Sampler, such as ddim() returns; got {sampler!r}. Call it first."
        )
    check_floating("x_T", x_T)
    timesteps = check_timesteps(timesteps, schedule.num_steps)
    if key is not None:
        key = typed_key(key)
        check_keys(key, x_T)
    t_prev = jnp.append(timesteps[1:], -1)  # -1 is clean data

    def body(state, inputs):
        i, t, t_prev = inputs
        # Made in the loop: a table of keys, one for each image and step, would outgrow the images.
        step_key = None if key is None else fold_in(key, i)
        state = sampler.step(step_key, state, eps_fn, schedule, t, t_prev)
        return state, output(state)

    steps = jnp.arange(timesteps.shape[0])
    return jax.lax.scan(body, sampler.init(x_T), (steps, timesteps, t_prev))


def encode(eps_fn: EpsFn, schedule: Schedule, x_0: Data, timesteps: Timesteps) -> Data:
    """x_T, the latent from which DDIM (eta = 0) over the same timesteps recovers x_0.

    Runs eq. 12 upwards in exactly len(timesteps) steps. The network is never evaluated at clean
    data's index: the first step evaluates it at the lowest index of the list. The error of encoding
    then decoding falls as the list gets longer (section 5.4, Table 2).
    Raises ValueError for timesteps out of order or range, and for what `clip_x0` returned.
    """
    check_not_clipped(eps_fn)
    check_floating("x_0", x_0)
    ascending = check_timesteps(timesteps, schedule.num_steps)[::-1]
    t_from = jnp.append(-1, ascending[:-1])

    def body(x, inputs):
        t, t_next = inputs
        eps = predict_noise(eps_fn, x, jnp.maximum(t, ascending[0]))
        return ddim_step(x, eps, schedule.alpha_bar(t), schedule.alpha_bar(t_next)), None

    x_T, _ = jax.lax.scan(body, x_0, (t_from, ascending))
    return x_T
