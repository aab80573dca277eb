"""Training as pure functions: a state, a loss, a step.

`train_step` runs as it is under `jax.jit`, and under `pmap` when it is given the axis's name
(parallel.py does that). Everything random about an example is drawn from (seed, step, its place in
the global batch), so one device and many compute the same update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ddim_jax.data import to_model_range
from ddim_jax.keys import image_keys
from ddim_jax.losses import Norm, antithetic_timesteps, eps_loss
from ddim_jax.schedule import Schedule
from ddim_jax.types import PRNGKey

Params = Any
Batch = Mapping[str, Array]
LossFn = Callable[[Params, PRNGKey, Int[Array, "B"], Batch], Float[Array, "B"]]
"""(params, key of this step, places in the global batch, batch) -> one loss for each example."""


class TrainState(NamedTuple):
    """All a run needs to go on; saved and restored as one pytree."""

    step: jax.Array
    """Updates done so far, an int32 scalar."""
    params: Params
    ema_params: Params
    """Moving average of params: the weights to sample with."""
    opt_state: optax.OptState
    key: jax.Array
    """Never changes; step i uses fold_in(key, i)."""


def init_train_state(key: PRNGKey, params: Params, tx: optax.GradientTransformation) -> TrainState:
    """State before the first step; the average starts as a copy of `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # a copy, since the state's buffers are donated
        opt_state=tx.init(params),
        key=key,
    )


def adam_with_warmup(
    learning_rate: float, warmup_steps: int = 0, clip_norm: float | None = 1.0
) -> optax.GradientTransformation:
    """DDPM's optimizer: Adam, a linear warm-up from 0, gradients clipped by their global norm.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; warm-up and clipping as in its code.
    """
    rate = optax.warmup_constant_schedule(0.0, learning_rate, warmup_steps)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    # Without warm-up the schedule would start at 0; adam takes a number as well.
    return optax.chain(clip, optax.adam(rate if warmup_steps else learning_rate))


def diffusion_loss(
    apply_fn: Callable[..., Any],
    schedule: Schedule,
    *,
    batch_size: int,
    norm: Norm = "l2",
    reduction: Literal["mean", "sum"] = "mean",
    timesteps: Literal["independent", "antithetic"] = "independent",
    flip: bool = False,
    num_classes: int | None = None,
    label_dropout: float = 0.0,
) -> LossFn:
    """Loss of a network on batches of uint8 images (B, H, W, C), one number for each example.

    `apply_fn` is a Flax model's `apply`: it is called as
    `apply_fn({"params": params}, x, t, train=True, rngs={"dropout": key})`; with `num_classes` the
    batch's "label" stands after t, and a share `label_dropout` of the examples has the label
    num_classes, "no class", in its place, as classifier-free guidance needs it (Ho & Salimans 2022,
    arXiv:2207.12598, algorithm 1). `flip` mirrors images left to right at random. `batch_size` is
    the global one, which antithetic time indices need.
    reduction "mean" with independent indices is DDPM's recipe; "sum" over the pixels with
    antithetic ones is the recipe of the paper's torch code. Source: eq. 5 with gamma = 1.
    """
    if not 0 <= label_dropout < 1 or (label_dropout and num_classes is None):
        raise ValueError(
            f"label_dropout must be in [0, 1), and 0 without num_classes; got {label_dropout} with "
            f"num_classes {num_classes}."
        )

    def example_loss(params, key, t, image, label):
        flip_key, loss_key, dropout_key = jax.random.split(key, 3)
        x0 = to_model_range(image)
        if flip:
            x0 = jnp.where(jax.random.bernoulli(flip_key), x0[:, ::-1], x0)

        if label_dropout and num_classes is not None:
            dropped = jax.random.bernoulli(jax.random.fold_in(key, 3), label_dropout)
            label = jnp.where(dropped, num_classes, label)

        def eps_fn(x, t):
            labels = () if label is None else (label,)
            rngs = {"dropout": dropout_key}
            return apply_fn({"params": params}, x, t, *labels, train=True, rngs=rngs)

        loss = eps_loss(loss_key, eps_fn, schedule, x0, t=t, norm=norm)
        return loss * x0.size if reduction == "sum" else loss

    num_steps = schedule.num_steps

    def loss_fn(params, key, indices, batch):
        if jax.random.key_impl(key) != "threefry2x32":
            raise ValueError(
                "key must be of the threefry2x32 generator: under vmap the hardware generators "
                f"give every example the same noise; got {jax.random.key_impl(key)}. "
                'Make it with jax.random.key(seed, impl="threefry2x32").'
            )
        t_key, key = jax.random.split(key)
        if timesteps == "antithetic":
            t = antithetic_timesteps(t_key, indices, batch_size, num_steps)
        else:
            draw = functools.partial(jax.random.randint, shape=(), minval=0, maxval=num_steps)
            t = jax.vmap(draw)(image_keys(t_key, indices))
        label = None if num_classes is None else batch["label"]
        # One example at a time under vmap: its dropout too then depends on its own key alone.
        return jax.vmap(example_loss, in_axes=(None, 0, 0, 0, 0))(
            params, image_keys(key, indices), t, batch["image"], label
        )

    return loss_fn


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    axis_name: str | None = None,
    num_microbatches: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The next state, and metrics "loss" and "grad_norm" (before clipping), float32 scalars.

    `batch` holds this device's share of the global batch, in order. Under pmap name its axis:
    losses and gradients are then averaged over it. With `num_microbatches` the share is taken in
    that many equal parts, one after another, to save memory; the update is the same.
    The average's decay is min(ema_decay, (1 + step) / (10 + step)), so that a short run's average
    is not its noise. A state is spoilt where "loss" or "grad_norm" is not finite: check both before
    keeping it.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    chex.assert_tree_shape_prefix(dict(batch), (size,))
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    indices = device * size + jnp.arange(size)
    key = jax.random.fold_in(state.key, state.step)

    def mean_loss(params, indices, batch):
        return loss_fn(params, key, indices, batch).mean()

    loss, grads = _mean_over_microbatches(
        jax.value_and_grad(mean_loss), state.params, (indices, dict(batch)), num_microbatches
    )
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
    ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return TrainState(step, params, ema_params, opt_state, state.key), metrics


def _mean_over_microbatches(function, params, examples, num_parts: int):
    """Mean of function(params, *part) over equal parts of the examples, one part at a time."""
    size = jax.tree.leaves(examples)[0].shape[0]
    if num_parts < 1 or size % num_parts:
        raise ValueError(
            f"num_microbatches must divide the batch of one device, {size}; got {num_parts}."
        )
    part_size = size // num_parts
    total = None
    # Unrolled, not scanned: on XLA:CPU a train step inside a scan runs many times slower.
    for i in range(num_parts):
        part = jax.tree.map(lambda a, i=i: a[i * part_size : (i + 1) * part_size], examples)
        value = function(params, *part)
        total = value if total is None else jax.tree.map(jnp.add, total, value)
        # Keeps the parts from running, and their activations from living, at the same time.
        params, total = jax.lax.optimization_barrier((params, total))
    return jax.tree.map(lambda a: a / num_parts, total)
