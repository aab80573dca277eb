"""DDIM as an ordinary differential equation.

In x_bar = x / sqrt(alpha_bar) and s = sqrt((1 - alpha_bar) / alpha_bar), the noise in units of the
signal, the deterministic sampler is Euler's method for

    d x_bar / d s = eps_fn(x_bar / sqrt(s^2 + 1))        Song et al. 2021, eq. 13 and 14

from s at the first index down to s = 0, clean data.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddim_jax.checks import check_callable, check_floating, check_schedule, check_std
from ddim_jax.numerics import as_level, expand, expand_level, safe_sqrt
from ddim_jax.predict import predict_noise
from ddim_jax.types import Data, Denoiser, Level, NoiseSchedule

OdeField = Callable[[jax.Array, jax.Array], jax.Array]
"""(x_bar, s) -> d x_bar / d s, of x_bar's shape; s is a scalar."""


def noise_to_signal(alpha_bar: Level) -> Float[Array, "*level"]:
    """s = sqrt((1 - alpha_bar) / alpha_bar), the ODE's time: 0 for clean data, growing with t."""
    level = as_level(alpha_bar)
    return safe_sqrt((1 - level) / level)


def to_ode_coordinates(x_t: Data, alpha_bar: Level) -> tuple[Data, Float[Array, "*level"]]:
    """(x_bar, s) of a state x_t at level alpha_bar in (0, 1]; x_bar is at least float32."""
    check_floating("x_t", x_t)
    return x_t / safe_sqrt(expand_level(alpha_bar, x_t)), noise_to_signal(alpha_bar)


def from_ode_coordinates(x_bar: Data, s: Level) -> Data:
    """The state x_t = x_bar / sqrt(s^2 + 1), whose level is alpha_bar = 1 / (s^2 + 1)."""
    check_floating("x_bar", x_bar)
    check_std("s", s)
    s = expand("s", s, x_bar)
    return x_bar / jnp.sqrt(jnp.where(s >= 0, s, jnp.nan) ** 2 + 1)


def ode_field(eps_fn: Denoiser, schedule: NoiseSchedule) -> OdeField:
    """The right-hand side of eq. 14, for any ODE solver: field(x_bar, s) = d x_bar / d s.

    `eps_fn` knows whole indices only, so it is asked at the one whose level is nearest to s on a
    log scale. That is exact at the schedule's own levels; between them, the field is what the
    network believes at the nearest. Below the lowest level (down to clean data, s = 0) and above
    the highest, it is asked at the lowest and the highest index.
    """
    check_callable("eps_fn", eps_fn)
    check_schedule(schedule)

    def field(x_bar: jax.Array, s: jax.Array) -> jax.Array:
        t = schedule.nearest(-2 * jnp.log(s))
        return predict_noise(eps_fn, from_ode_coordinates(x_bar, s), t)

    return field
