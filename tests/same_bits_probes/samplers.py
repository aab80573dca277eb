"""Every sampler on every kind of network and list of indices, and encoding back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import layout
from inputs import KEY, KEYS, LISTS, SCHEDULE, SMALL, Arrays, X, mixture, named, tanh, unet, weights

import ddim_jax as dj


def methods(eps_fn: Any) -> dict[str, tuple[dj.Sampler, Any]]:
    """Every sampler, and the network it is given."""
    clipped = dj.clip_x0(eps_fn, SCHEDULE)
    return {
        "ddim_0": (dj.ddim(), eps_fn),
        "ddim_0.3": (dj.ddim(0.3), eps_fn),
        "ddim_1": (dj.ddim(1.0), eps_fn),
        "sigma_hat": (layout.sigma_hat(), eps_fn),
        "ddpm": (dj.ddpm(), eps_fn),
        "ddpm_fixed_large": (dj.ddpm("fixed_large"), eps_fn),
        "clip_x0_0": (dj.ddim(), clipped),
        "clip_x0_0.3": (dj.ddim(0.3), clipped),
        "clip_x0_ddpm": (dj.ddpm(), clipped),
        "clip_data_0": layout.clip_data(0.0, eps_fn, SCHEDULE),
        "clip_data_0.5": layout.clip_data(0.5, eps_fn, SCHEDULE),
        "heun": (dj.heun(), eps_fn),
        "dpm_solver_pp_2m": (dj.dpm_solver_pp_2m(), eps_fn),
        "probability_flow_euler": (dj.probability_flow_euler(), eps_fn),
    }


Runs = Sequence[tuple[Any, str]]
EVERY_RUN: Runs = [
    (run, kind) for run in (dj.sample_trajectory, dj.sample) for kind in ("one_key", "keys")
]


def sampled(network: Callable[[Any], Any], params: Any, names: Iterable[str], runs: Runs) -> Arrays:
    """Each sampler on each list of indices, with one key or with a key for each image."""
    found = {}
    for name in names:
        for run, kind in runs:

            def draw(params, key, timesteps, run=run, name=name):
                sampler, eps_fn = methods(network(params))[name]
                return run(key, eps_fn, SCHEDULE, X, timesteps, sampler)

            program, key = jax.jit(draw), KEY if kind == "one_key" else KEYS
            for grid, timesteps in LISTS.items():
                what = f"{name}/{run.__name__}/{kind}/{grid}"
                found[what] = program(params, key, timesteps)
    return named(**found)


def samplers(quick: bool) -> Arrays:
    runs = [(dj.sample_trajectory, "keys")] if quick else EVERY_RUN
    return sampled(lambda _: mixture, {}, methods(mixture), runs)


def samplers_unet(quick: bool) -> Arrays:
    names = ("ddim_0.3", "sigma_hat", "dpm_solver_pp_2m") if quick else methods(mixture)
    runs = [(dj.sample, "keys")] if quick else EVERY_RUN
    return sampled(unet, weights(SMALL, X), names, runs)


def samplers_otherwise(quick: bool) -> Arrays:
    """Indices that jit knows, bfloat16, no jit, and an eta that jit does not know."""
    found: dict[str, Any] = {}
    uniform = LISTS["uniform"]
    some = ("ddim_0.3", "sigma_hat", "clip_data_0.5", "heun", "dpm_solver_pp_2m")
    for name in some if quick else methods(mixture):
        sampler, eps_fn = methods(mixture)[name]
        draw = functools.partial(dj.sample, KEY, eps_fn, SCHEDULE)
        program = jax.jit(lambda x, draw=draw, sampler=sampler: draw(x, uniform, sampler))
        found[f"known_indices/{name}"] = program(X)
        if not quick or name in ("ddim_0.3", "sigma_hat"):
            found[f"bfloat16/{name}"] = program(X.astype(jnp.bfloat16))
        if not quick:
            found[f"not_jitted/{name}"] = draw(X, uniform, sampler)
    draw = functools.partial(dj.sample, KEY, mixture, SCHEDULE, X, uniform)
    traced = jax.jit(lambda eta: draw(dj.ddim(eta)))
    return named(**found, **{f"traced_eta/{eta}": traced(eta) for eta in (0.0, 0.3, 1.0)})


def wrapped(quick: bool) -> Arrays:
    """Networks that predict something else, and two of them: what they draw."""
    networks = {f.__name__: f(tanh, SCHEDULE) for f in (dj.from_v, dj.from_x0)}
    networks["from_score"] = dj.from_score(lambda x, t: -tanh(x, t), SCHEDULE)
    networks["guided"] = dj.guided(mixture, tanh, 2.5)

    def draw(eps_fn: Any, eta: float) -> jax.Array:
        return dj.sample(KEY, eps_fn, SCHEDULE, X, LISTS["quadratic"], dj.ddim(eta))

    found = {
        f"{name}/{eta}": jax.jit(lambda f=f, eta=eta: draw(f, eta))()
        for name, f in networks.items()
        for eta in ((0.5,) if quick else (0.0, 0.5))
    }
    scaled = jax.jit(lambda scale: draw(dj.guided(mixture, tanh, scale), 0.5))
    return named(**found, guided_traced=scaled(1.7))


def encoding(quick: bool) -> Arrays:
    @functools.partial(jax.jit, static_argnums=0)
    def latents(network, params):
        args = network(params), SCHEDULE, jnp.tanh(X), LISTS["quadratic"]
        iterations = (3,) if quick else (1, 3, 6)
        return dj.encode(*args), *(dj.encode_fixed_point(*args, n) for n in iterations)

    unet_latents = latents(unet, weights(SMALL, X))
    return named(mixture=latents(lambda _: mixture, {}), unet=unet_latents)


SAMPLERS = (samplers, samplers_unet, samplers_otherwise, wrapped, encoding)
