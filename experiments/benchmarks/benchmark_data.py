"""How fast images arrive, and how long a train step waits for them.

python experiments/benchmarks/benchmark_data.py --data-dir /data/tfds
python experiments/benchmarks/benchmark_data.py --data-dir /data/tfds \\
    --model.channels 128 --model.channel-mults 1 2 2 2 --model.num-res-blocks 2  # on a GPU

Loads the data into memory, reads shuffled batches from there and as a stream, then trains a
network on both and measures the time the loop spends asking for its next batch.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where common/ stands

from common import cli

from ddim_jax import parallel, train
from ddim_jax.data.load import load_images
from ddim_jax.data.source import ImageSource
from ddim_jax.data.stream import batches as shuffled_batches
from ddim_jax.data.stream import prefetch_to_device
from ddim_jax.objectives import Denoising, Setup
from ddim_jax.paths import DataName, Folder
from ddim_jax.runs import ModelConfig
from ddim_jax.schedule import linear_schedule

Result = TypeVar("Result")

SMALL = ModelConfig(channels=8, channel_mults=(1, 2), num_res_blocks=1, norm_groups=8)


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured; the defaults are CIFAR-10 and a network small enough for a CPU."""

    data: DataName = "cifar10"
    """digits, a TFDS name, a folder of images, or a .npz file of uint8 images."""
    data_dir: Folder | None = None
    """Where TFDS sets stand; its own default if not given."""
    image_size: int | None = None
    """Resize and crop images to this side; without it all must have one size."""
    batch_size: int = 128
    """Images of a batch."""
    num_workers: int = 0
    """Processes that decode the stream; 0 uses threads."""
    num_batches: int = 200
    """Batches read without a network."""
    model: ModelConfig = SMALL
    """The network whose train step waits for the batches."""
    num_steps: int = 20
    """Train steps timed."""


def main(config: BenchmarkConfig) -> None:
    """Print a markdown table: seconds to load, images a second, share of a step spent waiting."""

    def load(in_memory: bool) -> ImageSource:
        return load_images(
            config.data,
            data_dir=config.data_dir,
            image_size=config.image_size,
            in_memory=in_memory,
        )

    streamed, open_seconds = timed(lambda: load(in_memory=False))
    memory, load_seconds = timed(lambda: load(in_memory=True))
    step = _TrainStep(config, memory)
    print(
        f"{memory.name}: {len(memory)} images of {memory.image_shape}, batches of "
        f"{config.batch_size}, {jax.local_device_count()} {jax.default_backend()} device(s)\n\n"
        "| source | ready in s | images/s | ms a train step | waiting for images |\n"
        "|---|---|---|---|---|"
    )
    for name, source, seconds in [
        ("memory", memory, load_seconds),
        ("stream", streamed, open_seconds),
    ]:
        rate = images_per_second(batches(config, source), config)
        step_seconds, waiting = step.measure(batches(config, source), config.num_steps)
        print(
            f"| {name} | {seconds:.1f} | {rate:.0f} | {1e3 * step_seconds:.1f} | {waiting:.2%} |",
            flush=True,
        )


def timed(fn: Callable[[], Result]) -> tuple[Result, float]:
    """What fn returns, and the seconds it took."""
    start = time.perf_counter()
    return fn(), time.perf_counter() - start


def batches(config: BenchmarkConfig, source: ImageSource) -> Iterator[Any]:
    """Batches of images without labels, in the order a run would see them."""
    stream = shuffled_batches(source, config.batch_size, seed=0, num_workers=config.num_workers)
    return ({"image": batch["image"]} for batch in stream)


def images_per_second(stream: Iterator[Any], config: BenchmarkConfig) -> float:
    """Rate of the batches after the first, which starts the workers and shuffles."""
    next(stream)
    _, seconds = timed(lambda: [next(stream) for _ in range(config.num_batches)])
    return config.num_batches * config.batch_size / seconds


class _TrainStep:
    """The loop of train.py, which reads each loss one step late, with a clock on its input."""

    def __init__(self, config: BenchmarkConfig, source: ImageSource):
        parallel.check_batch_size(config.batch_size)
        model = config.model.make(source.image_shape[-1])
        tx = train.adam_with_warmup(2e-4, warmup_steps=5000)
        loss_fn = Denoising().loss_fn(Setup(model.apply, linear_schedule(), config.batch_size))
        self._step = parallel.pmap_train_step(loss_fn, tx, ema_decay=0.9999)

        @jax.jit
        def initial_state(key):
            params = model.init(key, jnp.zeros(source.image_shape), 0)["params"]
            return train.init_train_state(key, params, tx)

        self._state = initial_state(jax.random.key(0))

    def measure(self, stream: Iterator[Any], num_steps: int) -> tuple[float, float]:
        """Seconds of a step, and the share of them spent on asking for its batch."""
        state = parallel.replicate(self._state)
        device_batches = prefetch_to_device(stream, parallel.shard)
        state, metrics = self._step(state, next(device_batches))  # compiles
        jax.block_until_ready(metrics)
        waited, start = 0.0, time.perf_counter()
        for _ in range(num_steps):
            batch, seconds = timed(lambda: next(device_batches))
            waited += seconds
            before = metrics
            state, metrics = self._step(state, batch)
            jax.block_until_ready(before)
        jax.block_until_ready(metrics)
        total = time.perf_counter() - start
        return total / num_steps, waited / total


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig)
