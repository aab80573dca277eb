"""Draw images from a trained or converted model.

python experiments/sample.py --workdir runs/digits --num-sample-steps 50 --out out/samples
python experiments/sample.py --workdir runs/digits --timesteps 999 600 300 0 --out out/samples

Images are written as they are drawn, image i from (seed, i) alone. A call that was killed, made
again, goes on from there to the same files, and one with a larger --num-images adds to them.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from common import cli, pictures
from common.options import DrawOptions, ModelOptions, SamplerOptions, SpacingOptions
from common.progress import Progress
from common.sample_set import RECORD, SampleSet, open_to_draw, rule_of, settings_of
from common.times import shown, spelt, timesteps_of

from ddim_jax.files import only_one_process
from ddim_jax.keys import seed_key
from ddim_jax.parallel import map_batches
from ddim_jax.paths import Folder
from ddim_jax.runs import DrawInputs, Run, checked_images, image_program
from ddim_jax.runs.draw import ImageProgram
from ddim_jax.runs.options import check_limits, option
from ddim_jax.runs.stop import Stop, stop_signals
from ddim_jax.samplers import Sampler
from ddim_jax.solvers import named_sampler, takes_eta

GRID_IMAGES = 256
"""So many of the images are in grid.png."""
NUM_STEPS = 50
"""S, where nothing says it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawOptions, SamplerOptions, SpacingOptions, ModelOptions):
    """Images from one model with one setting of the sampler."""

    out: Folder
    """Where the images go: one PNG for each, grid.png, and samples.json, which says what they are.
    The same command goes on with a set found there; of other settings it is refused."""
    num_images: int = option(64, at_least=1)
    """How many images; of a set that is there, as many or more."""
    sigma_hat: bool = False
    """The same as --sampler sigma_hat: DDPM's larger variance (appendix D.3)."""
    label: int | None = None
    """Draw this class only; a network with K classes draws i % K if not given."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: above 1 sharpens the classes, at two network evaluations a step."""
    num_sample_steps: int | None = option(None, at_least=1)
    """S, the number of steps: one network evaluation each, but two for heun; 50 if not given."""
    timesteps: tuple[int, ...] = ()
    """The time indices themselves, from noise to data, in place of S and a sub-sequence."""
    save_npz: bool = False
    """Also write samples.npz, uint8 (N, H, W, C) under "images"."""


def main(config: SampleConfig) -> None:
    """Draw the images that are missing, and write each batch of them."""
    check_limits(config)
    name, sampler = _sampler(config)
    run = config.load()
    num_steps, spacing = _grid(config, run)
    timesteps = timesteps_of(run.spec, num_steps, spacing)
    program = image_program(
        run.spec,
        timesteps,
        lambda: sampler,
        label=config.label,
        guidance_scale=config.guidance_scale,
    )
    settings = _settings(config, name, run, num_steps, spacing)
    out = pathlib.Path(config.out)
    with only_one_process(out), stop_signals("finishing this batch and writing it") as stop:
        started = time.monotonic()
        samples = open_to_draw(out / RECORD, out / "images", settings, config.num_images)
        missing = samples.missing()
        if not samples.complete:  # what shows them all would show fewer, or others
            for product in (out / "grid.png", out / "samples.npz"):
                product.unlink(missing_ok=True)
        _draw(samples, program, DrawInputs(run.params, seed_key(config.seed)), missing, stop)
        if left := samples.missing():
            there = config.num_images - len(left)
            print(
                f"stopped, {stop.name}: {there} of {config.num_images} images are in {out}; "
                "call again for the rest"
            )
            return
        _finish(config, samples, out)
    seconds = time.monotonic() - started
    kept = config.num_images - len(missing)
    print(
        f"{config.num_images} images in {out}{f' ({kept} of them were there)' if kept else ''}: "
        f"{run.weights_called}, "
        f"S = {num_steps} {shown(spacing)}, {rule_of(name, settings['eta'])}, "
        f"{'x0 clipped, ' if config.clip_x0 else ''}"
        f"seed {config.seed}, run {run.fingerprint_id}, {seconds:.1f} s with compilation"
    )


def _grid(config: SampleConfig, run: Run) -> tuple[int, str]:
    """S, and the sub-sequence or own list. Raises ValueError where both are given."""
    if not config.timesteps:
        return config.num_sample_steps or NUM_STEPS, config.spacing or run.spec.spacing
    for name in ("spacing", "num_sample_steps"):
        if (given := getattr(config, name)) is not None:
            raise ValueError(
                f"{name} must be left out beside timesteps, which say all; got {given}."
            )
    return len(config.timesteps), spelt(config.timesteps)


def _settings(
    config: SampleConfig, sampler: str, run: Run, num_steps: int, spacing: str
) -> dict[str, Any]:
    """All that decides the images."""
    return settings_of(
        run,
        seed=config.seed,
        num_sample_steps=num_steps,
        spacing=spacing,
        sampler=sampler,
        eta=config.eta if takes_eta(sampler) else None,
        label=config.label,
        guidance_scale=config.guidance_scale,
        batch_size=min(config.batch_size, config.num_images),
    )


def _draw(
    samples: SampleSet,
    program: ImageProgram,
    inputs: DrawInputs,
    missing: Sequence[int],
    stop: Stop,
) -> None:
    """Write the missing images, a batch at a time, until all are there or a signal came.

    A batch is the same images in every call, though some of them are there: so that each call runs
    the same program, to the same bits.
    """
    size = samples.content["batch_size"]
    starts = sorted({index // size * size for index in missing})
    batches = [np.arange(start, start + size) for start in starts]
    absent = np.zeros(samples.num_images, bool)
    absent[missing] = True
    batches_in_time = itertools.takewhile(lambda indices: not stop.asked, batches)
    drawn = map_batches(program, inputs, batches_in_time)
    with Progress("sample.py", len(missing), "images") as progress:
        for indices, pixels in zip(batches, drawn, strict=False):
            wanted = indices[indices < samples.num_images]
            images = checked_images(jax.tree.map(lambda array: array[: len(wanted)], pixels))  # noqa: B023
            new = absent[wanted]
            samples.save(wanted[new], images[new])
            progress.add(int(new.sum()))


def _finish(config: SampleConfig, samples: SampleSet, out: pathlib.Path) -> None:
    """What shows the images, from their files; then say that all is there."""
    shown = min(samples.num_images, GRID_IMAGES)
    if not (out / "grid.png").exists():
        pictures.save_grid(out / "grid.png", np.stack([*samples.read(shown)]))
    if shown < samples.num_images:
        print(f"{out / 'grid.png'} shows the first {shown}")
    if config.save_npz and not (out / "samples.npz").exists():
        samples.save_npz(out / "samples.npz")
    if not samples.complete:
        samples.finished()


def _sampler(config: SampleConfig) -> tuple[str, Sampler]:
    """The sampler, after its name in SAMPLERS."""
    name = config.sampler
    if config.sigma_hat:
        if name != "ddim" or config.eta != 0:
            raise ValueError(
                "sigma_hat must be left out beside a sampler or an eta, since it is a sampler of "
                f"its own; got sampler {name}, eta {config.eta:g}."
            )
        name = "sigma_hat"
    return name, named_sampler(name, config.eta)


if __name__ == "__main__":
    cli.run(main, SampleConfig)
