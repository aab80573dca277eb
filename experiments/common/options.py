"""Options that several scripts have: a script's dataclass inherits what it needs.

Limits stand at the fields; `check_limits(config)` is the first line of every main.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from ddim_jax.checks import NUM_SEEDS
from ddim_jax.data.load import CropName
from ddim_jax.numerics import Precision
from ddim_jax.paths import DataName, Folder
from ddim_jax.runs import Run, Weights, load_trained
from ddim_jax.runs.options import MAX_BATCH, MAX_SIDE, option
from ddim_jax.schedule import Spacing
from ddim_jax.solvers import SAMPLERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and which of its weights."""

    workdir: Folder
    """The model: a folder that train.py or convert.py wrote."""
    weights: Weights = "ema"
    """The averaged weights, or the raw ones."""
    step: int | None = option(None, at_least=0)
    """Which checkpoint; the newest if not given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision to compute in; the model's own if not given."""
    precision: Precision | None = None
    """How products of float32 matrices are computed: default is the device's quickest way (TF32 on
    newer GPUs, bfloat16 on TPUs), highest is float32; the model's own if not given."""
    clip_x0: bool = False
    """Clip every data prediction to [-1, 1], as DDPM's code does and DDIM's does not: with
    --sampler ddpm or ddpm_fixed_large that is DDPM's own protocol. Not for encoding."""

    def load(self) -> Run:
        """The model."""
        return load_trained(
            self.workdir, self.weights, self.step, self.dtype, self.precision, self.clip_x0
        )

    def check_encodes(self) -> None:
        """Raise ValueError for a network that clips: what it cut cannot be found again."""
        if self.clip_x0:
            raise ValueError(
                "clip_x0 must be left out where images are encoded, since clipping cannot be "
                "inverted; got True."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpacingOptions:
    """Which sub-sequence."""

    spacing: Spacing | None = None
    """Sub-sequence of time indices; the model's own if not given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsOptions(SpacingOptions):
    """How many steps on it."""

    num_sample_steps: int = option(50, at_least=1)
    """S, the number of steps: one network evaluation each, but two for heun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How images are drawn."""

    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Image i depends on (seed, i) alone."""
    batch_size: int = option(256, at_least=1, below=MAX_BATCH)
    """Images at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """One sampler."""

    sampler: Annotated[str, tyro.conf.arg(help=f"The method: {', '.join(SAMPLERS)}.")] = "ddim"
    eta: float = option(0.0, at_least=0)
    """0 is DDIM, 1 is DDPM (eq. 16); for the sampler ddim."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from."""

    split: str = "train"
    """Which part of the data; TFDS slices such as train[:1000] work."""
    data_dir: Folder | None = None
    """Where TFDS sets stand; its own default if not given."""
    image_size: int | None = option(None, at_least=1, below=MAX_SIDE)
    """Resize and crop images to this side; without it all must have one size."""
    crop: CropName | None = None
    """celeba cuts the paper's 128x128 out of aligned CelebA images, 178x218, and makes it 64x64
    unless image_size is given; TFDS's celeb_a always has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealImageOptions:
    """Real images for a model."""

    data: DataName | None = None
    """digits, a TFDS name, a folder, or a .npz or .npy file; what the model was trained on if not
    given."""
    split: str | None = None
    """Which part of the data; if not given one held out from training, where there is one."""
    data_dir: Folder | None = None
    """Where TFDS sets stand."""
    crop: CropName | None = None
    """celeba cuts the paper's 128x128 out of aligned CelebA images, 178x218."""
