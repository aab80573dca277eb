"""Random numbers that belong to an image, not to a batch.

Everything random about image i comes from fold_in(key, i), so a sample or an example is the same
whatever the batch size, the number of devices or where a run was resumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ddim_jax.checks import check_floating, check_indices, check_seed
from ddim_jax.types import PRNGKey, Time

Indices = Int[Array, "B"] | Int[np.ndarray, "B"]


def seed_key(seed: int) -> Key[Array, ""]:
    """The key of a seed in [0, 2**32), of the same generator whatever JAX's default is.

    So that (seed, i) names an image. Raises ValueError for another seed: JAX would wrap it.
    """
    check_seed(seed)
    return jax.random.key(seed, impl="threefry2x32")


def image_keys(key: PRNGKey, indices: Indices) -> Key[Array, "B"]:
    """One key for each image index, shape (B,): fold_in(key, i).

    Raises ValueError for indices that are no vector of integers, and for more keys than one.
    """
    key, indices = typed_key(key), as_indices(indices)
    if key.ndim != 0:
        raise ValueError(f"key must be one key, of all images; got keys of shape {key.shape}.")
    return draw_each(jax.random.fold_in, key, indices)


def as_indices(indices: Indices) -> jax.Array:
    """Names of images as an array (B,); ValueError for what is none, or would be another's."""
    check_indices("indices", indices)
    return jnp.asarray(indices)


def initial_noise(
    key: PRNGKey,
    indices: Indices,
    image_shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B ..."], Key[Array, "B"]]:
    """x_T and the keys for `sample` of the images with these indices, from one seed key.

    Image i depends on (key, i) alone, whatever the batch size or the number of devices.
    """
    keys = draw_each(jax.random.split, image_keys(key, indices))
    whole = isinstance(image_shape, tuple | list) and all(
        isinstance(n, int | np.integer) and n >= 0 for n in image_shape
    )
    if not whole:
        raise ValueError(
            "image_shape must be a tuple of whole numbers, such as (32, 32, 3); got "
            f"{image_shape!r}."
        )
    image_shape = tuple(image_shape)
    x_T = draw_each(lambda k: jax.random.normal(k, image_shape, dtype), keys[:, 0])
    return x_T, keys[:, 1]


def draw_noise(key: PRNGKey | None, x: jax.Array) -> jax.Array:
    """Standard normal noise of x's shape, at least float32; with keys (B,), image i from key i.

    For a sampler's step, whose key may be either. Raises ValueError for what is no key, or for
    another number of keys than x has images.
    """
    check_floating("x", x)
    key = typed_key(key)
    check_keys(key, x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if key.ndim == 0:
        return jax.random.normal(key, x.shape, dtype)
    return draw_each(lambda k: jax.random.normal(k, x.shape[1:], dtype), key)


def fold_in(key: PRNGKey, i: Time) -> PRNGKey:
    """The key, or each of the keys (B,), with i folded in: one number, or one for each key.

    A float32 counts as the whole number with its bits. So a sampler that draws more than once in a
    step has a key for each: `draw_noise(fold_in(key, 1), x)`.
    """
    key = typed_key(key)
    if jnp.issubdtype(jnp.result_type(i), jnp.floating):
        i = jax.lax.bitcast_convert_type(jnp.asarray(i, jnp.float32), jnp.int32)
    if key.ndim == 0:
        return jax.random.fold_in(key, i)
    return draw_each(jax.random.fold_in, key, jnp.asarray(i))


def draw_each(draw: Callable[..., jax.Array], key: PRNGKey, *args: jax.Array) -> jax.Array:
    """draw(key, *args) for each entry of those that have a leading axis (B,), stacked.

    A key or a number without one is for all.
    """
    inputs = (key, *args)
    # Not broadcast: on a mesh the copies would be split otherwise than what has an axis.
    axes = tuple(0 if a.ndim else None for a in inputs)
    if jax.random.key_impl(key) == "threefry2x32":
        return jax.vmap(draw, axes)(*inputs)
    # Under vmap the hardware generators (rbg) would draw everything from the batch's first key.
    rows = [a for a in inputs if a.ndim]

    def one(row: list[jax.Array]) -> jax.Array:
        entries = iter(row)
        return draw(*(next(entries) if a.ndim else a for a in inputs))

    return jax.lax.map(one, rows)


def check_keys(key: PRNGKey, x: jax.Array) -> None:
    """Raise ValueError unless `key`, typed, is one key or one for each entry of x's first axis."""
    if key.ndim != 0 and key.shape != x.shape[:1]:
        raise ValueError(
            f"key must be one key, or one for each of the {x.shape[:1]} images; got {key.shape}."
        )


def typed_key(key: PRNGKey | None) -> jax.Array:
    """The key as a typed key array; an old-style uint32 key becomes one."""
    if isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32:
        with contextlib.suppress(TypeError):  # another number of words
            return jax.random.wrap_key_data(jnp.asarray(key))
    raise ValueError(f"key must be a PRNG key, such as jax.random.key(0); got {key!r}.")
