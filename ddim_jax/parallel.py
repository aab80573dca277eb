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
"""A pytree, copied to each of this host's devices along a new leading axis."""


def unreplicate(tree: Any) -> Any:
    """The first device's copy of a replicated pytree, on this host: NumPy arrays.

    Runs nothing on the device, so it waits for the arrays alone and not for what was dispatched
    after them, and needs no memory there.
    """

    def first(array: jax.Array) -> Any:
        copy = array.addressable_data(0)
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):  # NumPy has no such thing
            return copy[0]
        return np.array(copy)[0]  # not a view: the next step may be given the memory

    return jax.tree.map(first, tree)


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
    count, sharding = jax.local_device_count(), _over_this_host(PartitionSpec(AXIS))
    return jax.tree.map(
        lambda a: jax.device_put(a.reshape(count, -1, *a.shape[1:]), sharding), batch
    )


def over_devices(fn: Callable[..., Any]) -> Callable[..., Any]:
    """jit of fn(params, *arrays) with the arrays' leading axis split over this host's devices.

    For sampling and features. Each call's leading axis must be divisible by the number of local
    devices; the results come back split the same way. Params that `everywhere` has placed already
    are not copied again.
    """
    split = _over_this_host(PartitionSpec(AXIS))
    jitted = jax.jit(fn, out_shardings=split)

    def call(params, *arrays):
        return jitted(everywhere(params), *jax.device_put(arrays, split))

    return call


def everywhere(tree: Any) -> Any:
    """The arrays, each whole on every device of this host; no copy if they are there already."""
    return jax.device_put(tree, _over_this_host(PartitionSpec()))


def _over_this_host(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), spec)


def initialize_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes, one for each host (`jax.distributed`); before any computation.

    A cluster that JAX knows (Cloud TPU, SLURM, Open MPI, Kubernetes) needs no arguments. Elsewhere
    all three: host:port of process 0, how many there are, and which this is.
    Raises ValueError for some of the three, and for a coordinator of another form.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            "coordinator, num_processes and process_id must be given together; got "
            f"{coordinator}, {num_processes}, {process_id}."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator must be host:port; got {coordinator!r}.")
    jax.distributed.initialize(coordinator, num_processes, process_id)
