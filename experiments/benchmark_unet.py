"""Speed of the U-Net, forward and with gradients, beside diffusers' network on torch.

python experiments/benchmark_unet.py
python experiments/benchmark_unet.py --peer diffusers  # needs diffusers and torch
python experiments/benchmark_unet.py --batch-size 128 --dtype bfloat16  # on a GPU

The runs take turns, so that other load on the machine falls on all of them; the best time of each
counts. The share of the peak is the network's arithmetic, as XLA counts it, over what one large
matrix product reaches on the same device in the same turns.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import cli
import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.convert.diffusers import config_from_unet, flax_to_diffusers
from ddim_jax.unet import UNet

Run = Callable[[], Any]  # returns when the device is done
MATMUL_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured; the defaults are the published CIFAR-10 network."""

    image_size: int = 32
    """Side of the images."""
    batch_size: int = 8
    """Images of a batch."""
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in units of 128."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""
    peer: Literal["none", "diffusers"] = "none"
    """Whom to compare with: the same network in diffusers, same weights, both memory layouts."""
    num_turns: int = 10
    """Timed turns; each runs everything once."""


def main(config: BenchmarkConfig) -> None:
    """Print a markdown table of milliseconds an image, share of the peak, and ratios."""
    model = UNet(channel_mults=config.channel_mults, dtype=config.dtype)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    t = jnp.asarray(rng.integers(0, 1000, config.batch_size), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    params = jax.tree.map(lambda a: jnp.float32(0.05 * rng.standard_normal(a.shape)), shapes)

    runs, flops = our_runs(model, params, x, t, config.dtype)
    if config.peer == "diffusers":
        runs |= their_runs(model, params, x, t, config.dtype)
    seconds = {name: min(times) for name, times in take_turns(runs, config.num_turns).items()}

    peak = flops["matmul"] / seconds["matmul"]
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {config.batch_size} of "
        f"{config.image_size} x {config.image_size}, {config.dtype}; the matrix product reaches "
        f"{peak / 1e9:.0f} GFLOP/s\n"
    )
    print("| | ms an image | of the peak | ours takes |")
    print("|---|---|---|---|")
    for name, best in seconds.items():
        kind = name.split()[0]  # "forward" or "gradients"
        if kind == "matmul":
            continue
        share = f"{flops[kind] / best / peak:.0%}"
        ratio = "" if name == kind else f"{seconds[kind] / best:.2f} x"
        print(f"| {name} | {1e3 * best / config.batch_size:.2f} | {share} | {ratio} |")


def our_runs(
    model: UNet, params: Any, x: jax.Array, t: jax.Array, dtype: str
) -> tuple[dict[str, Run], dict[str, float]]:
    """Compiled runs by name, and how many floating-point operations each takes."""

    def forward(params, x, t) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, x, t))

    def loss(params, x, t):
        return jnp.mean(forward(params, x, t) ** 2)

    a = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
    runs, flops = {}, {}
    for name, fn, args in (
        ("matmul", jnp.matmul, (a, a)),
        ("forward", forward, (params, x, t)),
        ("gradients", jax.value_and_grad(loss), (params, x, t)),
    ):
        lowered = jax.jit(fn).lower(*args)
        flops[name] = (lowered.cost_analysis() or {})["flops"]
        run = functools.partial(lowered.compile(), *args)
        runs[name] = lambda run=run: jax.block_until_ready(run())
    return runs, flops


def their_runs(model: UNet, params: Any, x: jax.Array, t: jax.Array, dtype: str) -> dict[str, Run]:
    """The same network in diffusers, in torch's two memory layouts. Stops if outputs differ."""
    import diffusers
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    settings = config_from_unet(model, x.shape[1])
    weights = {k: torch.from_numpy(a.copy()) for k, a in flax_to_diffusers(params, model).items()}
    tx = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).to(device, getattr(torch, dtype))
    tt = torch.from_numpy(np.array(t)).to(device)

    def wait(result):
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def forward(network, x):
        with torch.inference_mode():
            return wait(network(x, tt).sample)

    def gradients(network, x):
        network.zero_grad()
        network(x, tt).sample.square().mean().backward()
        return wait(None)

    runs = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        network = diffusers.UNet2DModel(**{k: v for k, v in settings.items() if k[0] != "_"})
        network.load_state_dict(weights)
        network = network.to(device, tx.dtype, memory_format=layout).eval()
        x_laid_out = tx.contiguous(memory_format=layout)
        suffix = f"diffusers, {str(layout).removeprefix('torch.')}"
        runs[f"forward {suffix}"] = functools.partial(forward, network, x_laid_out)
        runs[f"gradients {suffix}"] = functools.partial(gradients, network, x_laid_out)

        want = forward(network, x_laid_out).permute(0, 2, 3, 1).float().cpu().numpy()
        got = np.asarray(jax.jit(model.apply)({"params": params}, x, t))
        error = np.abs(got - want).max() / want.std()
        if dtype == "float32" and error > 1e-3:
            raise FloatingPointError(f"the two networks differ by {error:.1e} of the output's std")
    return runs


def take_turns(runs: dict[str, Run], num_turns: int) -> dict[str, list[float]]:
    """Seconds of every run, each run once a turn, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(num_turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig)
