"""Random numbers that belong to an image, not to a batch.

Everything random about image i comes from fold_in(key, i), so a sample or an example is the same
whatever the batch size, the number of devices or where a run was resumed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddim_jax.types import PRNGKey

Indices = Int[Array, "B"] | Int[np.ndarray, "B"]


def image_keys(key: PRNGKey, indices: Indices) -> PRNGKey:
    """One key for each image index, shape (B,): fold_in(key, i)."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(typed_key(key), jnp.asarray(indices))


def initial_noise(
    key: PRNGKey, indices: Indices, image_shape: tuple[int, ...]
) -> tuple[Float[Array, "B ..."], PRNGKey]:
    """x_T and the keys for `sample` of the images with these indices, from one seed key.

    Image i depends on (key, i) alone, whatever the batch size or the number of devices.
    """
    keys = jax.vmap(lambda k: jax.random.split(k))(image_keys(key, indices))
    x_T = jax.vmap(lambda k: jax.random.normal(k, image_shape))(keys[:, 0])
    return x_T, keys[:, 1]


def draw_noise(key: PRNGKey | None, x: jax.Array) -> jax.Array:
    """Standard normal noise of x's shape, at least float32; with keys (B,), image i from key i."""
    if key is None:
        raise ValueError("key must be a PRNG key for a sampler that draws noise; got None.")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if key.ndim == 0:
        return jax.random.normal(key, x.shape, dtype)
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], dtype))(key)


def typed_key(key: PRNGKey) -> jax.Array:
    """The key as a typed key array; an old-style uint32 key becomes one."""
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
