"""The rest of the pure library: bound, losses, single functions, schedules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import layout
import numpy as np
from inputs import (
    KEY,
    KEYS,
    SCHEDULE,
    SMALL,
    Arrays,
    X,
    mixture,
    named,
    scaled_mixture,
    unet,
    weights,
)

import ddim_jax as dj


def bound(quick: bool) -> Arrays:
    timesteps, x0 = dj.ddim_timesteps(1000, 20), jnp.round((jnp.tanh(X) + 1) * 127.5) / 127.5 - 1
    small = {eta: dj.process_sigmas(SCHEDULE, timesteps, eta) for eta in (0.3, 1.0)}
    large = dj.fixed_large_sigmas(SCHEDULE, timesteps)

    @jax.jit
    def terms(key, sigma, model_sigma):
        bound = dj.variational_bound(key, mixture, SCHEDULE, x0, timesteps, sigma, model_sigma)
        return bound._asdict() | {"total": bound.total}

    return named(
        process_sigmas=small,
        fixed_large_sigmas=large,
        weights={eta: dj.variational_weights(SCHEDULE, timesteps, s) for eta, s in small.items()},
        bound={eta: terms(KEY, sigma, sigma) for eta, sigma in small.items()},
        bound_fixed_large=terms(KEYS, small[1.0], large),
    )


def losses(quick: bool) -> Arrays:
    x0 = jnp.tanh(X)
    cases = {
        "l2": (KEY, {}),
        "l1_key_per_image": (KEYS, {"norm": "l1"}),
        "given_t": (KEYS, {"t": jnp.array([0, 500, 999])}),
    }
    networks: dict[str, Any] = {"mixture": (scaled_mixture, jnp.float32(0.9))}
    if not quick:  # takes long to compile
        networks["unet"] = unet, weights(SMALL, X)
    found: dict[str, Any] = {}
    for name, (network, params) in networks.items():
        for case, (key, options) in cases.items():

            def loss(params, network=network, key=key, options=options):
                each = dj.eps_loss(key, network(params), SCHEDULE, x0, **options)
                return each.mean(), each

            found[f"{name}/{case}"] = jax.jit(jax.grad(loss, has_aux=True))(params)
            found[f"{name}/{case}/not_jitted"] = loss(params) if name == "mixture" else ()
    indices = layout.antithetic_timesteps(KEY, jnp.arange(9), 9, SCHEDULE)
    return named(antithetic=indices, **found)


def pieces(quick: bool) -> Arrays:
    """Forward side, single steps, conversions, latents, pixels, keys: jitted."""
    eps, noise = jnp.roll(X, 1), jnp.flip(X, 1)
    kinds = ("epsilon", "x0", "v", "score")
    to_model_range, to_uint8 = layout.pixel_functions()

    @jax.jit
    def found(t, ab, ab_prev):
        args = X, eps, ab, ab_prev
        other = {f"{a}_to_{b}": getattr(dj, f"{a}_to_{b}") for a in kinds for b in kinds if a != b}
        x_bar, s = dj.to_ode_coordinates(X, ab)
        return {
            **{name: convert(eps, X, ab) for name, convert in other.items()},
            "add_noise": [dj.add_noise(SCHEDULE, X, eps, at) for at in (t, 500, -1)],
            "ddpm_posterior": dj.ddpm_posterior(X, eps, ab, ab_prev),
            "posterior_mean": dj.posterior_mean(X, eps, ab, ab_prev, dj.ddim_sigma(ab, ab_prev)),
            "ddim_sigma": [dj.ddim_sigma(ab, ab_prev, eta) for eta in (0.0, 0.3, 1.0)],
            "ddim_sigma_hat": dj.ddim_sigma_hat(ab, ab_prev),
            "ddim_step": [dj.ddim_step(*args, eta=eta, noise=noise) for eta in (0.0, 0.3, 1.0)],
            "ddpm_step": dj.ddpm_step(*args, noise=noise),
            "ddpm_step_large": dj.ddpm_step(*args, noise=noise, variance="fixed_large"),
            "sigma_hat_step": dj.sigma_hat_step(*args, noise=noise),
            "ode": [x_bar, s, dj.from_ode_coordinates(x_bar, s)],
            "ode_field": dj.ode_field(mixture, SCHEDULE)(X, jnp.float32(1.5)),
            "lines": [dj.interpolation_line(X[0], X[1], 5, f) for f in (dj.slerp, dj.lerp)],
            "grid": dj.interpolation_grid(jnp.concatenate([X, eps[:1]]), 3, 4),
            "pixels": [to_uint8(X), to_model_range(to_uint8(X))],
            "initial_noise": dj.initial_noise(KEY, t, (4, 3)),
            "image_keys": dj.image_keys(KEY, t),
        }

    t, t_prev = jnp.array([999, 500, 20]), jnp.array([800, 499, 3])
    return named(**found(t, SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(t_prev)))


def schedules(quick: bool) -> Arrays:
    every = {f.__name__: f() for f in
             (dj.linear_schedule, dj.scaled_linear_schedule, dj.cosine_schedule)}  # fmt: skip
    every["from_betas"] = dj.schedule_from_betas(np.linspace(1e-3, 0.3, 40))
    spacings = ("uniform", "quadratic", "linspace", "trailing")
    t = jnp.arange(-1, 40)
    tables = {
        name: [s.alphas_cumprod, s.noise_variances, s.alpha_bar(t), s.noise_variance(t),
               s.log_snr(t)] for name, s in every.items()
    }  # fmt: skip
    lists = {f"{k}/{S}": dj.ddim_timesteps(1000, S, k) for k in spacings for S in (1, 7, 50, 1000)}
    return named(tables=tables, timesteps=lists)


LIBRARY = (bound, losses, pieces, schedules)
