"""The order in which training sees images, and the batches of that order.

Sets that fit in memory are one uint8 array; larger ones are decoded while they stream. Both give
the same batches for the same seed, since the order is one pure function: the example at position
p of the stream (batch p // B, row p % B) is

    source[permutation(seed, p // N)[p % N]],    N = len(source),

so epochs follow each other without a dropped remainder, a batch may straddle two of them, and a
run resumes from its step count alone. Flips are not here: the train step does them on the device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from ddim_jax.checks import check_count, check_indices, check_seed
from ddim_jax.data.source import (
    ArraySource,
    Example,
    ImageSource,
    check_source,
    decoding_threads,
    import_extra,
)


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def shuffled_indices(
    num_examples: int, seed: int, positions: Int[np.ndarray, "B"]
) -> Int[np.ndarray, "B"]:
    """Which example stands at each position of the endless stream; see the top of this file.

    Raises ValueError for a seed outside [0, 2**32).
    """
    check_count("num_examples", num_examples)
    check_seed(seed)
    check_indices("positions", positions, bits=63)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(num_examples, seed, int(epoch))[offsets[here]]
    return indices


def batches(
    source: ImageSource,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    num_workers: int = 0,
) -> Iterator[Example]:
    """Endless shuffled batches from step `start_step` on: this shard's rows of each global batch.

    `batch_size` is global; shard k of n gets rows [k B/n, (k + 1) B/n) of it, so the shards
    together give the same batch whatever n is (one shard for each process: jax.process_index()).
    Sources outside memory are decoded by grain, in `num_workers` processes, or in threads if 0.
    The same arguments give the same batches, so a run goes on from its step count alone.
    """
    check_source(source)
    for name, value, at_least in (
        ("batch_size", batch_size, 1),
        ("shard_count", shard_count, 1),
        ("start_step", start_step, 0),
        ("num_workers", num_workers, 0),
    ):
        check_count(name, value, at_least)
    if len(source) == 0:
        raise ValueError(f"source must have at least one image; {source.name} is empty.")
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index must be in [0, shard_count); got {shard_index} of {shard_count}."
        )
    if batch_size % shard_count:
        raise ValueError(
            f"batch_size must be a positive multiple of shard_count, {shard_count}, the number of "
            f"processes; got {batch_size}."
        )
    check_seed(seed)

    num_rows = batch_size // shard_count
    rows = range(shard_index * num_rows, (shard_index + 1) * num_rows)
    stream = _Stream(source, batch_size, seed, start_step, rows)
    if isinstance(source, ArraySource):
        return map(stream.__getitem__, itertools.count())
    return _decoded_batches(stream, num_workers)


@dataclasses.dataclass(frozen=True)
class _Stream:
    """One shard's batches, numbered from 0 at start_step."""

    source: ImageSource
    batch_size: int  # of all shards together
    seed: int
    start_step: int
    rows: range  # this shard's, of each batch

    def __len__(self) -> int:
        return sys.maxsize  # endless

    def __getitem__(self, step: int) -> Example:
        positions = (self.start_step + step) * self.batch_size + np.asarray(self.rows)
        indices = shuffled_indices(len(self.source), self.seed, positions)
        if isinstance(self.source, ArraySource):
            return self.source.take(indices)
        return _stacked([self.source[int(index)] for index in indices])


def _stacked(examples: list[Example]) -> Example:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _decoded_batches(stream: _Stream, num_workers: int) -> Iterator[Example]:
    # Grain deals its items out to processes and puts them together in order, so its items must be
    # whole batches: batching after the deal would mix the order.
    grain = import_extra("grain", "to stream images that do not fit in memory")
    ahead = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
    dataset = grain.MapDataset.source(stream).to_iter_dataset(ahead)
    if num_workers:
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():  # grain's processes read flags, and need no absl.app otherwise
            flags.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)


def sequential_batches(source: ImageSource, batch_size: int) -> Iterator[Example]:
    """Every image once, in the source's order; the last batch may be smaller. For statistics."""
    check_source(source)
    check_count("batch_size", batch_size)
    starts = range(0, len(source), batch_size)
    spans = (range(len(source))[start : start + batch_size] for start in starts)
    if isinstance(source, ArraySource):
        return (source.take(np.asarray(span)) for span in spans)
    return _decoded_spans(source, spans)


def _decoded_spans(source: ImageSource, spans: Iterable[range]) -> Iterator[Example]:
    with decoding_threads() as pool:
        for span in spans:
            yield _stacked(list(pool.map(source.__getitem__, span)))


HostBatch = TypeVar("HostBatch")
DeviceBatch = TypeVar("DeviceBatch")


def prefetch_to_device(
    iterator: Iterable[HostBatch], put_fn: Callable[[HostBatch], DeviceBatch], size: int = 2
) -> Iterator[DeviceBatch]:
    """The same batches after `put_fn`, which was called up to `size` batches ahead.

    JAX's transfers return before they are done, so a batch already called for arrives while the
    device computes on the one before.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}.")
    return _called_ahead(map(put_fn, iterator), size)


def _called_ahead(batches: Iterator[DeviceBatch], size: int) -> Iterator[DeviceBatch]:
    ready = collections.deque(itertools.islice(batches, size))
    while ready:
        yield ready.popleft()
        ready.extend(itertools.islice(batches, 1))
