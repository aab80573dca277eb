"""Many devices and many hosts; the only file that knows pmap and jax.distributed."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.jax_utils
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddim_jax.objectives import LossFn
from ddim_jax.train import TrainState, train_step

T = TypeVar("T")
AXIS = "devices"
Devices = Sequence[Any]
"""Of `jax.Device`, which type checkers take for a variable."""


def replicate(tree: Any) -> Any:
    """A pytree, copied to each of this host's devices along a new leading axis.

    On the mesh that pmap's results are on. Of the same arrays on another, as flax leaves them,
    pmap would compile its program once more as soon as it is given its own results.
    """
    return jax.device_put(flax.jax_utils.replicate(tree), _over_this_host(PartitionSpec(AXIS)))


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
    ema_warmup: bool = True,
    num_microbatches: int = 1,
    skip_nonfinite: bool = False,
    devices: Devices | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` on every device: (state, batch[, frozen]) -> (state, metrics).

    Consumes a replicated state; the batch is sharded, what is frozen replicated.
    The same update as `train_step` on one device with the whole batch, up to rounding.
    devices: others than all of them, such as those of a machine that is only compiled for.
    """
    step = functools.partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
        axis_name=AXIS,
        skip_nonfinite=skip_nonfinite,
        num_microbatches=num_microbatches,
    )
    return jax.pmap(step, axis_name=AXIS, donate_argnums=0, devices=devices)


def shard(batch: Any) -> Any:
    """This host's batch, split over its devices along a new leading axis, and on its way there."""
    count, sharding = jax.local_device_count(), _over_this_host(PartitionSpec(AXIS))
    return jax.tree.map(
        lambda a: jax.device_put(a.reshape(count, -1, *a.shape[1:]), sharding), batch
    )


class DeviceProgram(NamedTuple):
    """What `over_devices` makes."""

    jitted: Any
    split: NamedSharding

    def __call__(self, params: Any, *arrays: Any) -> Any:
        """Its results for these arrays."""
        return self.jitted(everywhere(params), *jax.device_put(arrays, self.split))

    def compile(self, params: Any, *arrays: Any) -> jax.stages.Compiled:
        """Compile it for arrays of these shapes, and run nothing: a call finds it compiled.

        Any may be a `jax.ShapeDtypeStruct`, so that a program can be made for other machines too.
        """
        whole = NamedSharding(self.split.mesh, PartitionSpec())
        given = _placed(params, whole), *_placed(arrays, self.split)
        return self.jitted.lower(*given).compile()


def over_devices(fn: Callable[..., Any], devices: Devices | None = None) -> DeviceProgram:
    """jit of fn(params, *arrays) with the arrays' leading axis split over this host's devices.

    For sampling and features. Each call's leading axis must be divisible by the number of local
    devices; the results come back split the same way. Params that `everywhere` has placed already
    are not copied again.
    devices: others, such as those of a machine that is only compiled for.
    """
    split = _over(jax.local_devices() if devices is None else devices, PartitionSpec(AXIS))
    return DeviceProgram(jax.jit(fn, out_shardings=split), split)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """The arrays, so placed, numbers as a call would have them; and shapes of such arrays."""

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


def everywhere(tree: Any) -> Any:
    """The arrays, each whole on every device of this host; no copy if they are there already."""
    return jax.device_put(tree, _over_this_host(PartitionSpec()))


def _over_this_host(spec: PartitionSpec) -> NamedSharding:
    return _over(jax.local_devices(), spec)


def _over(devices: Devices, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), spec)


def index_batches(num_rows: int, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
    """The row numbers start .. num_rows - 1 that this process works on, in batches.

    Each is an int array of batch_size numbers, the last may be shorter. The processes take turns:
    batch b is process b % process_count's. Raises ValueError for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    firsts = range(start, num_rows, batch_size)[jax.process_index() :: jax.process_count()]
    return (np.arange(first, min(first + batch_size, num_rows)) for first in firsts)


def map_batches(
    program: Callable[..., Any], params: Any, batches: Iterable[Any], *, ahead: int = 1
) -> Iterator[Any]:
    """program(params, *rows) for each batch of rows, as NumPy arrays on the host, in order.

    The one way to run a program over any number of rows. A batch is an array, or a tuple of arrays,
    with one leading axis; the program, such as `over_devices` makes, returns a pytree of arrays
    with the same. Each batch is filled up with its last row, to the size of the largest before it
    and to a multiple of the devices, so that one compiled program serves all; the filling is cut
    from the result. While one result is handed out, `ahead` more are computed.
    Raises ValueError for arrays of one batch, or results, of different lengths.
    """
    devices, size = jax.local_device_count(), 0
    computing: collections.deque[tuple[Any, int, int]] = collections.deque()
    for batch in batches:
        rows = batch if isinstance(batch, tuple) else (batch,)
        num_rows = len(rows[0])
        if any(len(array) != num_rows for array in rows):
            raise ValueError(
                f"arrays must have one row for each row of the first; got {[*map(len, rows)]} rows."
            )
        size = max(size, -(-num_rows // devices) * devices)
        result = program(params, *(_filled(array, size) for array in rows))
        computing.append((result, num_rows, size))
        if len(computing) > ahead:
            yield _on_host(*computing.popleft())
    while computing:
        yield _on_host(*computing.popleft())


def map_rows(
    program: Callable[..., Any],
    params: Any,
    batch_size: int,
    *arrays: Any,
    on_rows: Callable[[int], object] | None = None,
) -> Any:
    """program(params, *arrays) for any number of rows, at most `batch_size` of them at a time.

    What `map_batches` yields, put together: a pytree with one row for each row of the arrays. All
    of them are this process's. on_rows: called with the number of rows of each batch that is done,
    to show progress. Raises ValueError for a batch_size below 1, and for no rows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    num_rows = {len(array) for array in arrays}
    if num_rows == {0} or len(num_rows) != 1:
        raise ValueError(f"arrays must have rows, and all as many; got {[*map(len, arrays)]} rows.")
    starts = range(0, len(arrays[0]), batch_size)
    batches = (tuple(array[start : start + batch_size] for array in arrays) for start in starts)
    return joined(map_batches(program, params, batches), on_rows)


def joined(parts: Iterable[Any], on_rows: Callable[[int], object] | None = None) -> Any:
    """Pytrees of arrays with one leading axis, put together; on_rows: told of the rows of each."""
    kept = []
    for part in parts:
        kept.append(part)
        if on_rows is not None:
            on_rows(len(jax.tree.leaves(part)[0]))
    return jax.tree.map(lambda *rows: np.concatenate(rows), *kept)


def _filled(array: Any, size: int) -> np.ndarray:
    array = np.asarray(array)
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def _on_host(result: Any, num_rows: int, size: int) -> Any:
    def cut(array: Any) -> np.ndarray:
        if array.shape[:1] != (size,):
            raise ValueError(
                f"program must return one row for each of its {size} rows; got shape {array.shape}."
            )
        return np.asarray(array)[:num_rows]

    return jax.tree.map(cut, result)


def initialize_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes, one for each host (`jax.distributed`); before any computation.

    A cluster that JAX knows (Cloud TPU, SLURM, Open MPI, Kubernetes) needs no arguments. Elsewhere
    all three: host:port of process 0, how many there are, and which this is. A process that has
    joined already stays as it is.
    Raises ValueError for some of the three, a coordinator of another form, a process_id that is
    none of theirs, and hosts with unequal numbers of devices.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            "coordinator, num_processes and process_id must be given together; got "
            f"{coordinator}, {num_processes}, {process_id}."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator must be host:port; got {coordinator!r}.")
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise ValueError(
            f"process_id must be in [0, num_processes), [0, {num_processes}); got {process_id}."
        )
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, num_processes, process_id)
    # Known everywhere without asking, and what every exchange between processes relies on.
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"hosts must have equally many devices; got {[counts[i] for i in sorted(counts)]}."
        )


def gather(text: str) -> list[str]:
    """Each process's text, by its number, on every process; all must call it."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    padded = np.pad(content, (0, int(sizes.max()) - content.size))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def together(check: Callable[[], T]) -> T:
    """What check() returns, once it has returned on every process; all must call it.

    Where it raises on some, it is raised there, and ValueError with the same words on all others:
    none is left waiting for one that has stopped. The exception has `on_all_hosts = True`.
    """
    if jax.process_count() == 1:
        return check()
    result, error = None, None
    try:
        result = check()
    except Exception as raised:  # whatever it is, the others must hear of it
        error = raised
    refusals = {index: text for index, text in enumerate(gather(_in_words(error))) if text}
    if refusals and error is None:
        error = ValueError(
            " ".join(f"process {index} refused: {text}" for index, text in refusals.items())
        )
    if error is not None:
        error.on_all_hosts = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error
    return result  # pyright: ignore[reportReturnType]


def _in_words(error: Exception | None) -> str:
    if error is None:
        return ""
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return f"{kind}{error}" or type(error).__name__


def agree(facts: Callable[[], Mapping[str, Any]], way_out: str) -> None:
    """Raise ValueError on every process unless facts() is the same on all; all must call it.

    The message names each fact that differs, its value and the processes that have it, and ends in
    `way_out`. With one process nothing is done, facts() not even called.
    """
    if jax.process_count() == 1:
        return
    words = together(lambda: {name: repr(value) for name, value in facts().items()})
    everyones = [json.loads(text) for text in gather(json.dumps(words))]
    names = dict.fromkeys(name for words in everyones for name in words)
    held = {name: [words.get(name, "absent") for words in everyones] for name in names}
    if differ := [_who_has(name, values) for name, values in held.items() if len(set(values)) > 1]:
        error = ValueError(f"hosts must agree, and do not: {'; '.join(differ)}. {way_out}")
        error.on_all_hosts = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error


def _who_has(name: str, values: list[str]) -> str:
    """ "name is A on process 0, B on processes 1, 2"."""
    who: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        who.setdefault(value, []).append(process)
    return f"{name} is " + ", ".join(
        f"{value} on process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"
        for value, processes in who.items()
    )
