"""Sampling methods, and the scans that run them.

A `Sampler` is two pure functions; `sample` scans its step over a sub-sequence of times.
Nothing here is jitted: wrap the call in `jax.jit` together with your network. To add a sampler,
write one function that returns a `Sampler`; solvers.py has three to copy from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ddim_jax.checks import check_callable, check_floating, check_schedule
from ddim_jax.denoisers import check_not_clipped
from ddim_jax.keys import check_keys, draw_noise, fold_in, typed_key
from ddim_jax.predict import checked_answer, clip_prediction, predict, predict_noise
from ddim_jax.steps import (
    Variance,
    check_eta,
    check_variance,
    ddim_sigma,
    ddim_sigma_hat,
    ddim_step,
    is_zero,
    step_towards,
)
from ddim_jax.types import (
    Data,
    Denoiser,
    Level,
    NoiseSchedule,
    Prediction,
    PRNGKey,
    Timesteps,
    is_traced,
)


class SamplerState(NamedTuple):
    """What the next step needs, and the prediction a person wants to see."""

    x: jax.Array
    """The state x_t, any shape."""
    x0: jax.Array
    """x0_hat of the step that led here (eq. 9), same shape; zeros before the first step."""


def one_call_a_step(num_steps: int) -> int:
    """Network calls of most samplers: as many as there are steps."""
    return num_steps


class Sampler(NamedTuple):
    """A sampling method: `init` makes its state of x_T, and `step` goes from one time to the next.

    init(x_T) -> state
        Any pytree with fields `x` and `x0`, as `SamplerState` is; `init_state` makes that one. A
        method that looks back keeps what it needs in fields of its own.
    step(key, state, eps_fn, schedule, t, t_prev) -> state at t_prev
        `key` is this step's: one key for all images, or one for each, shape (B,), or None, with
        which a method that draws nothing is content. `draw_noise(key, state.x)` takes the first
        two and refuses the third; for a second draw, `fold_in(key, 1)` is another key.
        `eps_fn(x, t)` is eps or a `Prediction`; `ddim_step` takes either. `t_prev` may be
        `schedule.clean`, clean data, of which no network is asked anything.
    network_calls(S) -> int
        How often the network is evaluated in S steps, the last of them to clean data.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[..., Any]
    network_calls: Callable[[int], int] = one_call_a_step


def init_state(x_T: Data) -> SamplerState:
    """The state most samplers start from."""
    return SamplerState(x=x_T, x0=jnp.zeros_like(x_T))


def ddim(eta: Level = 0.0) -> Sampler:
    """DDIM with the paper's eta: 0 is deterministic, 1 is DDPM, between them the family of eq. 16.

    eta may be traced, so that one compiled program serves every eta.
    Raises ValueError for a known eta below 0. Source: Song et al. 2021, eq. 12 and 16.
    """
    check_eta(eta)

    def stds(ab: Level, ab_prev: Level) -> tuple[Level, Level]:
        sigma = ddim_sigma(ab, ab_prev, eta)
        return sigma, sigma

    return _eq_12(stds, noisy=not is_zero(eta))


def sigma_hat() -> Sampler:
    """The paper's sigma-hat rows: DDPM with its larger variance and x0_hat clamped to [-1, 1].

    Source: Song et al. 2021, appendix D.3; the clamp is the published code's. See `sigma_hat_step`.
    """
    return _eq_12(_larger_stds, clips=True)


def ddpm(variance: Variance = "fixed_small") -> Sampler:
    """DDPM's ancestral sampler, on any sub-sequence. See `ddpm_step` for the two variances.

    Ho et al. clip x0_hat to [-1, 1]; here that is a wrapper: `clip_x0(eps_fn, schedule)`.
    """
    check_variance(variance)
    return ddim(1.0) if variance == "fixed_small" else _eq_12(_larger_stds)


def ddim_or_sigma_hat(eta: Level, is_sigma_hat: Bool[Array, ""] | bool) -> Sampler:
    """`sigma_hat()` where the flag is true, else `ddim(eta)`: both may be traced.

    So that one compiled program, with the network in it once, serves every row of the paper's
    Table 1: the flag selects two stds, and whether the prediction is clamped.
    Raises ValueError for a known eta below 0, and for a flag that is no scalar.
    """
    check_eta(eta)
    one_flag = isinstance(is_sigma_hat, bool) or (
        getattr(is_sigma_hat, "dtype", None) == np.bool_ and jnp.ndim(is_sigma_hat) == 0
    )
    if not one_flag:
        raise ValueError(f"is_sigma_hat must be one flag, true or false; got {is_sigma_hat!r}.")

    def stds(ab: Level, ab_prev: Level) -> tuple[Level, Level]:
        sigma = ddim_sigma(ab, ab_prev, eta)
        room, std = _larger_stds(ab, ab_prev)
        return jnp.where(is_sigma_hat, room, sigma), jnp.where(is_sigma_hat, std, sigma)

    return _eq_12(stds, clips=is_sigma_hat)


def _larger_stds(ab: Level, ab_prev: Level) -> tuple[Level, Level]:
    """What the mean leaves room for, which is DDPM's, and what is added, which is more."""
    return ddim_sigma(ab, ab_prev, 1.0), ddim_sigma_hat(ab, ab_prev)


def _eq_12(
    stds: Callable[[Level, Level], tuple[Level, Level]],
    *,
    noisy: bool = True,
    clips: Bool[Array, ""] | bool = False,
) -> Sampler:
    """A sampler of the paper's family: eq. 12 with the two stds of `step_towards`."""

    def step(key, state, eps_fn, schedule, t, t_prev):
        x, ab, ab_prev = state.x, schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        noise = draw_noise(key, x) if noisy else None
        predicted = predict(eps_fn, x, t, ab)

        def after(prediction: Prediction) -> SamplerState:
            x_prev = step_towards(prediction, ab_prev, *stds(ab, ab_prev), noise)
            return SamplerState(x_prev.astype(x.dtype), prediction.x0.astype(x.dtype))

        if clips is False:
            return after(predicted)
        clamped = after(clip_prediction(predicted, x, ab))
        if clips is True:
            return clamped
        # Of the two ends, not of the predictions: so an unclamped row keeps the bits of `ddim`.
        return jax.tree.map(lambda a, b: jnp.where(clips, a, b), clamped, after(predicted))

    return Sampler(init_state, step)


def sample(
    key: PRNGKey | None,
    eps_fn: Denoiser,
    schedule: NoiseSchedule,
    x_T: Data,
    timesteps: Timesteps,
    sampler: Sampler | None = None,
) -> Data:
    """x_0, from noise x_T ~ N(0, I) of any shape, in exactly len(timesteps) steps.

    `sampler` is `ddim()` unless given. `key` is one key; or one for each image, shape (B,), and
    then image i depends on key i alone, whatever the batch; or None for a deterministic sampler.
    `eps_fn` returns the noise it predicts, or a `Prediction`. `timesteps` descends inside
    [0, T - 1], such as `ddim_timesteps(1000, 50)`; the last step goes to clean data.
    Keeps no trajectory: memory does not grow with the number of steps.
    Raises ValueError for timesteps out of order or range, for an `eps_fn` that changes shapes, and
    for one of noise alone where alpha_bar is 0.
    """
    state, _ = _scan(key, eps_fn, schedule, x_T, timesteps, sampler, lambda state: None)
    return state.x


def sample_trajectory(
    key: PRNGKey | None,
    eps_fn: Denoiser,
    schedule: NoiseSchedule,
    x_T: Data,
    timesteps: Timesteps,
    sampler: Sampler | None = None,
) -> tuple[Float[Array, "states *shape"], Float[Array, "steps *shape"]]:
    """Every state and every data prediction of `sample`, whose arguments these are.

    states[0] is x_T and states[-1] is x_0; x0_predictions[i] is x0_hat seen from states[i].
    """
    _, (states, x0s) = _scan(
        key, eps_fn, schedule, x_T, timesteps, sampler, lambda state: (state.x, state.x0)
    )
    return jnp.concatenate([x_T[None], states]), x0s


def _scan(key, eps_fn, schedule, x_T, timesteps, sampler, output):
    sampler = ddim() if sampler is None else sampler
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"sampler must be a Sampler, such as ddim() and named_sampler(name) return; got "
            f"{sampler!r}. Call it first."
        )
    check_callable("eps_fn", eps_fn)
    check_schedule(schedule)
    check_floating("x_T", x_T)
    given, timesteps = timesteps, schedule.check_timesteps(timesteps)
    _check_tells_data(eps_fn, schedule, x_T, given)
    if key is not None:
        key = typed_key(key)
        check_keys(key, x_T)
    t_prev = jnp.append(timesteps[1:], schedule.clean)

    def body(state, inputs):
        i, t, t_prev = inputs
        # Made in the loop: a table of keys, one for each image and step, would outgrow the images.
        step_key = None if key is None else fold_in(key, i)
        state = sampler.step(step_key, state, eps_fn, schedule, t, t_prev)
        return state, output(state)

    steps = jnp.arange(timesteps.shape[0])
    return jax.lax.scan(body, sampler.init(x_T), (steps, timesteps, t_prev))


def _check_tells_data(
    eps_fn: Denoiser, schedule: NoiseSchedule, x: Data, timesteps: Timesteps
) -> None:
    """Raise ValueError for a network of noise alone at alpha_bar = 0, where it says nothing of x0.

    Where the level is only known inside jit, samples are NaN.
    """
    table = getattr(schedule, "alphas_cumprod", None)  # a `Schedule`'s; others keep some signal
    if table is None or is_traced(table) or is_traced(timesteps):
        return
    t = np.asarray(timesteps)[0]
    if np.asarray(table)[t] > 0:
        return
    answer = jax.eval_shape(lambda x, t: checked_answer(eps_fn, x, t), x, t)
    if not isinstance(answer, Prediction):
        raise ValueError(
            f"eps_fn must tell the data too where alpha_bar is 0, as at the first time, {t}; it "
            "returns noise alone, which says nothing of the data there. Wrap a network of v or x0 "
            "by from_v or from_x0; one of noise needs a schedule that keeps some signal."
        )


def encode(eps_fn: Denoiser, schedule: NoiseSchedule, x_0: Data, timesteps: Timesteps) -> Data:
    """x_T, the latent from which DDIM (eta = 0) over the same timesteps recovers x_0.

    Runs eq. 12 upwards in exactly len(timesteps) steps. The network is never evaluated at clean
    data's index: the first step evaluates it at the lowest index of the list. The error of encoding
    then decoding falls as the list gets longer (section 5.4, Table 2). One step from clean data
    straight to alpha_bar = 0 forgets the image.
    Raises ValueError for timesteps out of order or range, and for a network that clips; where that
    is only known inside jit, x_T is NaN (`check_not_clipped`).
    """
    check_callable("eps_fn", eps_fn)
    check_schedule(schedule)
    check_floating("x_0", x_0)
    ascending = schedule.check_timesteps(timesteps)[::-1]
    x_0 = check_not_clipped(eps_fn, schedule, x_0, ascending)
    t_from = jnp.append(schedule.clean, ascending[:-1])

    def body(x, inputs):
        t, t_next = inputs
        # Of a pair eps alone: on the first step x is clean data, which is not where it was asked.
        eps = predict_noise(eps_fn, x, jnp.maximum(t, ascending[0]))
        return ddim_step(x, eps, schedule.alpha_bar(t), schedule.alpha_bar(t_next)), None

    x_T, _ = jax.lax.scan(body, x_0, (t_from, ascending))
    return x_T
