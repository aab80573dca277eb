"""All that the two layouts call differently, in one place: what exists decides.

The old one is that of commit e310e7d. Everything here asks the tree that it runs in the root of.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ddim_jax as dj

TREE = pathlib.Path.cwd()
EXPERIMENTS = TREE / "experiments"
SHARED_NAMES = {
    "same_latent.py": ("same_latent.py", "consistency.py"),
    # The old make_statistics.py is a module of statistics.py and does nothing when run.
    "make_statistics.py": ("statistics.py", "make_statistics.py"),
}
"""Script -> its names, the one to run first. Every other script has one name."""


def script(name: str) -> pathlib.Path:
    """The script of the tree, by its new name."""
    paths = [EXPERIMENTS / n for n in SHARED_NAMES.get(name, (name,))]
    return next((path for path in paths if path.exists()), paths[0])


def sigma_hat_options() -> str:
    """What sample.py is told."""
    is_flag = "sigma_hat: bool" in script("sample.py").read_text()
    return "--sigma-hat" if is_flag else "--sampler sigma_hat"


def sweep_cell(line: Mapping[str, Any]) -> tuple[str, Mapping[str, float]]:
    """The name and the distances of a line of results.jsonl."""
    row = line.get("sampler") if line["eta"] is None else line["eta"]
    return f"S {line['S']}, {row}", line["values"] if "values" in line else line["distances"]


def sigma_hat() -> dj.Sampler:
    """The paper's sigma-hat steps."""
    return dj.sigma_hat() if hasattr(dj, "sigma_hat") else dj.ddim(sigma_hat=True)


def clip_data(eta: float, eps_fn: Any, schedule: Any) -> tuple[dj.Sampler, Any]:
    """diffusers' habit and its network: a sampler of its own, or a wrapper of the network."""
    if hasattr(dj, "clip_x0_keep_eps"):
        return dj.ddim(eta), dj.clip_x0_keep_eps(eps_fn, schedule)
    return dj.ddim_clip_data(eta), eps_fn


def antithetic_timesteps(key: Any, indices: Any, batch_size: int, schedule: Any) -> Any:
    """The old one takes the number of steps."""
    wants_schedule = "schedule" in inspect.signature(dj.antithetic_timesteps).parameters
    last = schedule if wants_schedule else schedule.num_steps
    return dj.antithetic_timesteps(key, indices, batch_size, last)


@functools.cache
def pixel_functions() -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """to_model_range and to_uint8."""
    try:
        from ddim_jax.data import pixels
    except ImportError:
        from ddim_jax import data as pixels
    return pixels.to_model_range, pixels.to_uint8
