"""Training as pure functions: a state and a step.

`train_step` runs as it is under `jax.jit`, and under `pmap` when it is given the axis's name
(parallel.py does that). Everything random about an example is drawn from (seed, step, its place in
the global batch), so one device and many compute the same update. What is minimised is an argument:
objectives.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ddim_jax.objectives import Batch, Frozen, LossFn, LossInputs, Params


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
    loss_state: Any = ()
    """The objective's own; () for most."""


def init_train_state(
    key: jax.Array,
    params: Params,
    tx: optax.GradientTransformation,
    *,
    ema_params: Params | None = None,
    loss_state: Any = (),
) -> TrainState:
    """State before the first step; the average starts as a copy of `params` if none is given."""
    average = params if ema_params is None else ema_params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, average),  # a copy, since the state's buffers are donated
        opt_state=tx.init(params),
        key=key,
        loss_state=loss_state,
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


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Frozen = Frozen(),  # noqa: B008 (immutable)
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    ema_warmup: bool = True,
    axis_name: str | None = None,
    num_microbatches: int = 1,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The next state, and metrics "loss" and "grad_norm" (before clipping), float32 scalars.

    `batch` holds this device's share of the global batch, in order. Under pmap or shard_map name
    the axis: losses and gradients are then averaged over it. With `num_microbatches` the share is
    taken in that many equal parts, one after another, to save memory; the update is the same.
    `frozen` are the arrays that the loss reads and nobody changes.
    The average's decay is `average_decay`; without `ema_warmup` it is ema_decay from the first step
    on. A state is spoilt where "loss" or "grad_norm" is not finite: check both before keeping it.
    With `skip_nonfinite` such an update changes nothing but the step.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    chex.assert_tree_shape_prefix(dict(batch), (size,))
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    places = device * size + jnp.arange(size)
    key = jax.random.fold_in(state.key, state.step)

    def mean_loss(params, loss_state, places, batch):
        inputs = LossInputs(state.ema_params, frozen, loss_state, key, places, batch)
        losses, loss_state = loss_fn(params, inputs)
        if losses.shape != places.shape:
            raise ValueError(
                f"loss_fn must return one loss for each example, shape {places.shape}; got "
                f"{losses.shape}."
            )
        return losses.mean(), loss_state

    loss, grads, loss_state = _over_microbatches(
        jax.value_and_grad(mean_loss, has_aux=True),
        _of_each_device(state.params, axis_name),
        _of_each_device(state.loss_state, axis_name),
        (places, dict(batch)),
        num_microbatches,
    )
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
        loss_state = jax.tree.map(
            lambda a: jax.lax.pmean(a, axis_name) if _is_real(a) else a, loss_state
        )

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    decay = average_decay(step, ema_decay) if ema_warmup else ema_decay
    ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    new = TrainState(step, params, ema_params, opt_state, state.key, loss_state)
    if skip_nonfinite:
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        new = kept._replace(step=step)
    return new, metrics


def _of_each_device(tree: Any, axis_name: str | None) -> Any:
    """What all devices hold alike as each one's own, so that a gradient in it is that device's.

    Of a value that shard_map knows to be alike on all, JAX sums the gradients over the devices by
    itself, and an average over them would change nothing more.
    """

    def own(leaf):
        if axis_name is None or not _is_real(leaf) or _varies(leaf, axis_name):
            return leaf
        return jax.lax.pcast(leaf, axis_name, to="varying")

    return jax.tree.map(own, tree)


def _varies(leaf: jax.Array, axis_name: str) -> bool:
    return axis_name in jax.typeof(leaf).manual_axis_type.varying


def average_decay(step: Int[Array, ""], ema_decay: float) -> Float[Array, ""]:
    """The decay of update `step`, from 1, while it warms up: min(ema_decay, (1 + n) / (10 + n)).

    So that a short run's average is not its random start: update m then counts like m ** 8, and the
    mean age of what is averaged is n / 10 updates, until the decay is ema_decay at
    n = 9 / (1 - ema_decay). A constant decay averages over 1 / (1 - ema_decay) updates from the
    start on, in which the first weights count for ema_decay ** n; DDPM's code does that.
    """
    # Under x64 a quotient of integers would be float64, and make the average that.
    rising = (1 + step).astype(jnp.float32) / (10 + step).astype(jnp.float32)
    return jnp.minimum(ema_decay, rising)


def _over_microbatches(function, params, loss_state, examples, num_parts: int):
    """Means of loss, gradient and loss state over equal parts of the examples, one after another.

    `function` is (params, loss state, *part) -> ((loss, loss state), gradient). All parts see the
    state of the step before, so that it moves once an update; what is not real is the last part's.
    """
    size = jax.tree.leaves(examples)[0].shape[0]
    if num_parts < 1 or size % num_parts:
        raise ValueError(
            f"num_microbatches must divide the batch of one device, {size}; got {num_parts}."
        )
    part_size = size // num_parts
    total, states = None, []
    # Unrolled: a scan would need the parts of a sharded batch as an axis of their own.
    for i in range(num_parts):
        part = jax.tree.map(lambda a, i=i: a[i * part_size : (i + 1) * part_size], examples)
        (loss, part_state), grads = function(params, loss_state, *part)
        states.append(part_state)
        value = loss, grads
        total = value if total is None else jax.tree.map(jnp.add, total, value)
        # Keeps the parts from running, and their activations from living, at the same time.
        params, total = jax.lax.optimization_barrier((params, total))
    loss, grads = jax.tree.map(lambda a: a / num_parts, total)
    return loss, grads, jax.tree.map(lambda *parts: _mean_if_real(parts), *states)


def _mean_if_real(parts: tuple[jax.Array, ...]) -> jax.Array:
    if len(parts) == 1 or not _is_real(parts[-1]):
        return parts[-1]
    return sum(parts[1:], parts[0]) / len(parts)


def _is_real(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
