"""The forward side: noising data, and the posteriors the reverse steps imitate."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddim_jax.checks import check_floating, check_same_shape, check_schedule, check_std
from ddim_jax.numerics import as_level, expand, expand_level, noise_kept, safe_sqrt
from ddim_jax.types import Data, Level, NoiseSchedule, Time


def add_noise(schedule: NoiseSchedule, x0: Data, eps: Data, t: Time) -> Data:
    """Noisy data x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.

    `t` is a scalar or has x0's leading axes, such as (B,) for a batch; t = -1 returns x0, an index
    outside the schedule gives NaN. The result has x0's dtype.
    Source: Song et al. 2021 (arXiv:2010.02502), eq. 4.
    """
    check_schedule(schedule)
    check_floating("x0", x0)
    check_same_shape("eps", eps, x0)
    alpha_bar = expand_level(schedule.alpha_bar(t), x0)
    return (safe_sqrt(alpha_bar) * x0 + safe_sqrt(1 - alpha_bar) * eps).astype(x0.dtype)


def posterior_mean(
    x0: Data, x_t: Data, alpha_bar: Level, alpha_bar_prev: Level, sigma: Level
) -> Data:
    """Mean of q_sigma(x_prev | x_t, x0) = N(mean, sigma^2 I), sigma^2 <= 1 - alpha_bar_prev.

    Whatever sigma is, composing it with q(x_t | x0) gives the marginal q(x_prev | x0); a sigma
    above the bound, which no process has, gives NaN.
    Source: Song et al. 2021, eq. 7.
    """
    check_floating("x_t", x_t)
    check_same_shape("x0", x0, x_t)
    ab = expand_level(alpha_bar, x_t)
    ab_prev = expand_level(alpha_bar_prev, x_t, "alpha_bar_prev")
    check_std("sigma", sigma)
    sigma = expand("sigma", sigma, x_t)
    sigma = jnp.where(sigma >= 0, sigma, jnp.nan)  # of one that is traced
    direction = noise_kept(ab_prev, sigma) / safe_sqrt(1 - ab)
    return (safe_sqrt(ab_prev) * x0 + direction * (x_t - safe_sqrt(ab) * x0)).astype(x_t.dtype)


def ddpm_posterior(
    x0: Data, x_t: Data, alpha_bar: Level, alpha_bar_prev: Level
) -> tuple[Data, Float[Array, "*level"]]:
    """Mean and variance of DDPM's posterior q(x_prev | x_t, x0).

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 6-7, with 1 - beta = alpha_bar / alpha_bar_prev,
    so that it holds between any two levels and not only neighbours.
    """
    check_floating("x_t", x_t)
    check_same_shape("x0", x0, x_t)
    ab = expand_level(alpha_bar, x_t)
    ab_prev = expand_level(alpha_bar_prev, x_t, "alpha_bar_prev")
    alpha = ab / ab_prev
    mean = (safe_sqrt(ab_prev) * (1 - alpha) * x0 + safe_sqrt(alpha) * (1 - ab_prev) * x_t) / (
        1 - ab
    )
    level, level_prev = as_level(alpha_bar), as_level(alpha_bar_prev, "alpha_bar_prev")
    variance = (1 - level_prev) / (1 - level) * (1 - level / level_prev)
    return mean.astype(x_t.dtype), jnp.maximum(variance, 0.0)
