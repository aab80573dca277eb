"""Draw images from a trained or converted model.

python experiments/sample.py --workdir runs/digits --num-sample-steps 50 --out out/samples
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import numpy as np
from common import cli, pictures
from common.options import DrawOptions, ModelOptions, SamplerOptions, StepsOptions

from ddim_jax.keys import seed_key
from ddim_jax.paths import Folder
from ddim_jax.runs import DrawInputs, draw_images, image_program
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import Sampler
from ddim_jax.solvers import named_sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawOptions, SamplerOptions, StepsOptions, ModelOptions):
    """Images from one model with one setting of the sampler."""

    out: Folder
    """Where the images go: grid.png and one PNG for each image."""
    num_images: int = option(64, at_least=1)
    """How many images."""
    sigma_hat: bool = False
    """The same as --sampler sigma_hat: DDPM's larger variance (appendix D.3)."""
    label: int | None = None
    """Draw this class only; a network with K classes draws i % K if not given."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: above 1 sharpens the classes, at two network evaluations a step."""
    save_npz: bool = False
    """Also write samples.npz, uint8 (N, H, W, C) under "images"."""


def main(config: SampleConfig) -> None:
    """Draw the images and write them."""
    check_limits(config)
    rule, sampler = _sampler(config)
    run = config.load()
    timesteps = run.spec.timesteps(config.num_sample_steps, config.spacing)
    program = image_program(
        run.spec,
        timesteps,
        lambda: sampler,
        label=config.label,
        guidance_scale=config.guidance_scale,
    )
    out = pathlib.Path(config.out)
    _check_out(out, config.num_images)
    started = time.monotonic()
    inputs = DrawInputs(run.params, seed_key(config.seed))
    images = draw_images(program, inputs, config.num_images, config.batch_size)
    seconds = time.monotonic() - started

    pictures.save_grid(out / "grid.png", images)
    for i, image in enumerate(images):
        pictures.save_png(out / "images" / f"{i:05d}.png", image)
    if config.save_npz:
        np.savez(out / "samples.npz", images=images)
    print(
        f"{len(images)} images in {out}: {config.weights} weights of step {run.step}, "
        f"S = {config.num_sample_steps} {config.spacing or run.spec.spacing}, {rule}, "
        f"seed {config.seed}, run {run.fingerprint_id}, {seconds:.1f} s with compilation"
    )


def _sampler(config: SampleConfig) -> tuple[str, Sampler]:
    """The sampler, and what to call it."""
    name = config.sampler
    if config.sigma_hat:
        if name != "ddim" or config.eta != 0:
            raise ValueError(
                "sigma_hat must be left out beside a sampler or an eta, since it is a sampler of "
                f"its own; got sampler {name}, eta {config.eta:g}."
            )
        name = "sigma_hat"
    rule = f"eta {config.eta:g}" if name == "ddim" else name.replace("sigma_hat", "sigma-hat")
    return rule, named_sampler(name, config.eta)


def _check_out(out: pathlib.Path, num_images: int) -> None:
    """Make the folder, unless images would be left in it that are not of this call."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    more = sum(int(path.stem) >= num_images for path in (out / "images").glob("[0-9]*.png"))
    if more:
        raise ValueError(
            f"out {out} holds {more} images more than the {num_images} asked for, of an earlier "
            "call; delete them or give another folder."
        )


if __name__ == "__main__":
    cli.run(main, SampleConfig)
