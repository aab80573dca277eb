"""The variational bound J_sigma on -log p(x0), term by term, in bits per dimension.

A process q_sigma (eq. 7) noises the data, the model p is q_sigma with x0 predicted, and

    J = KL(q(x_T | x0) || N(0, I))                                     prior
      + sum over steps of E KL(q(x_prev | x_t, x0) || p(x_prev | x_t))    steps
      + E[-log p(x0 | x_t)], t the last index                         decoder

A std sigma for each step of a sub-sequence chooses the process: `process_sigmas` gives those of the
paper's eta. Deterministic DDIM, sigma = 0, has no finite bound.
Source: Song, Meng, Ermon 2021, eq. 11 and theorem 1; Ho et al. 2020, eq. 5 and section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddim_jax.checks import (
    check_callable,
    check_floating,
    check_real,
    check_same_shape,
    check_schedule,
)
from ddim_jax.keys import draw_noise, fold_in, typed_key
from ddim_jax.numerics import as_real, expand, safe_sqrt, std_of
from ddim_jax.predict import checked_answer
from ddim_jax.steps import check_eta, is_zero
from ddim_jax.types import (
    Data,
    Denoiser,
    Level,
    NoiseSchedule,
    Prediction,
    PRNGKey,
    Time,
    Timesteps,
    is_traced,
)

Sigmas = Float[Array, "S"] | Float[np.ndarray, "S"]


class BoundTerms(NamedTuple):
    """The bound on each image's -log2 p(x0), in bits per dimension; it is the sum of all terms."""

    prior: Float[Array, "B"]
    """What the start N(0, I) costs, given that q(x_T | x0) still remembers x0."""
    steps: Float[Array, "S-1 B"]
    """One KL for each step between two indices, the noisiest first; one sample of its mean."""
    decoder: Float[Array, "B"]
    """-log2 p(x0 | x_t) of the last step, to 256 grey levels; one sample of its mean."""

    @property
    def total(self) -> Float[Array, "B"]:
        """The bound: prior + steps + decoder."""
        return self.prior + self.steps.sum(axis=0) + self.decoder


def process_sigmas(
    schedule: NoiseSchedule, timesteps: Timesteps, eta: Level = 1.0
) -> Float[Array, "S"]:
    """Std of each step's noise for the paper's eta (eq. 16); 1 is DDPM's "fixed_small".

    The step to clean data would have none; it takes that of the step before, as DDPM does.
    Raises ValueError for eta <= 0, for fewer than two timesteps, and for a repeated one.
    """
    check_eta(eta)
    if is_zero(eta):
        raise ValueError(
            f"eta must be positive; got {eta}. The bound of a deterministic process is infinite."
        )
    t, t_prev = _steps(schedule, timesteps)
    if t.shape[0] < 2:
        raise ValueError(
            "timesteps must be at least two, since the decoder takes the std of the step before; "
            f"got {t.shape[0]}."
        )
    kept_share = schedule.noise_variance(t_prev) / schedule.noise_variance(t)
    eta = as_real("eta", eta)
    sigma = (
        jnp.where(eta > 0, eta, jnp.nan) * safe_sqrt(kept_share) * _fresh_std(schedule, t, t_prev)
    )
    return sigma.at[-1].set(sigma[-2])


def fixed_large_sigmas(schedule: NoiseSchedule, timesteps: Timesteps) -> Float[Array, "S"]:
    """Std of each step's noise for DDPM's "fixed_large", a choice for the model but no process.

    To clean data it takes the small variance of the step before. Raises as `process_sigmas` does.
    Source: Ho et al. 2020, section 3.2, and its code.
    """
    decoder = process_sigmas(schedule, timesteps)[-1]
    t, t_prev = _steps(schedule, timesteps)
    return _fresh_std(schedule, t, t_prev).at[-1].set(decoder)


def _fresh_std(schedule: NoiseSchedule, t: Time, t_prev: Time) -> Float[Array, "S"]:
    """sqrt(1 - ab / ab_prev), each difference taken where its terms are small."""
    ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    added = schedule.noise_variance(t) - schedule.noise_variance(t_prev)
    return safe_sqrt(jnp.where(ab_prev < 0.5, ab_prev - ab, added) / ab_prev)


def variational_bound(
    key: PRNGKey,
    eps_fn: Denoiser,
    schedule: NoiseSchedule,
    x0: Data,
    timesteps: Timesteps,
    sigma: Sigmas,
    model_sigma: Sigmas | None = None,
) -> BoundTerms:
    """An unbiased estimate of J_sigma for images x0 (B, ...), in S = len(timesteps) network calls.

    x0 holds 8-bit grey levels k as k / 127.5 - 1. `key` is one key, or (B,) of them, and then image
    i depends on key i alone; index t's noise depends on (key, t). `timesteps` descend strictly.
    `sigma` (S,) are the stds of `process_sigmas`, or any others with
    0 < sigma^2 <= 1 - alpha_bar_prev (above it the terms are NaN); the last is the decoder's, and
    free. `model_sigma` gives p other stds than q's, such as `fixed_large_sigmas`.
    Raises ValueError for timesteps or sigmas that are known to break these rules.
    """
    check_callable("eps_fn", eps_fn)
    check_floating("x0", x0)
    t, t_prev = _steps(schedule, timesteps)
    sigma = _check_sigmas("sigma", sigma, t.shape[0])
    model_sigma = sigma if model_sigma is None else model_sigma
    model_sigma = _check_sigmas("model_sigma", model_sigma, t.shape[0])
    key = typed_key(key)

    def body(_, inputs):
        t, t_prev, sigma, model_sigma = inputs
        noise = draw_noise(fold_in(key, t), x0).astype(x0.dtype)
        term = bound_term(eps_fn, schedule, x0, noise, t, t_prev, sigma, model_sigma)
        return None, term

    _, terms = jax.lax.scan(body, None, (t, t_prev, sigma, model_sigma))
    return BoundTerms(prior_bpd(schedule, x0, t[0]), terms[:-1], terms[-1])


def bound_term(
    eps_fn: Denoiser,
    schedule: NoiseSchedule,
    x0: Data,
    noise: Data,
    t: Time,
    t_prev: Time,
    sigma: Level,
    model_sigma: Level,
) -> Float[Array, "B"]:
    """One step's term in bits per dimension, seen at x_t = `add_noise`(x0, noise, t).

    The KL of the step from t to t_prev; or the decoder's -log2 p(x0 | x_t) if t_prev is -1.
    """
    check_same_shape("noise", noise, x0)
    signal = expand("signal", jnp.sqrt(schedule.alpha_bar(t)), x0)
    std = expand("std", safe_sqrt(schedule.noise_variance(t)), x0)
    x_t = (signal * x0 + std * noise).astype(x0.dtype)
    x0_error = _x0_error(checked_answer(eps_fn, x_t, jnp.asarray(t)), x0, noise, signal, std)

    def decoder():
        return -discretized_log_likelihood(x0, x0 + x0_error, model_sigma)

    def kl():
        c = expand("c", _x0_coefficient(schedule, t, t_prev, sigma), x0)
        return gaussian_kl(c * x0_error, sigma, jnp.zeros_like(x0_error), model_sigma)

    return _bits_per_dim(jax.lax.cond(schedule.is_clean(t_prev), decoder, kl))


def _x0_error(
    answer: jax.Array | Prediction, x0: Data, noise: Data, signal: jax.Array, std: jax.Array
) -> jax.Array:
    """x0_hat less x0, seen at signal x0 + std noise."""
    # Eq. 9 less x0: written as a difference of large numbers it would lose what the bound measures.
    if not isinstance(answer, Prediction):
        return std / signal * (noise - answer)
    # Where there is more noise than signal, or no signal at all, the difference is the better one.
    clear = signal > std
    by_eps = std / jnp.where(clear, signal, 1.0) * (noise - answer.eps)
    return jnp.where(clear, by_eps, answer.x0 - x0)


def _x0_coefficient(
    schedule: NoiseSchedule, t: Time, t_prev: Time, sigma: Level
) -> Float[Array, "*"]:
    """By how much x0 moves the mean of q_sigma(x_prev | x_t, x0), eq. 7; 1 if x_prev is x0."""
    fresh = jnp.where(schedule.is_clean(t_prev), 0.0, sigma)
    kept = std_of(schedule.noise_variance(t_prev) - fresh**2)
    signal_to_noise = jnp.sqrt(schedule.alpha_bar(t) / schedule.noise_variance(t))
    return jnp.sqrt(schedule.alpha_bar(t_prev)) - kept * signal_to_noise


def prior_bpd(schedule: NoiseSchedule, x0: Data, t: Time) -> Float[Array, "B"]:
    """KL(q(x_t | x0) || N(0, I)) in bits per dimension, t the index the sampler starts at."""
    mean, std = jnp.sqrt(schedule.alpha_bar(t)) * x0, jnp.sqrt(schedule.noise_variance(t))
    return _bits_per_dim(gaussian_kl(mean, std, jnp.zeros_like(x0), 1.0))


def gaussian_kl(mean: Data, std: Level, other_mean: Data, other_std: Level) -> Data:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)) in nats, element by element."""
    std, other_std = expand("std", std, mean), expand("other_std", other_std, mean)
    ratio = (std / other_std) ** 2
    # Two parts that are each 0 or more, so that a small KL is no difference of large numbers.
    return (ratio - 1 - jnp.log(ratio) + ((mean - other_mean) / other_std) ** 2) / 2


def discretized_log_likelihood(x0: Data, mean: Data, std: Level) -> Data:
    """log p of the grey level x0 under N(mean, std^2) summed over its bin, in nats per element.

    The 256 levels k / 127.5 - 1 share the real line: each has the bin of width 2 / 255 around it,
    the first and the last reach to infinity; p sums to 1 over them. The normal distribution
    function is the tanh form that published bounds use, within 3e-4 of the exact one.
    Source: Ho et al. 2020, section 3.3 and its code; Page 1977 (doi:10.2307/2346872).
    """
    scale = expand("std", std, x0)
    upper = _normal_logit((x0 + 1 / 255 - mean) / scale)
    lower = _normal_logit((x0 - 1 / 255 - mean) / scale)
    below_upper = jax.nn.log_sigmoid(upper)
    above_lower = jax.nn.log_sigmoid(-lower)
    # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), exact in the far tails too.
    inside = below_upper + above_lower + jnp.log(-jnp.expm1(lower - upper))
    return jnp.where(x0 < -0.999, below_upper, jnp.where(x0 > 0.999, above_lower, inside))


def _normal_logit(z: jax.Array) -> jax.Array:
    """The normal distribution function at z, as the logit of its probability."""
    return jnp.sqrt(8 / jnp.pi) * (z + 0.044715 * z**3)


def variational_weights(
    schedule: NoiseSchedule, timesteps: Timesteps, sigma: Sigmas
) -> Float[Array, "S"]:
    """gamma for which J_sigma = sum over steps of gamma E||eps - eps_fn||^2 + C, in nats.

    The squared error is summed over the data's dimensions; C holds what no network changes. The
    last gamma is a Gaussian decoder's, before its discretisation to grey levels.

        gamma = c^2 (1 - ab) / (2 sigma^2 ab), with c = 1 for the decoder, else
        c = sqrt(ab_prev) - sqrt((1 - ab_prev - sigma^2) ab / (1 - ab))

    Source: theorem 1; its proof prints 1 / (2 sigma^2 ab), without the other factors.
    """
    t, t_prev = _steps(schedule, timesteps)
    sigma = _check_sigmas("sigma", sigma, t.shape[0])
    c = _x0_coefficient(schedule, t, t_prev, sigma)
    return c**2 * schedule.noise_variance(t) / (2 * sigma**2 * schedule.alpha_bar(t))


def _steps(schedule: NoiseSchedule, timesteps: Timesteps) -> tuple[jax.Array, jax.Array]:
    """The time each step starts from, and the one it goes to; the last goes to clean data."""
    check_schedule(schedule)
    t = schedule.check_timesteps(timesteps)
    if not is_traced(timesteps) and np.any(np.diff(np.asarray(timesteps)) == 0):
        raise ValueError(
            "timesteps must descend strictly for a variational bound: a repeated index is no step. "
            "Use np.unique(timesteps)[::-1]."
        )
    return t, jnp.append(t[1:], schedule.clean)


def _check_sigmas(name: str, sigma: Sigmas, num_steps: int) -> Float[Array, "S"]:
    check_real(name, sigma)
    if jnp.shape(sigma) != (num_steps,):
        raise ValueError(
            f"{name} must have one std for each timestep, shape {(num_steps,)}; "
            f"got {jnp.shape(sigma)}."
        )
    if not is_traced(sigma) and not np.all(np.asarray(sigma) > 0):
        raise ValueError(
            f"{name} must be positive; got a smallest value of {np.min(sigma)}. The last entry is "
            "the decoder's std: see process_sigmas."
        )
    return jnp.asarray(sigma)


def _bits_per_dim(nats: jax.Array) -> Float[Array, "B"]:
    return nats.mean(axis=tuple(range(1, nats.ndim))) / jnp.log(2.0)
