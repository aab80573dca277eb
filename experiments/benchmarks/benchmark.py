"""Speed of sampling and training, beside diffusers' network on torch.

python experiments/benchmarks/benchmark.py --peer diffusers  # needs diffusers and torch
python experiments/benchmarks/benchmark.py --peer diffusers --model.dtype bfloat16 \\
    --sample-batch-sizes 256 1024 --train-batch-sizes 128 512 --out results.json  # on a GPU

Sampling is DDIM from x_T to x_0. Training is a whole update: noise, loss, gradients, clipping,
Adam, moving average. All runs take turns, so that other load on the machine falls on all of them;
the best time of each counts. The share of the peak is the network's arithmetic, as XLA counts it,
over what one large matrix product reaches on the same device in the same turns.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where common/ stands

import torch_peer
from common import cli

from ddim_jax import parallel, train
from ddim_jax.files import write_whole
from ddim_jax.objectives import Denoising, Setup
from ddim_jax.paths import File
from ddim_jax.runs import ModelConfig
from ddim_jax.samplers import sample
from ddim_jax.schedule import ddim_timesteps, linear_schedule
from ddim_jax.unet import UNet, parameter_shapes

Run = Callable[[], Any]
"""Does its work once, and returns when the device is done."""
EMA_DECAY = 0.9999
PUBLISHED = ModelConfig()


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured; the defaults are the published CIFAR-10 network, on a CPU."""

    model: ModelConfig = PUBLISHED
    """The network."""
    image_size: int = 32
    """Side of the images."""
    sample_batch_sizes: tuple[int, ...] = (8,)
    """Images sampled at once, one row of the table for each."""
    num_sample_steps: int = 2
    """Sampling steps S."""
    train_batch_sizes: tuple[int, ...] = (8,)
    """Images of a training step, one row for each."""
    num_train_steps: int = 1
    """Updates between two looks at the clock."""
    peer: Literal["none", "diffusers"] = "none"
    """Whom to compare with: the same network, same weights, in torch's two memory layouts; on a GPU
    in the faster one, as it is and compiled."""
    matmul_size: int = 4096
    """Side of the matrix product that is taken as the device's peak."""
    num_turns: int = 5
    """Timed turns; each runs everything once."""
    out: File | None = None
    """A JSON file for the table, with device, versions and command."""


def main(config: BenchmarkConfig) -> None:
    """Print a markdown table of milliseconds an image, share of the peak, and ratios."""
    theirs_too = config.peer == "diffusers"
    if theirs_too:
        # Before the first computation: JAX would take most of the GPU for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    model = config.model.make(image_channels=3)
    params = _random_params(model, config.image_size)
    # Random: a GPU multiplies ones faster, since fewer of its transistors switch.
    a = jax.random.normal(jax.random.key(0), (config.matmul_size,) * 2, config.model.dtype)
    runs: dict[str, Run] = {"matmul": _waiting(jax.jit(jnp.matmul), a, a)}
    work: dict[str, tuple[str, int, float]] = {}  # run -> our run, images, FLOPs
    forward, both = _flops(model, params, config.image_size, batch_size=1)
    S, steps = config.num_sample_steps, config.num_train_steps
    # kind, batch sizes, times that a run takes each image, FLOPs of an image, our run, their run
    for kind, sizes, repeats, flops, ours, theirs in (
        ("sampling", config.sample_batch_sizes, 1, S * forward, our_sampling, _their_sampling),
        ("training", config.train_batch_sizes, steps, both, our_training, _their_training),
    ):
        # Of their own for each kind: a network that trains drops units out.
        peers = torch_peer.networks(model, params, config.image_size) if theirs_too else {}
        for size in sizes:
            name, images = f"{kind}, batch {size}", size * repeats
            runs[name] = ours(model, params, config, size)
            work[name] = name, images, images * flops
            for peer, network in peers.items():
                runs[f"{name}, {peer}"] = theirs(network, config, size)
                work[f"{name}, {peer}"] = name, images, images * flops

    if config.out is not None:
        pathlib.Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    facts, rows = {}, []
    for times in take_turns(runs, config.num_turns):
        seconds = {name: min(of_run) for name, of_run in times.items()}
        peak = 2 * config.matmul_size**3 / seconds["matmul"]
        rows = [
            {
                "what": name,
                "ms_per_image": 1e3 * seconds[name] / images,
                "share_of_peak": flops / seconds[name] / peak,
                "ours_takes": seconds[ours] / seconds[name],
            }
            for name, (ours, images, flops) in work.items()
        ]
        facts = _facts(config, peak)
        if config.out is not None:  # after each turn: one that is stopped keeps those before it
            text = json.dumps(facts | {"rows": rows}, indent=2) + "\n"
            write_whole(pathlib.Path(config.out), text.encode())
    print(_table(rows, config, facts))
    if config.out is not None:
        print(f"\nsee {config.out}")


def take_turns(runs: dict[str, Run], num_turns: int) -> Iterator[dict[str, list[float]]]:
    """After each turn the seconds of every run so far, in each of which each runs once.

    In a turn before them all are compiled, which stderr says: a compiler can take minutes.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        print(f"{name}: first {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    for _ in range(num_turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        yield times


# ----------------------------------------------------------------------------------------- ours


def our_sampling(model: UNet, params: Any, config: BenchmarkConfig, batch_size: int) -> Run:
    """DDIM of one batch."""
    schedule = linear_schedule()

    def program(params, x_T):
        def eps_fn(x, t) -> Any:
            return model.apply({"params": params}, x, t)

        timesteps = ddim_timesteps(schedule.num_steps, config.num_sample_steps)
        return sample(None, eps_fn, schedule, x_T, timesteps)

    return _waiting(jax.jit(program), params, _latents(config, batch_size))


def our_training(model: UNet, params: Any, config: BenchmarkConfig, batch_size: int) -> Run:
    """Updates on one batch, on all devices, as train.py does them."""
    parallel.check_batch_size(batch_size)
    tx = train.adam_with_warmup(2e-4)
    loss_fn = Denoising().loss_fn(Setup(model.apply, linear_schedule(), batch_size))
    step = parallel.pmap_train_step(loss_fn, tx, ema_decay=EMA_DECAY)
    # A copy, since the step consumes its state.
    params = jax.tree.map(jnp.copy, params)
    state = parallel.replicate(train.init_train_state(jax.random.key(0), params, tx))
    shape = (batch_size, config.image_size, config.image_size, 3)
    batch = parallel.shard({"image": np.zeros(shape, np.uint8)})

    def run():
        nonlocal state
        for _ in range(config.num_train_steps):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    return run


def _their_sampling(network: Any, config: BenchmarkConfig, batch_size: int) -> Run:
    x_T = _latents(config, batch_size)
    return torch_peer.sampling(network, x_T, config.num_sample_steps, config.model.dtype)


def _their_training(network: Any, config: BenchmarkConfig, batch_size: int) -> Run:
    x0 = _latents(config, batch_size)
    return torch_peer.training(network, x0, config.num_train_steps, config.model.dtype, EMA_DECAY)


def _waiting(fn: Callable[..., Any], *args: Any) -> Run:
    return lambda: jax.block_until_ready(fn(*args))


def _random_params(model: UNet, image_size: int) -> Any:
    """Weights that make every layer count; the initial ones are nearly 0 in places."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(model, (image_size, image_size, 3))
    return jax.tree.map(lambda a: jnp.float32(0.05 * rng.standard_normal(a.shape)), shapes)


def _latents(config: BenchmarkConfig, batch_size: int) -> jax.Array:
    shape = (batch_size, config.image_size, config.image_size, 3)
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def _flops(model: UNet, params: Any, image_size: int, batch_size: int) -> tuple[float, float]:
    """Floating-point operations of the network on a batch: forward, and with gradients.

    As XLA counts them on the CPU, which is always there: for a GPU it counts none before it
    compiles, and after that none of what became calls of cuDNN.
    """
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    x = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.float32, sharding=cpu)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=cpu), params)

    def forward(params, x):
        return jnp.sum(model.apply({"params": params}, x, 0))  # pyright: ignore[reportArgumentType]

    costs = [jax.jit(f).lower(shapes, x) for f in (forward, jax.value_and_grad(forward))]
    one, both = ((cost.cost_analysis() or {})["flops"] for cost in costs)
    return one, both


# --------------------------------------------------------------------------------------- report


def _facts(config: BenchmarkConfig, peak: float) -> dict[str, Any]:
    """What the figures mean nothing without."""
    packages = ["jax", "jaxlib", "flax"]
    if config.peer == "diffusers":
        packages += ["torch", "diffusers"]
    return {
        "command": "python experiments/benchmarks/benchmark.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "driver": getattr(jax.devices()[0].client, "platform_version", "").strip(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "matmul_tflops": peak / 1e12,
        "config": dataclasses.asdict(config),
    }


def _table(rows: list[dict[str, Any]], config: BenchmarkConfig, facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['device']}, {facts['cores']} cores, "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        f"{config.image_size} x {config.image_size}, {config.model.dtype}, "
        f"S = {config.num_sample_steps}; the matrix product reaches "
        f"{facts['matmul_tflops']:.3g} TFLOP/s",
        "",
        "| | ms an image | of the peak | ours takes |",
        "|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row["ours_takes"] == 1 else f"{row['ours_takes']:.2f} x"
        lines.append(
            f"| {row['what']} | {row['ms_per_image']:.2f} | {row['share_of_peak']:.0%} | {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig)
