"""Draw images from a trained or converted model.

python experiments/sample.py --workdir runs/digits --num-sample-steps 50 --out out/samples
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import cli
import generate
import numpy as np
import pictures
from workdir import Weights, load_trained

from ddim_jax.schedule import Spacing, ddim_timesteps


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Images from one model with one setting of the sampler."""

    workdir: str
    """The model: a folder that train.py or convert.py wrote."""
    out: str
    """Where the images go: grid.png and one PNG for each image."""
    num_images: int = 64
    """How many images."""
    num_sample_steps: int = 50
    """S, the number of steps: one network evaluation each, but two for heun."""
    sampler: generate.SamplerName = "ddim"
    """The method; the last three solve DDIM's equation in other ways."""
    eta: float = 0.0
    """0 is DDIM, 1 is DDPM (eq. 16); for the sampler ddim."""
    sigma_hat: bool = False
    """DDPM's larger variance instead (appendix D.3); for the sampler ddim."""
    label: int | None = None
    """Draw this class only; a network with K classes draws i % K if not given."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: above 1 sharpens the classes, at two network evaluations a step."""
    spacing: Spacing | None = None
    """Sub-sequence of time indices; the model's own if not given."""
    seed: int = 0
    """Image i depends on (seed, i) alone."""
    batch_size: int = 256
    """Images drawn at once."""
    weights: Weights = "ema"
    """The averaged weights, or the raw ones."""
    save_npz: bool = False
    """Also write samples.npz, uint8 (N, H, W, C) under "images"."""


def main(config: SampleConfig) -> None:
    """Draw the images and write them."""
    cli.check_at_least(config, num_images=1, batch_size=1)
    sampler = generate.make_sampler(config.sampler, config.eta, config.sigma_hat)
    trained = load_trained(config.workdir, config.weights)
    network = trained.network
    spacing = config.spacing or network.spacing
    timesteps = ddim_timesteps(network.schedule.num_steps, config.num_sample_steps, spacing)
    program = generate.image_program(
        network,
        timesteps,
        lambda: sampler,
        label=config.label,
        guidance_scale=config.guidance_scale,
    )
    out = pathlib.Path(config.out)
    _check_out(out, config.num_images)
    started = time.monotonic()
    images = generate.images(
        program, trained.params, config.num_images, config.batch_size, config.seed
    )
    seconds = time.monotonic() - started

    pictures.save_grid(out / "grid.png", images)
    for i, image in enumerate(images):
        pictures.save_png(out / "images" / f"{i:05d}.png", image)
    if config.save_npz:
        np.savez(out / "samples.npz", images=images)
    if config.sampler == "ddim":
        rule = "sigma-hat" if config.sigma_hat else f"eta {config.eta:g}"
    else:
        rule = config.sampler
    print(
        f"{len(images)} images in {out}: {config.weights} weights of step {trained.step}, "
        f"S = {config.num_sample_steps} {spacing}, {rule}, seed {config.seed}, "
        f"{seconds:.1f} s with compilation"
    )


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
