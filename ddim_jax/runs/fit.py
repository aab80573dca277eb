"""The training loop: under pmap on all devices of all hosts, resumed where its folder stands."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddim_jax import parallel
from ddim_jax.checkpoint import Checkpointer
from ddim_jax.data.content import content_of
from ddim_jax.data.load import load_images
from ddim_jax.data.source import ImageSource
from ddim_jax.data.stream import batches, prefetch_to_device
from ddim_jax.files import only_one_process
from ddim_jax.hashing import content_hash
from ddim_jax.keys import seed_key
from ddim_jax.numerics import matmul_precision
from ddim_jax.objectives import Frozen, LossFn, Setup
from ddim_jax.paths import local_path
from ddim_jax.runs.config import TrainConfig
from ddim_jax.runs.draw import DrawInputs, Pixels, draw_pixels, image_program
from ddim_jax.runs.folder import (
    DATA_CONTENT,
    check_not_lost,
    checkpoints,
    has_checkpoints,
    load_codec_params,
    save_codec_params,
    write_config,
)
from ddim_jax.runs.hosts import agree_on_run, agree_on_state, agree_on_workdir, join
from ddim_jax.runs.init_from import check_init_from, weights_from
from ddim_jax.runs.log import Log, Watcher
from ddim_jax.runs.measure import Measure, open_measure
from ddim_jax.runs.spec import ROUNDING, RunParams, RunSpec
from ddim_jax.runs.stop import Stop, stop_signals
from ddim_jax.train import TrainState, adam_with_warmup, init_train_state

NUM_PREVIEWS = 64
PREVIEW_STEPS = 50


class _Job(NamedTuple):
    """A run that is about to be trained."""

    config: TrainConfig
    workdir: pathlib.Path
    source: ImageSource
    spec: RunSpec
    tx: optax.GradientTransformation
    loss_fn: LossFn
    frozen: Frozen
    init: Callable[[jax.Array, Any], TrainState]
    """Traced, (key, given weights or None): the state before the first step."""
    resumed: bool
    measure: Measure | None
    """What `fid_every` asks for."""


def fit(config: TrainConfig, watchers: Sequence[Watcher] = ()) -> None:
    """Train to config.max_steps, or for config.max_seconds, leaving a checkpoint in config.workdir.

    A run found there is resumed, to the same bits as one that was never stopped. Losses go to
    metrics.jsonl and to the watchers. SIGTERM and SIGINT finish the step, save it and return; so
    do all hosts when one of them is told to, or its time is up.
    Several hosts (`distributed`) must share the workdir, have equally many devices and be given the
    same settings and images. Each has its own process_id, and may spell or place `workdir`, `data`,
    `data_dir` and `coordinator` otherwise. They compare settings, images, versions, what is in the
    workdir, step and weights before the first update.
    Raises ValueError, before anything is written, for settings that no run could use, or other
    settings than those of the run in the folder; FloatingPointError for a loss or gradient that is
    not finite, the checkpoints before it kept. What one host refuses, and what they do not agree
    on, is raised on all of them.
    """
    started = time.monotonic()
    config = join(config)
    with matmul_precision(config.precision):
        _fit(config, watchers, started)


def _fit(config: TrainConfig, watchers: Sequence[Watcher], started: float) -> None:
    """`fit` with settings that a run could use."""
    job = parallel.together(lambda: _job(config))
    description = parallel.together(lambda: _described(job))
    agree_on_run(description, job.resumed)
    weights = parallel.together(lambda: _given_weights(job))
    # Traced before anything is written: a network that does not fit the images is refused here.
    key = seed_key(config.seed)
    template = parallel.together(lambda: jax.eval_shape(job.init, key, weights))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals("finishing this step and saving it"))
        first = jax.process_index() == 0
        parallel.together(lambda: first and stack.enter_context(only_one_process(job.workdir)))
        agree_on_workdir(job.workdir)
        parallel.together(lambda: first and _write_settings(job, description))
        checkpointer = stack.enter_context(
            checkpoints(job.workdir, config.keep_checkpoints, config.keep_every or None)
        )
        replicas, start = _first_replicas(job, key, weights, template, checkpointer)
        _announce(job, template, start)
        if start < config.max_steps:
            _train(job, replicas, start, checkpointer, watchers, started, stop)


def _first_replicas(
    job: _Job, key, weights, template, checkpointer: Checkpointer
) -> tuple[TrainState, int]:
    """The state to go on from, on every device, and its step; what it was made of is let go of."""
    state, step = parallel.together(lambda: _start(job, key, weights, template, checkpointer))
    agree_on_state(state)
    if job.resumed:
        parallel.together(lambda: checkpointer.set_aside_after(step))
    return parallel.replicate(state), step


def _write_settings(job: _Job, description: dict[str, Any]) -> None:
    write_config(job.workdir, description)
    save_codec_params(job.workdir, job.frozen.codec)


def _start(job: _Job, key, weights, template, checkpointer: Checkpointer) -> tuple[TrainState, int]:
    """The state of the newest checkpoint that is whole, or the one before the first step."""
    if checkpointer.latest_step() is not None:
        return checkpointer.restore_newest(template)
    if weights is not None:
        return job.init(key, weights), 0
    # Runs once: on a CPU optimizing this program takes far longer than running it.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    return jax.jit(job.init, compiler_options=quick)(key, None), 0


def _job(config: TrainConfig) -> _Job:
    workdir = local_path(config.workdir, "workdir", "folder")
    source = load_images(
        config.data,
        split=config.split,
        data_dir=config.data_dir,
        image_size=config.image_size,
        crop=config.crop,
    )
    spec = config.spec(source.image_shape)
    spec.timesteps(1)  # refuses a spacing that the schedule has not
    _check_labels(config, source)
    check_not_lost(workdir)
    resumed = has_checkpoints(workdir)
    codec = load_codec_params(workdir) if resumed else spec.codec.init(spec.image_shape)
    setup = Setup(
        apply_fn=spec.model.clone(remat=config.remat).apply,
        schedule=spec.schedule,
        batch_size=config.batch_size,
        predicts=spec.predicts,
        num_classes=spec.num_classes,
        codec=spec.codec,
    )
    tx = adam_with_warmup(config.learning_rate, config.warmup_steps, config.clip_norm)
    if config.init_from is not None and not resumed:
        check_init_from(config.init_from, spec)
    return _Job(
        config=config,
        workdir=workdir,
        source=source,
        spec=spec,
        tx=tx,
        loss_fn=config.objective.loss_fn(setup),
        # On the host: what runs on devices gets copies there.
        frozen=jax.device_get(Frozen(codec, config.objective.frozen())),
        init=_initial_state(spec, setup, config, tx),
        resumed=resumed,
        measure=open_measure(config, spec, source),
    )


def _initial_state(spec, setup: Setup, config: TrainConfig, tx):
    """(key, weights or None) -> the state before the first step; random weights for None."""

    def init(key: jax.Array, weights: Any) -> TrainState:
        init_key, run_key = jax.random.split(key)
        ema_params = None
        if weights is None:
            label = None if spec.num_classes is None else 0
            params = spec.model.init(init_key, jnp.zeros(spec.latent_shape), 0, label)["params"]
        else:
            params, ema_params = weights
        loss_state = config.objective.init_state(setup)
        return init_train_state(run_key, params, tx, ema_params=ema_params, loss_state=loss_state)

    return init


def _given_weights(job: _Job) -> tuple[Any, Any] | None:
    workdir = job.config.init_from
    return None if workdir is None or job.resumed else weights_from(workdir, job.spec)


def _described(job: _Job) -> dict[str, Any]:
    """config.json: the settings, and facts that decide the run beside them."""
    facts = {
        "image_shape": job.spec.image_shape,
        "num_images": len(job.source),
        DATA_CONTENT: content_of(job.source),
        "rounding": ROUNDING,
    }
    if job.spec.num_classes is not None:
        facts["unconditional"] = job.spec.unconditional
    if jax.tree.leaves(job.frozen.codec):
        facts["codec_hash"] = content_hash(job.frozen.codec)[:16]
    if jax.tree.leaves(job.frozen.objective):
        facts["frozen_hash"] = content_hash(job.frozen.objective)[:16]
    return job.config.describe() | facts


def _log(job: _Job, start: int, watchers: Sequence[Watcher]) -> Log:
    config = job.config
    return Log(
        job.workdir,
        start,
        config.max_steps,
        config.log_every,
        config.batch_size,
        watchers,
        config.skip_updates,
    )


def _announce(job: _Job, state: TrainState, step: int) -> None:
    print(
        f"{job.source.name}: {len(job.source)} images of {job.source.image_shape}; network of "
        f"{sum(p.size for p in jax.tree.leaves(state.params)):,} parameters; "
        f"{jax.device_count()} {jax.default_backend()} device(s); step {step} of "
        f"{job.config.max_steps}",
        flush=True,
    )
    if job.measure is not None and jax.process_index() == 0:
        for warning in job.measure.protocol.get("warnings", ()):
            print(f"warning: {warning}", file=sys.stderr, flush=True)


def _train(
    job: _Job,
    replicas: TrainState,
    start: int,
    checkpointer: Checkpointer,
    watchers: Sequence[Watcher],
    started: float,
    stop: Stop,
) -> None:
    """Update from step `start` to the last, or until time is up or a signal came.

    Consumes the replicas.
    """
    config = job.config
    step_fn = parallel.pmap_train_step(
        job.loss_fn,
        job.tx,
        ema_decay=config.ema_decay,
        ema_warmup=config.ema_warmup and config.init_from is None,
        num_microbatches=config.num_microbatches,
        skip_nonfinite=config.skip_updates > 0,
    )
    stream = prefetch_to_device(_batches(job, start), parallel.shard)
    frozen = parallel.replicate(job.frozen)
    preview = _preview_program(job) if config.sample_every else None
    max_seconds = float("inf") if config.max_seconds is None else config.max_seconds
    before = None  # step and metrics of the update before this one
    step, last, is_due = start, False, _every_minutes(config.checkpoint_minutes, config.log_every)
    with contextlib.ExitStack() as stack:
        # It may find lines that are damaged.
        log = parallel.together(lambda: stack.enter_context(_log(job, start, watchers)))
        while not last:
            step += 1
            replicas, metrics = step_fn(replicas, next(stream), frozen)
            if before is not None:
                log.write(*before)  # one step late, so that the device never waits
            before = (step, metrics)
            done = step == config.max_steps
            if time.monotonic() - started > max_seconds:
                stop.ask("time is up")
            last = stop.at(step) or done
            saves = last or step % config.checkpoint_every == 0 or is_due(step)
            saves |= config.keep_every > 0 and step % config.keep_every == 0
            draws = preview is not None and (done or step % config.sample_every == 0)
            # Lines and images come before the checkpoint: a run that is killed in between does
            # them again, and one that goes on after it would not.
            measures = job.measure and (done or step % config.fid_every == 0)
            if saves or draws or measures:
                log.write(*before)  # a spoilt state is never saved
                before = None
            if draws and preview is not None:
                log.images(step, preview(parallel.unreplicate(replicas.ema_params)))
            if measures and job.measure is not None:
                averaged = parallel.unreplicate(replicas.ema_params)
                weights = RunParams(averaged, job.frozen.codec)
                numbers = functools.partial(job.measure.numbers, weights)
                log.measured(step, numbers, job.measure.protocol)
            if saves:
                log.keep_window(step, config.keep_checkpoints)
                checkpointer.save(step, parallel.unreplicate(replicas))
    if stop.asked:
        checkpointer.wait()
    why = "" if done else f"; stopped, {stop.name}: call again"
    print(f"step {step} is in {job.workdir}{why}", flush=True)


def _every_minutes(minutes: float | None, log_every: int) -> Callable[[int], bool]:
    """(step) -> whether that is long ago. Of several hosts the first one's clock says so, and the
    others ask it where a line is written.
    """
    since = time.monotonic()

    def is_due(step: int) -> bool:
        nonlocal since
        if minutes is None or (jax.process_count() > 1 and step % log_every):
            return False
        due = parallel.gather(str(time.monotonic() - since > 60 * minutes))[0] == "True"
        since = time.monotonic() if due else since
        return due

    return is_due


def _batches(job: _Job, start: int) -> Iterator[Any]:
    """This host's batches from step `start` on, without labels the network would not use."""
    stream = batches(
        job.source,
        job.config.batch_size,
        seed=job.config.seed,
        start_step=start,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        num_workers=job.config.num_workers,
    )
    keep = {"image"} if job.spec.num_classes is None else {"image", "label"}
    return ({key: batch[key] for key in batch.keys() & keep} for batch in stream)


def _check_labels(config: TrainConfig, source: ImageSource) -> None:
    wanted = config.model.num_classes
    if wanted is not None and wanted != source.num_classes:
        raise ValueError(
            f"model.num_classes must be the number of the data's classes, {source.num_classes}, or "
            f"None to train without labels; got {wanted}."
        )


def _preview_program(job: _Job) -> Callable[[Any], Pixels]:
    """(averaged weights) -> images at S = 50, always from the same latents."""
    spec = job.spec
    timesteps = spec.timesteps(min(PREVIEW_STEPS, spec.schedule.num_steps))
    program = image_program(spec, timesteps)

    def draw(ema_params: Any) -> Pixels:
        params = RunParams(ema_params, job.frozen.codec)
        inputs = DrawInputs(params, seed_key(0))
        return draw_pixels(program, inputs, NUM_PREVIEWS, NUM_PREVIEWS)

    return draw
