"""What we make of the recorded inputs in golden/."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from inputs import GOLDEN, SCHEDULE, Arrays, named
from samplers import methods

import ddim_jax as dj
from ddim_jax.bound import bound_term, prior_bpd


def eps_fn(x: jax.Array, t: jax.Array) -> jax.Array:
    """The network of the golden files."""
    return jnp.sqrt(1 - SCHEDULE.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


@functools.partial(jax.jit, static_argnums=0)
def replay(is_sigma_hat, x_T, timesteps, noise, eta):
    """All states of the public steps with recorded noise."""

    def body(x, inputs):
        t, t_prev, z = inputs
        args = x, eps_fn(x, t), SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(t_prev)
        step = dj.sigma_hat_step(*args, noise=z) if is_sigma_hat else None
        x = dj.ddim_step(*args, eta=eta, noise=z) if step is None else step
        return x, x

    steps = timesteps, jnp.append(timesteps[1:], -1), noise
    return jax.lax.scan(body, x_T, steps)[1]


@functools.partial(jax.jit, static_argnums=0)
def draw(name, x_T, timesteps):
    sampler, network = methods(eps_fn)[name]
    return dj.sample_trajectory(None, network, SCHEDULE, x_T, timesteps, sampler)


def golden(quick: bool) -> Arrays:
    """Nothing where the files are absent."""
    if not GOLDEN.exists():
        return {}
    return named(paper=_paper(), k_diffusion=_k_diffusion(), diffusers=_diffusers(), bound=_bound())


def _cases(file: Any) -> list[str]:
    return sorted({name.rpartition("/")[0] for name in file})


def _paper() -> dict[str, Any]:
    found = {}
    with np.load(GOLDEN / "sampler_trajectories.npz") as file:
        for case in _cases(file):
            x_T, noise, ascending = (file[f"{case}/{k}"] for k in ("x_T", "noise", "timesteps"))
            eta = case.split("_", 2)[2]
            number = 0.0 if eta == "sigma_hat" else float(eta)
            found[case] = replay(eta == "sigma_hat", x_T, ascending[::-1].copy(), noise, number)
    return found


def _k_diffusion() -> dict[str, Any]:
    names = {"euler": "ddim_0", "heun": "heun", "dpmpp_2m": "dpm_solver_pp_2m"}
    with np.load(GOLDEN / "solvers.npz") as file:
        return {
            case: draw(
                names[case.rpartition("_")[0]],
                jnp.asarray(file[f"{case}/x_T"], jnp.float32),
                file[f"{case}/timesteps"],
            )
            for case in _cases(file)
            if case.rpartition("_")[0] in names
        }


def _diffusers() -> dict[str, Any]:
    with np.load(GOLDEN / "diffusers_ddim.npz") as file:
        return {
            case: draw(
                "clip_data_0" if "clip1" in case else "ddim_0",
                file[f"{case}/x_T"],
                file[f"{case}/timesteps"],
            )
            for case in _cases(file)
            if case.endswith("_0.0")
        }


def _bound() -> Any:
    with np.load(GOLDEN / "variational_bound.npz") as file:
        x0, seed = jnp.asarray(file["x0"]), int(file["noise_seed"])
    noise = np.random.default_rng(seed).standard_normal((1000, *x0.shape), np.float32)
    timesteps = np.arange(1000)[::-1].astype(np.int32)
    sigma = dj.process_sigmas(SCHEDULE, timesteps)

    def term(inputs):
        noise, t, sigma = inputs
        return bound_term(eps_fn, SCHEDULE, x0, noise, t, t - 1, sigma, sigma)

    terms = jax.lax.map(term, (jnp.asarray(noise), jnp.asarray(timesteps), sigma))
    return terms, prior_bpd(SCHEDULE, x0, 999)
