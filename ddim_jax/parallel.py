"""Many devices and many hosts; the only file that knows pmap and jax.distributed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.jax_utils
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddim_jax.train import LossFn, TrainState, train_step

AXIS = "devices"

replicate = flax.jax_utils.replicate
unreplicate = flax.jax_utils.unreplicate


def check_batch_size(batch_size: int, num_microbatches: int = 1) -> None:
    """Raise ValueError unless all devices, on all hosts, get equal whole shares of the batch."""
    parts = jax.device_count() * num_microbatches
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size must be divisible by {parts} ({jax.device_count()} devices x "
            f"{num_microbatches} microbatches); got {batch_size}. "
            f"Nearest: {max(1, round(batch_size / parts)) * parts}."
        )


def pmap_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    num_microbatches: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` on every device: consumes a replicated state, takes a sharded batch.

    The same update as `train_step` on one device with the whole batch, up to rounding.
    """
    step = functools.partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        ema_decay=ema_decay,
        axis_name=AXIS,
        num_microbatches=num_microbatches,
    )
    return jax.pmap(step, axis_name=AXIS, donate_argnums=0)


def shard(batch: Any) -> Any:
    """This host's batch, split over its devices along a new leading axis, and on its way there."""
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.tree.map(
        lambda a: jax.device_put(a.reshape(len(devices), -1, *a.shape[1:]), sharding), batch
    )


def over_devices(fn: Callable[..., Any]) -> Callable[..., Any]:
    """jit of fn(params, *arrays) with the arrays' leading axis split over this host's devices.

    For sampling and features. Each call's leading axis must be divisible by the number of local
    devices; the results come back split the same way.
    """
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    jitted = jax.jit(fn, out_shardings=split)

    def call(params, *arrays):
        return jitted(jax.device_put(params, everywhere), *jax.device_put(arrays, split))

    return call


def initialize_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes, one for each host (`jax.distributed`); before any computation.

    A cluster that JAX knows (Cloud TPU, SLURM, Open MPI, Kubernetes) needs no arguments. Elsewhere
    all three: host:port of process 0, how many there are, and which this is.
    """
    jax.distributed.initialize(coordinator, num_processes, process_id)
