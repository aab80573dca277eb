"""Samplers that solve DDIM's ordinary differential equation with other methods than DDIM.

Each is a `Sampler` for `sample`, deterministic (its key may be None). The names say what a step
does in the coordinates of ode.py; each step is a DDIM step given a better eps or x0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddim_jax.ode import from_ode_coordinates, noise_to_signal, to_ode_coordinates
from ddim_jax.predict import epsilon_to_x0, expand_level, predict_noise, x0_to_epsilon
from ddim_jax.samplers import Sampler, SamplerState, init_state
from ddim_jax.steps import ddim_step
from ddim_jax.types import Data


def heun() -> Sampler:
    """Heun's second-order method: a DDIM step with the mean of the slopes at both its ends.

    2 S - 1 network calls in S steps: the last step, to clean data, is a plain DDIM step, because
    the network knows no slope there. Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
    """

    def step(key, state, eps_fn, schedule, t, t_prev):
        del key
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        eps = predict_noise(eps_fn, state.x, t)
        euler = ddim_step(state.x, eps, ab, ab_prev)

        def corrected():
            eps_prev = predict_noise(eps_fn, euler, t_prev)
            return ddim_step(state.x, (eps + eps_prev) / 2, ab, ab_prev)

        # A cond and not a where, so that the last step does not pay for a second call.
        x = jax.lax.cond(t_prev < 0, lambda: euler, corrected)
        return SamplerState(x, epsilon_to_x0(eps, state.x, ab))

    return Sampler(init_state, step)


class MultistepState(NamedTuple):
    """What the next step extrapolates from."""

    x: jax.Array
    """The state x_t."""
    x0: jax.Array
    """x0_hat of the step that led here (eq. 9); zeros before the first step."""
    t: jax.Array
    """The index x0 was predicted at; -1 before the first step."""
    slope: jax.Array
    """Change of x0_hat for each unit of log SNR, as last seen; zeros before two predictions."""


def dpm_solver_pp_2m() -> Sampler:
    """DPM-Solver++(2M): a DDIM step with x0 extrapolated from this prediction and the one before.

    S network calls in S steps, second order. The first step and the last are DDIM's.
    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
    """

    def init(x_T: Data) -> MultistepState:
        zeros = jnp.zeros_like(x_T)
        return MultistepState(x_T, zeros, jnp.asarray(-1, jnp.int32), zeros)

    def step(key, state, eps_fn, schedule, t, t_prev):
        del key
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        x0 = epsilon_to_x0(predict_noise(eps_fn, state.x, t), state.x, ab)

        log_snr = schedule.log_snr(t)  # +inf at -1, clean data
        done = log_snr - schedule.log_snr(state.t)
        moved = done > 0  # not before the first step, nor at a repeated index
        slope = jnp.where(moved, (x0 - state.x0) / jnp.where(moved, done, 1.0), state.slope)
        ahead = jnp.where(t_prev < 0, 0.0, schedule.log_snr(t_prev) - log_snr)
        midway_x0 = (x0 + ahead / 2 * slope).astype(x0.dtype)

        x = ddim_step(state.x, x0_to_epsilon(midway_x0, state.x, ab), ab, ab_prev)
        return MultistepState(x, x0, jnp.asarray(t, jnp.int32), slope.astype(x0.dtype))

    return Sampler(init, step)


def probability_flow_euler() -> Sampler:
    """Euler's method for the same equation in s^2, where DDIM's is in s (see ode.py).

    What Song et al. call Euler for the probability-flow ODE: equal to DDIM in the limit of many
    steps, worse in few. S network calls. Source: Song, Meng, Ermon 2021, eq. 15.
    """

    def step(key, state, eps_fn, schedule, t, t_prev):
        del key
        ab = schedule.alpha_bar(t)
        eps = predict_noise(eps_fn, state.x, t)
        x_bar, s = to_ode_coordinates(state.x, ab)
        s_prev = noise_to_signal(schedule.alpha_bar(t_prev))
        x_bar = x_bar + expand_level((s_prev**2 - s**2) / (2 * s), x_bar) * eps
        x = from_ode_coordinates(x_bar, s_prev).astype(state.x.dtype)
        return SamplerState(x, epsilon_to_x0(eps, state.x, ab))

    return Sampler(init_state, step)
