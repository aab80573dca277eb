"""A train step inside lax.scan beside the step alone; of our convolution and of JAX's.

python experiments/benchmarks/benchmark_loops.py                    # the published CIFAR-10 network
python experiments/benchmarks/benchmark_loops.py --model.channels 32 --jaxs-own

On a CPU JAX's own gradients of a convolution run tens of times slower inside a loop, and are
measured there once, if asked for. All runs take turns; the best time of each counts.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where common/ stands

from common import cli

from ddim_jax import train, unet
from ddim_jax.objectives import Denoising, Setup
from ddim_jax.runs import ModelConfig
from ddim_jax.runs.options import check_limits, option
from ddim_jax.schedule import linear_schedule

PUBLISHED = ModelConfig()


@dataclasses.dataclass(frozen=True)
class LoopsConfig:
    """What is measured; the default is the published CIFAR-10 network."""

    model: ModelConfig = PUBLISHED
    """The network."""
    image_size: int = 32
    """Side of the images."""
    batch_size: int = option(8, at_least=1)
    """Images of an update."""
    num_updates: int = option(3, at_least=1)
    """Updates of the loop."""
    num_turns: int = option(3, at_least=1)
    """Timed turns."""
    jaxs_own: bool = False
    """Also with jax.lax's convolution."""


def main(config: LoopsConfig) -> None:
    """Print seconds for an update, and their ratios to the step alone."""
    check_limits(config)
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}", flush=True)
    runs = _runs(config, "ours")
    if config.jaxs_own:
        ours, unet.conv_general_dilated = unet.conv_general_dilated, jax.lax.conv_general_dilated
        runs |= _runs(config, "JAX's")
        unet.conv_general_dilated = ours
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(config.num_turns):
        for name, run in runs.items():
            if turn == 0 or best[name] < 5:
                best[name] = min(best[name], run())
    alone = best["ours, alone"]
    for name, seconds in best.items():
        print(f"{name:16s} {seconds:8.3f} s an update, {seconds / alone:6.2f} times ours alone")


def _runs(config: LoopsConfig, name: str) -> dict[str, Callable[[], float]]:
    """Name -> what runs and gives the seconds of an update; compiled, and run once."""
    shape = (config.image_size, config.image_size, 3)
    model = config.model.make(image_channels=3)
    tx = train.adam_with_warmup(2e-4, 5000)
    loss_fn = Denoising().loss_fn(Setup(model.apply, linear_schedule(), config.batch_size))
    params = model.init(jax.random.key(0), jnp.zeros((1, *shape)), 0)["params"]
    state = train.init_train_state(jax.random.key(1), params, tx)
    batch = {"image": jnp.zeros((config.batch_size, *shape), jnp.uint8)}

    def step(state: train.TrainState, batch: Any) -> train.TrainState:
        return train.train_step(state, batch, loss_fn=loss_fn, tx=tx, ema_decay=0.9999)[0]

    def loop(state: train.TrainState, batch: Any) -> train.TrainState:
        def body(state: train.TrainState, _: None) -> tuple[train.TrainState, None]:
            return step(state, batch), None

        return jax.lax.scan(body, state, None, length=config.num_updates)[0]

    return {
        f"{name}, alone": functools.partial(_seconds, _compiled(step, state, batch), state, batch),
        f"{name}, in a scan": functools.partial(
            _seconds, _compiled(loop, state, batch), state, batch, config.num_updates
        ),
    }


def _compiled(run: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    return jax.jit(run).lower(*given).compile()


def _seconds(run: Callable[..., Any], state: Any, batch: Any, num_updates: int = 1) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run(state, batch))
    return (time.perf_counter() - started) / num_updates


if __name__ == "__main__":
    cli.run(main, LoopsConfig)
