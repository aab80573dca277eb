import dataclasses
import itertools

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_jax.data.load import load_images
from ddim_jax.data.source import ArraySource
from ddim_jax.data.stream import batches, prefetch_to_device, sequential_batches


def numbered(num: int, labels: bool = True) -> ArraySource:
    """2x2 images whose pixels say which one it is."""
    numbers = np.arange(num)
    images = np.broadcast_to(np.uint8(numbers)[:, None, None, None], (num, 2, 2, 1))
    return ArraySource(images, numbers if labels else None, "numbers", num if labels else None)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The same images, as a source that is not in memory."""

    source: ArraySource
    name = "decoded"

    @property
    def image_shape(self):
        return self.source.image_shape

    @property
    def num_classes(self):
        return self.source.num_classes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == 13:  # the unlucky test reads it
            raise ValueError("image 13 cannot be read")
        return self.source[index]


def take(iterator, num):
    return list(itertools.islice(iterator, num))


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert x[key].dtype == y[key].dtype
            np.testing.assert_array_equal(x[key], y[key])


# Order


@settings(deadline=None)
@given(
    num=st.integers(1, 40),
    batch=st.integers(1, 50),
    start=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_every_epoch_of_the_stream_is_all_images_once_in_another_order(num, batch, start, seed):
    stream = batches(numbered(num), batch, seed=seed)
    steps = 3 * num // batch + 1
    labels = np.concatenate([b["label"] for b in take(stream, steps)])
    for epoch in range(3):
        assert (
            sorted(labels[epoch * num : (epoch + 1) * num])
            == [*range(min(num, len(labels) - epoch * num))]
            or len(labels) < (epoch + 1) * num
        )

    resumed = take(batches(numbered(num), batch, seed=seed, start_step=start), 2)
    assert_same(resumed, take(batches(numbered(num), batch, seed=seed), start + 2)[start:])


def test_epochs_and_seeds_differ():
    def labels(seed):
        return [b["label"] for b in take(batches(numbered(50), 50, seed=seed), 2)]

    orders = [*labels(0), *labels(1)]
    for one, other in itertools.combinations(orders, 2):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 6])
def test_shards_together_are_the_global_batch(num_shards):
    whole = take(batches(numbered(20), 6, seed=3, start_step=2), 5)
    shards = [
        take(
            batches(numbered(20), 6, seed=3, start_step=2, shard_index=k, shard_count=num_shards),
            5,
        )
        for k in range(num_shards)
    ]
    joined = [
        {key: np.concatenate([shard[key] for shard in parts]) for key in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(joined, whole)


def test_the_image_stays_with_its_label():
    (batch,) = take(batches(numbered(20), 20, seed=0), 1)
    np.testing.assert_array_equal(batch["image"][:, 1, 0, 0], batch["label"])
    assert batch["label"].dtype == np.int32
    assert batches(numbered(20, labels=False), 4, seed=0).__next__().keys() == {"image"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(batch_size=7, shard_count=2), "batch_size must be a positive multiple.*2.*got 7"),
        (dict(batch_size=8, shard_index=2, shard_count=2), "shard_index.*got 2 of 2"),
        (dict(batch_size=8, shard_index=-1), "shard_index"),
        (dict(batch_size=8, seed=-1), r"seed must be in \[0, 4294967296\), 32 bits; got -1"),
        (dict(batch_size=8, start_step=-1), "start_step must be at least 0"),
    ],
)
def test_batches_refuses_before_the_first_batch(arguments, words):
    with pytest.raises(ValueError, match=words):
        batches(numbered(20), **{"seed": 0} | arguments)


# Streaming


def test_streaming_equals_memory():
    source = numbered(12)
    for shard in range(2):
        arguments = dict(seed=4, start_step=5, shard_index=shard, shard_count=2)
        want = take(batches(source, 10, **arguments), 20)
        assert_same(take(batches(Decoded(source), 10, **arguments), 20), want)


@pytest.mark.slow
def test_streaming_in_processes_equals_memory(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 256, (6, 5, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    streamed = load_images(str(tmp_path), in_memory=False)
    memory = load_images(str(tmp_path), in_memory=True)
    for workers in (1, 2):
        got = take(batches(streamed, 8, seed=1, start_step=1, num_workers=workers), 7)
        assert_same(got, take(batches(memory, 8, seed=1, start_step=1), 7))


def test_an_image_that_fails_while_streaming_stops_the_run():
    with pytest.raises(ValueError, match="image 13 cannot be read"):
        take(batches(Decoded(numbered(20)), 10, seed=0), 2)


@pytest.mark.parametrize("wrap", [lambda source: source, Decoded])
def test_sequential_batches_are_all_images_in_order(wrap):
    got = take(sequential_batches(wrap(numbered(11)), 4), 9)
    assert [len(batch["image"]) for batch in got] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in got]), range(11))
    with pytest.raises(ValueError, match="batch_size"):
        sequential_batches(numbered(2), 0)


def test_prefetch_keeps_order_and_runs_ahead_by_its_size():
    put = []

    def put_fn(x):
        put.append(x)
        return 10 * x

    fetched = prefetch_to_device(range(5), put_fn, size=2)
    assert next(fetched) == 0 and put == [0, 1]
    assert next(fetched) == 10 and put == [0, 1, 2]
    assert list(fetched) == [20, 30, 40]
    with pytest.raises(ValueError, match="size must be at least 1"):
        next(prefetch_to_device([], put_fn, size=0))


# Streaming a real set


def test_cifar10_streams_what_it_holds_in_memory(shared):
    data_dir = shared("tfds")
    arguments = dict(data_dir=data_dir, split="test[:500]")
    memory = load_images("cifar10", **arguments)
    streamed = load_images("cifar10", **arguments, in_memory=False)
    got = take(batches(streamed, 96, seed=2, start_step=4), 8)
    assert_same(got, take(batches(memory, 96, seed=2, start_step=4), 8))
