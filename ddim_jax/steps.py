"""One reverse step: arrays in, arrays out, no schedule and no network.

Every step is given the level it starts from and the level it goes to, and never guesses the second
from the first: any sub-sequence, encoding and distillation then come for free. What the network
predicted comes as eps, or as the pair `Prediction(x0, eps)`, which is used as it is.
Source of all: Song, Meng, Ermon 2021 (arXiv:2010.02502), whose alpha is our alpha_bar.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddim_jax.checks import check_one_of, check_same_shape
from ddim_jax.numerics import as_level, as_real, expand, expand_level, noise_kept, safe_sqrt
from ddim_jax.predict import as_prediction, clip_prediction
from ddim_jax.types import Data, Level, Prediction, is_traced

Variance = Literal["fixed_small", "fixed_large"]


def ddim_sigma(alpha_bar: Level, alpha_bar_prev: Level, eta: Level = 1.0) -> Float[Array, "*level"]:
    """Std of the noise one DDIM step adds, in data units (data in [-1, 1]).

    Both levels lie in [0, 1]; stepping towards more noise (encoding) gives 0. NaN in, NaN out.
    eta = 0 is DDIM, eta = 1 is DDPM with its smaller variance. Raises ValueError for eta < 0.
    Source: eq. 16.
    """
    check_eta(eta)
    ab, ab_prev = as_level(alpha_bar), as_level(alpha_bar_prev, "alpha_bar_prev")
    eta = as_real("eta", eta)
    eta = jnp.where(eta >= 0, eta, jnp.nan)  # of one that is traced
    # Encoding's first step starts from clean data, where 1 - ab is 0: there the ratio is not used.
    noise = jnp.where(ab == 1, 1.0, 1 - ab)
    return eta * safe_sqrt((1 - ab_prev) / noise * (1 - _ratio(ab, ab_prev)))


def ddim_sigma_hat(alpha_bar: Level, alpha_bar_prev: Level) -> Float[Array, "*level"]:
    """Std of the noise of the paper's sigma-hat and of DDPM's larger variance, in data units.

    sqrt(1 - alpha_bar / alpha_bar_prev), but 0 when stepping to clean data, as published.
    Source: appendix D.3; Ho et al. 2020, section 3.2 (beta_t).
    """
    ab, ab_prev = as_level(alpha_bar), as_level(alpha_bar_prev, "alpha_bar_prev")
    return jnp.where(ab_prev == 1, 0.0, safe_sqrt(1 - _ratio(ab, ab_prev)))


def _ratio(ab: jax.Array, ab_prev: jax.Array) -> jax.Array:
    """min(ab / ab_prev, 1), also where both are 0: no step towards more noise adds any."""
    upwards = ab >= ab_prev
    return jnp.where(upwards, 1.0, ab / jnp.where(upwards, 1.0, ab_prev))


def ddim_step(
    x_t: Data,
    eps: Data | Prediction,
    alpha_bar: Level,
    alpha_bar_prev: Level,
    *,
    eta: Level = 0.0,
    noise: Data | None = None,
) -> Data:
    """x_prev, one step from level `alpha_bar` to level `alpha_bar_prev`.

        x_prev = sqrt(ab_prev) x0_hat + sqrt(1 - ab_prev - sigma^2) eps + sigma noise

    `eps` is the predicted noise, or the pair of x0_hat and it; `noise` is standard normal. All have
    x_t's shape, any shape. Levels lie in (0, 1], or in [0, 1] with a pair, and may go either way
    (encoding: eta = 0). `eta` may be traced. An eta so large that sigma^2 > 1 - ab_prev gives NaN.
    Raises ValueError for eta < 0, and for an eta other than 0 without noise. Source: eq. 12.
    """
    sigma = ddim_sigma(alpha_bar, alpha_bar_prev, eta)
    prediction = as_prediction(eps, x_t, alpha_bar)
    _check_noise(eta, noise)
    return step_towards(prediction, alpha_bar_prev, sigma, sigma, noise).astype(x_t.dtype)


def ddpm_step(
    x_t: Data,
    eps: Data | Prediction,
    alpha_bar: Level,
    alpha_bar_prev: Level,
    *,
    noise: Data,
    variance: Variance = "fixed_small",
) -> Data:
    """x_prev, one ancestral step of DDPM: the posterior's mean at x0_hat, plus noise.

    `variance` "fixed_small" is the posterior's (this is `ddim_step` with eta = 1), "fixed_large" is
    1 - alpha_bar / alpha_bar_prev; the step to clean data adds none.
    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 2 and section 3.2.
    """
    check_variance(variance)
    check_same_shape("noise", noise, x_t)
    small = ddim_sigma(alpha_bar, alpha_bar_prev, 1.0)
    std = small if variance == "fixed_small" else ddim_sigma_hat(alpha_bar, alpha_bar_prev)
    prediction = as_prediction(eps, x_t, alpha_bar)
    return step_towards(prediction, alpha_bar_prev, small, std, noise).astype(x_t.dtype)


def sigma_hat_step(
    x_t: Data, eps: Data | Prediction, alpha_bar: Level, alpha_bar_prev: Level, *, noise: Data
) -> Data:
    """x_prev, one step of the paper's sigma-hat rows: DDPM's larger variance, x0_hat in [-1, 1].

    Source: appendix D.3; the clamp, from which eps is re-derived, is the published code's.
    """
    clipped = clip_prediction(as_prediction(eps, x_t, alpha_bar), x_t, alpha_bar)
    return ddpm_step(x_t, clipped, alpha_bar, alpha_bar_prev, noise=noise, variance="fixed_large")


def step_towards(
    prediction: Prediction,
    alpha_bar_prev: Level,
    sigma: Level,
    noise_std: Level,
    noise: Data | None,
) -> jax.Array:
    """Eq. 12 itself, in at least float32; without `noise`, its mean.

    The mean leaves room for noise of std `sigma`, and noise of std `noise_std` is added. In the
    paper's family the two are one; its sigma-hat, and DDPM's larger variance, add more.
    """
    x0, eps = prediction
    ab_prev = expand_level(alpha_bar_prev, x0, "alpha_bar_prev")
    sigma = expand("sigma", sigma, x0)
    fresh = 0.0
    if noise is not None:
        check_same_shape("noise", noise, x0)
        fresh = expand("noise_std", noise_std, x0) * noise
    return safe_sqrt(ab_prev) * x0 + noise_kept(ab_prev, sigma) * eps + fresh


def _check_noise(eta: Level, noise: Data | None) -> None:
    if noise is None and not is_zero(eta):
        raise ValueError(
            f"noise must be given when eta is not 0; got eta={eta} and noise=None. "
            "Pass jax.random.normal(key, x_t.shape), or eta=0.0."
        )


def check_variance(variance: str) -> None:
    """Raise ValueError unless `variance` is one of DDPM's two."""
    check_one_of("variance", variance, get_args(Variance))


def is_zero(eta: Level) -> bool:
    """Whether eta is known, now, to be 0; a traced eta is not."""
    return not is_traced(eta) and bool(np.all(np.asarray(eta) == 0))


def check_eta(eta: Level) -> None:
    """Raise ValueError for a known eta that is no number, or below 0; a traced one is not known."""
    if is_traced(eta):
        return
    real = isinstance(eta, int | float | np.ndarray | np.generic | jax.Array)
    known = np.asarray(eta if real else np.nan)
    real = any(jnp.issubdtype(known.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not (real and np.all(known >= 0)):
        raise ValueError(f"eta must be at least 0 (0 is DDIM, 1 is DDPM); got {eta!r}.")
