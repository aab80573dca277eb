"""Train a U-Net, under pmap on all devices; resumes the run it finds in the workdir.

python experiments/train.py digits --workdir runs/digits
python experiments/train.py cifar10 --workdir runs/cifar10 --data-dir /data/tfds
python experiments/train.py cifar10-small --workdir runs/mine --data photos/ --image-size 32
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import cli
import generate
import jax
import jax.numpy as jnp
import numpy as np
import pictures
import tensorboardX
import tqdm
from presets import PRESETS, ROUNDING, TrainConfig
from workdir import Network, checkpoints, only_one_process, write_config, write_whole

from ddim_jax import data, parallel, train
from ddim_jax.schedule import ddim_timesteps


def run(config: TrainConfig) -> None:
    """Train to config.max_steps, or for config.max_seconds, leaving a checkpoint."""
    started = time.monotonic()
    _check(config)
    if config.distributed:
        parallel.initialize_distributed(config.coordinator, config.num_processes, config.process_id)
        if config.max_seconds is not None and jax.process_count() > 1:
            raise ValueError("max_seconds must be None with several hosts: their clocks differ.")
    parallel.check_batch_size(config.batch_size, config.num_microbatches)
    workdir = pathlib.Path(config.workdir)
    source = data.load_images(
        config.data, split=config.split, data_dir=config.data_dir, image_size=config.image_size
    )
    model = config.model.make(source.image_shape[-1])
    _check_labels(config, source)
    schedule = config.schedule.make()
    tx = train.adam_with_warmup(config.learning_rate, config.warmup_steps, config.clip_norm)
    loss_fn = train.diffusion_loss(
        model.apply,
        schedule,
        batch_size=config.batch_size,
        norm=config.loss,
        reduction=config.reduction,
        timesteps=config.timesteps,
        flip=config.flip,
        num_classes=model.num_classes,
        label_dropout=0.0 if model.num_classes is None else config.label_dropout,
    )

    def initial_state(key):
        init_key, run_key = jax.random.split(key)
        label = None if model.num_classes is None else 0
        params = model.init(init_key, jnp.zeros(source.image_shape), 0, label)["params"]
        return train.init_train_state(run_key, params, tx)

    # Traced before anything is written: a network that does not fit the images is refused here.
    key = jax.random.key(config.seed, impl="threefry2x32")
    template = jax.eval_shape(initial_state, key)
    facts = {
        "image_shape": source.image_shape,
        "num_images": len(source),
        "rounding": ROUNDING,
    }
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(only_one_process(workdir))
            write_config(workdir, dataclasses.asdict(config) | facts)
        checkpointer = stack.enter_context(checkpoints(workdir, config.keep_checkpoints))
        if checkpointer.latest_step() is None:
            # Runs once: on a CPU optimizing this program takes far longer than running it.
            quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
            state = jax.jit(initial_state, compiler_options=quick)(key)
        else:
            state = checkpointer.restore(template)
        start = int(state.step)
        print(
            f"{source.name}: {len(source)} images of {source.image_shape}; network of "
            f"{sum(p.size for p in jax.tree.leaves(state.params)):,} parameters; "
            f"{jax.device_count()} {jax.default_backend()} device(s); step {start} of "
            f"{config.max_steps}"
        )
        if start >= config.max_steps:
            return
        log = stack.enter_context(_Log(workdir, start, config))
        step_fn = parallel.pmap_train_step(
            loss_fn, tx, ema_decay=config.ema_decay, num_microbatches=config.num_microbatches
        )
        batches = data.prefetch_to_device(_batches(source, config, start), parallel.shard)
        replicas = parallel.replicate(state)

        network = Network(model, schedule, source.image_shape, config.spacing)
        preview = _preview_program(network) if config.sample_every else None
        before = None  # step and metrics of the update before this one
        max_seconds = float("inf") if config.max_seconds is None else config.max_seconds
        for step in range(start + 1, config.max_steps + 1):
            replicas, metrics = step_fn(replicas, next(batches))
            if before is not None:
                log.write(*before)  # one step late, so that the device never waits
            before = (step, metrics)
            seconds = time.monotonic() - started
            last = step == config.max_steps or seconds > max_seconds
            if last or step % config.checkpoint_every == 0:
                log.read(step, metrics)  # a spoilt state is never saved
                checkpointer.save(step, parallel.unreplicate(replicas))
            if preview is not None and (
                step == config.max_steps or step % config.sample_every == 0
            ):
                log.picture(step, preview(parallel.unreplicate(replicas.ema_params)))
            if last:
                log.write(step, metrics)
                break
    print(f"step {step} is in {workdir}" + ("" if step == config.max_steps else "; call again"))


def _check(config: TrainConfig) -> None:
    """Refuse, before anything is written, settings that no run could use."""
    cli.check_at_least(
        config,
        max_steps=1,
        batch_size=1,
        num_microbatches=1,
        warmup_steps=0,
        seed=0,
        max_seconds=0,
        log_every=1,
        sample_every=0,
        checkpoint_every=1,
        keep_checkpoints=1,
        num_workers=0,
    )
    for name in ("learning_rate", "clip_norm"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite; got {value}.")
    for name in ("ema_decay", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1); got {getattr(config, name)}.")


def _batches(source: data.ImageSource, config: TrainConfig, start: int) -> Iterator[Any]:
    """This host's batches from step `start` on, without labels the network would not use."""
    stream = data.batches(
        source,
        config.batch_size,
        seed=config.seed,
        start_step=start,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        num_workers=config.num_workers,
    )
    keep = {"image"} if config.model.num_classes is None else {"image", "label"}
    return ({key: batch[key] for key in batch.keys() & keep} for batch in stream)


def _check_labels(config: TrainConfig, source: data.ImageSource) -> None:
    wanted = config.model.num_classes
    if wanted is not None and wanted != source.num_classes:
        raise ValueError(
            f"model.num_classes must be the number of the data's classes, {source.num_classes}, or "
            f"None to train without labels; got {wanted}."
        )


def _preview_program(network: Network):
    """(ema_params) -> 64 images at S = 50, always from the same latents."""
    timesteps = ddim_timesteps(
        network.schedule.num_steps, min(50, network.schedule.num_steps), network.spacing
    )
    count = -(-64 // jax.local_device_count()) * jax.local_device_count()

    program = generate.image_program(network, timesteps)
    return lambda params: np.asarray(program(params, jnp.arange(count), 0).images)[:64]


class _Log:
    """metrics.jsonl, TensorBoard and the progress bar; the first host writes, the others watch."""

    def __init__(self, workdir: pathlib.Path, start: int, config: TrainConfig):
        self._workdir, self._every, self._batch_size = workdir, config.log_every, config.batch_size
        self._time, self._step = time.monotonic(), start
        self._bar = tqdm.tqdm(
            total=config.max_steps, initial=start, unit="step", disable=None, smoothing=0.1
        )
        self._writes = jax.process_index() == 0
        self._losses: list[float] = []

    def __enter__(self) -> _Log:
        if self._writes:
            self._board = tensorboardX.SummaryWriter(str(self._workdir / "tensorboard"))
            path = self._workdir / "metrics.jsonl"
            _forget_after(path, self._step)
            self._lines = path.open("a", buffering=1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._writes:
            self._board.close()
            self._lines.close()

    def read(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """The metrics of a step; raises FloatingPointError if its update spoilt the state."""
        values = {name: float(value) for name, value in parallel.unreplicate(metrics).items()}
        for name, value in values.items():
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"the {name} of step {step} is {value}; checkpoints from before, if any, are "
                    f"kept in {self._workdir}. Lower the learning rate or lengthen the warm-up, in "
                    "another workdir."
                )
        return values

    def write(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Record one step; every `log_every` steps write the mean since the last line."""
        values = self.read(step, metrics)
        self._losses.append(values["loss"])
        self._bar.update(1)
        if step % self._every:
            return
        now = time.monotonic()
        line = {
            "step": step,
            "loss": float(np.mean(self._losses)),
            "grad_norm": values["grad_norm"],
            "images_per_second": (step - self._step) * self._batch_size / (now - self._time),
        }
        self._losses, self._time, self._step = [], now, step
        rate = line["images_per_second"]
        self._bar.set_postfix_str(f"loss {line['loss']:.4f}, {rate:.0f} images/s")
        if self._writes:
            self._lines.write(json.dumps(line) + "\n")
            for name in line.keys() - {"step"}:
                self._board.add_scalar(name, line[name], step)

    def picture(self, step: int, images: np.ndarray) -> None:
        """Write a grid of samples."""
        if self._writes:
            pictures.save_grid(self._workdir / "samples" / f"step_{step:07d}.png", images)
            self._board.add_image("samples", pictures.tile(images, 8), step, dataformats="HWC")


def _forget_after(path: pathlib.Path, step: int) -> None:
    """Drop the lines of steps that a resumed run takes again, and one that a kill cut short."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(kept).encode())


if __name__ == "__main__":
    cli.run(run, TrainConfig, PRESETS)
