"""The training objective L_gamma, one loss for each example."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddim_jax.keys import check_keys, draw_each, draw_noise, image_keys, typed_key
from ddim_jax.predict import check_floating, predict_noise
from ddim_jax.process import add_noise
from ddim_jax.schedule import Schedule
from ddim_jax.types import Data, EpsFn, PRNGKey

Norm = Literal["l2", "l1"]


def eps_loss(
    key: PRNGKey,
    eps_fn: EpsFn,
    schedule: Schedule,
    x0: Data,
    *,
    t: Int[Array, "*index"] | None = None,
    norm: Norm = "l2",
) -> Float[Array, "*index"]:
    """How far eps_fn is from the noise that was added: one number for each example, float32.

    x0 is (B, ...) in [-1, 1]. `t` of shape (B,) picks the noise levels; without it they are drawn
    uniformly and independently. `key` is one key, or (B,) of them, and then example i depends on
    key i alone. "l2" is the squared error, "l1" the absolute one, each a mean over the data's axes;
    for the paper's code, which sums, multiply by x0[0].size.
    Differentiable in whatever eps_fn closes over.
    Source: eq. 5 with gamma = 1; Ho et al. 2020, algorithm 1.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}; got {norm!r}.")
    check_floating("x0", x0)
    if x0.ndim == 0:
        raise ValueError("x0 must have a leading axis of examples; got a scalar.")
    key = typed_key(key)
    check_keys(key, x0)
    t_key, eps_key = _split(key)
    if t is None:
        t = _draw_timesteps(t_key, x0.shape[0], schedule.num_steps)
    t = jnp.asarray(t)
    eps = draw_noise(eps_key, x0)
    x_t = add_noise(schedule, x0, eps.astype(x0.dtype), t)
    error = eps - predict_noise(eps_fn, x_t, t)
    distance = jnp.square(error) if norm == "l2" else jnp.abs(error)
    return distance.mean(axis=tuple(range(t.ndim, x0.ndim)))


def antithetic_timesteps(
    key: PRNGKey, indices: Int[Array, "B"], batch_size: int, num_steps: int
) -> Int[Array, "B"]:
    """Time indices of a batch's examples `indices`, drawn in pairs t and T - 1 - t.

    The batch's first batch_size // 2 + 1 indices are drawn, the rest mirror them in order, so an
    example's index depends on (key, its place, batch_size) and not on how the batch is sharded.
    Source: the paper's code, which calls it antithetic sampling.
    """
    num_drawn = batch_size // 2 + 1
    mirrored = indices >= num_drawn
    keys = image_keys(key, jnp.where(mirrored, indices - num_drawn, indices))
    t = _draw_timesteps(keys, indices.shape[0], num_steps)
    return jnp.where(mirrored, num_steps - 1 - t, t)


def _split(key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    if key.ndim == 0:
        first, second = jax.random.split(key)
        return first, second
    keys = draw_each(jax.random.split, key)
    return keys[:, 0], keys[:, 1]


def _draw_timesteps(key: PRNGKey, batch_size: int, num_steps: int) -> Int[Array, "B"]:
    if key.ndim == 0:
        return jax.random.randint(key, (batch_size,), 0, num_steps)
    return draw_each(lambda k: jax.random.randint(k, (), 0, num_steps), key)
