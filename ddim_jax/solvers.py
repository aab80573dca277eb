"""Samplers that solve DDIM's ordinary differential equation with other methods than DDIM.

Each is a `Sampler` for `sample`, deterministic (its key may be None). The names say what a step
does in the coordinates of ode.py; each step is a DDIM step given a better eps or x0. `SAMPLERS` is
the table of all samplers, by the names that command lines and tables use.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddim_jax.checks import look_up
from ddim_jax.numerics import expand
from ddim_jax.ode import from_ode_coordinates, noise_to_signal, to_ode_coordinates
from ddim_jax.predict import predict, predict_noise, x0_to_epsilon
from ddim_jax.samplers import Sampler, SamplerState, ddim, ddpm, init_state, sigma_hat
from ddim_jax.steps import check_eta, ddim_step, is_zero
from ddim_jax.types import Data, Level, Prediction


def heun() -> Sampler:
    """Heun's second-order method: a DDIM step with the mean of the slopes at both its ends.

    2 S - 1 network calls in S steps: the last step, to clean data, is a plain DDIM step, because
    the network knows no slope there. Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
    """

    def step(key, state, eps_fn, schedule, t, t_prev):
        del key
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        here = predict(eps_fn, state.x, t, ab)
        euler = ddim_step(state.x, here, ab, ab_prev)

        def corrected():
            eps_prev = predict_noise(eps_fn, euler, t_prev)
            return ddim_step(state.x, (here.eps + eps_prev) / 2, ab, ab_prev)

        # A cond and not a where, so that the last step does not pay for a second call. Where
        # alpha_bar is 0, so far from the data that no slope is finite, DDIM's step is the limit.
        x = jax.lax.cond(schedule.is_clean(t_prev) | (ab <= 0), lambda: euler, corrected)
        return SamplerState(x, here.x0.astype(x.dtype))

    return Sampler(init_state, step, network_calls=lambda num_steps: 2 * num_steps - 1)


class MultistepState(NamedTuple):
    """What the next step extrapolates from."""

    x: jax.Array
    """The state x_t."""
    x0: jax.Array
    """x0_hat of the step that led here (eq. 9); zeros before the first step."""
    log_snr: jax.Array
    """Log SNR at which x0 was predicted; +inf before the first step."""
    slope: jax.Array
    """Change of x0_hat for each unit of log SNR, as last seen; zeros before two predictions."""


def dpm_solver_pp_2m() -> Sampler:
    """DPM-Solver++(2M): a DDIM step with x0 extrapolated from this prediction and the one before.

    S network calls in S steps, second order. The first step and the last are DDIM's.
    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
    """

    def init(x_T: Data) -> MultistepState:
        zeros = jnp.zeros_like(x_T)
        return MultistepState(x_T, zeros, jnp.asarray(jnp.inf, jnp.result_type(float)), zeros)

    def step(key, state, eps_fn, schedule, t, t_prev):
        del key
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        x0 = predict(eps_fn, state.x, t, ab).x0.astype(state.x.dtype)

        log_snr = schedule.log_snr(t)
        done = log_snr - state.log_snr
        moved = done > 0  # not before the first step, nor at a repeated index
        slope = jnp.where(moved, (x0 - state.x0) / jnp.where(moved, done, 1.0), state.slope)
        # To clean data, or from alpha_bar = 0, the way is infinitely long.
        endless = schedule.is_clean(t_prev) | (ab <= 0)
        ahead = jnp.where(endless, 0.0, schedule.log_snr(t_prev) - log_snr)
        midway_x0 = (x0 + ahead / 2 * slope).astype(x0.dtype)

        midway = Prediction(midway_x0, x0_to_epsilon(midway_x0, state.x, ab))
        x = ddim_step(state.x, midway, ab, ab_prev)
        log_snr = log_snr.astype(state.log_snr.dtype)
        return MultistepState(x, x0, log_snr, slope.astype(x0.dtype))

    return Sampler(init, step)


def probability_flow_euler() -> Sampler:
    """Euler's method for the same equation in s^2, where DDIM's is in s (see ode.py).

    What Song et al. call Euler for the probability-flow ODE: equal to DDIM in the limit of many
    steps, worse in few. S network calls. From alpha_bar = 0, where s is infinite, it gives NaN.
    Source: Song, Meng, Ermon 2021, eq. 15.
    """

    def step(key, state, eps_fn, schedule, t, t_prev):
        del key
        ab = schedule.alpha_bar(t)
        here = predict(eps_fn, state.x, t, ab)
        x_bar, s = to_ode_coordinates(state.x, ab)
        s_prev = noise_to_signal(schedule.alpha_bar(t_prev))
        x_bar = x_bar + expand("step", (s_prev**2 - s**2) / (2 * s), x_bar) * here.eps
        x = from_ode_coordinates(x_bar, s_prev).astype(state.x.dtype)
        return SamplerState(x, here.x0.astype(x.dtype))

    return Sampler(init_state, step)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": ddim,
    "sigma_hat": sigma_hat,
    "ddpm": ddpm,
    "ddpm_fixed_large": lambda: ddpm("fixed_large"),
    "heun": heun,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "probability_flow_euler": probability_flow_euler,
}
"""Name -> sampler: what a command line or a table's row may say. A new one is an entry here."""


def takes_eta(name: str) -> bool:
    """Whether the sampler of that name has an eta. ValueError for an unknown name, listing all."""
    return "eta" in inspect.signature(look_up("sampler", name, SAMPLERS)).parameters


def named_sampler(name: str, eta: Level = 0.0) -> Sampler:
    """The sampler of that name; `eta` is for those whose function takes one, as ddim's does.

    Raises ValueError for an unknown name, listing all, and for an eta other than 0 with a sampler
    that has none.
    """
    check_eta(eta)
    if takes_eta(name):
        return SAMPLERS[name](eta=eta)
    if not is_zero(eta):
        raise ValueError(f"eta must be left out for the sampler {name}, which has none; got {eta}.")
    return SAMPLERS[name]()
