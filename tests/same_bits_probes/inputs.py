"""What goes into the library, made with NumPy, and a name for whatever comes out."""

from __future__ import annotations

import os
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as dj
from ddim_jax.unet import UNet

GOLDEN = pathlib.Path(os.environ.get("DDIM_JAX_SHARED", "../shared")) / "golden"
"""Recorded inputs and outputs of other people's code; may be absent."""

Arrays = dict[str, np.ndarray]

SCHEDULE = dj.linear_schedule()
KEY = jax.random.key(7)
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8, 1), np.float32))
KEYS = jax.random.split(KEY, len(X))
LISTS = {
    "uniform": dj.ddim_timesteps(1000, 7),
    "quadratic": dj.ddim_timesteps(1000, 7, "quadratic"),
    "own": np.array([997, 640, 640, 333, 90, 3, 1], np.int32),
}
SMALL = UNet(
    image_channels=1,
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
)


def named(**trees: Any) -> Arrays:
    """Every leaf of the trees under its path; keys as their numbers, bfloat16 as float32."""

    def array(leaf: Any) -> np.ndarray:
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = np.asarray(leaf)
        return leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf

    flat, _ = jax.tree_util.tree_flatten_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): array(a) for path, a in flat}


def mixture(x: jax.Array, t: jax.Array) -> jax.Array:
    """A network in closed form; the data it predicts leave [-1, 1] at times."""
    level = SCHEDULE.alpha_bar(t)
    level = level.reshape(level.shape + (1,) * (x.ndim - level.ndim)).astype(x.dtype)
    return jnp.sqrt(1 - level) * jnp.tanh(x) + 0.3 * jnp.sqrt(level) * jnp.tanh(2 * x - 0.5)


def scaled_mixture(scale: jax.Array) -> Any:
    return lambda x, t: mixture(scale * x, t)


def tanh(x: jax.Array, t: jax.Array) -> jax.Array:
    return 0.9 * jnp.tanh(x)


def weights(model: UNet, x: jax.Array, *label: Any) -> Any:
    """Weights from the parameters' names, none of them 0."""

    def weight(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape, np.float32)
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.1 * a)
        return jnp.asarray(
            a / np.float32(np.sqrt(np.prod(leaf.shape[:-1]))) if a.ndim > 1 else 0.1 * a
        )

    shapes = jax.eval_shape(model.init, jax.random.key(0), x, 0, *label)["params"]
    return jax.tree_util.tree_map_with_path(weight, shapes)


def unet(params: Any) -> Any:
    return lambda x, t: SMALL.apply({"params": params}, x, t)
