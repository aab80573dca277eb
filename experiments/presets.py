"""The settings of a training run, and the named ones."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from ddim_jax.losses import Norm
from ddim_jax.schedule import (
    Schedule,
    Spacing,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
)
from ddim_jax.unet import UNet

ROUNDING = "nearest"
"""How samples become uint8 (`ddim_jax.data.to_uint8`). Every config.json says so: a Frechet
distance differs with it."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The U-Net; the defaults are the published CIFAR-10 network."""

    channels: int = 128
    """Channels at full resolution."""
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in units of the first; each level halves the image."""
    num_res_blocks: int = 2
    """Residual blocks of each level."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Image heights at which the blocks attend."""
    dropout: float = 0.1
    """Dropout rate while training."""
    norm_groups: int = 32
    """Groups of the group norms; must divide the channels."""
    num_classes: int | None = None
    """Condition on the data's labels, this many classes; None trains without labels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; parameters and norms stay float32. bfloat16 suits GPU, TPU."""

    def make(self, image_channels: int) -> UNet:
        """The network for images of that many channels."""
        return UNet(image_channels=image_channels, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule; the defaults are every published network's."""

    name: Literal["linear", "scaled_linear", "cosine"] = "linear"
    """How the noise grows with t."""
    num_steps: int = 1000
    """T, the number of noise levels."""
    beta_start: float = 1e-4
    """First per-step variance (linear, scaled_linear)."""
    beta_end: float = 0.02
    """Last per-step variance (linear, scaled_linear)."""

    def make(self) -> Schedule:
        """The schedule."""
        match self.name:
            case "linear":
                return linear_schedule(self.num_steps, self.beta_start, self.beta_end)
            case "scaled_linear":
                return scaled_linear_schedule(self.num_steps, self.beta_start, self.beta_end)
            case "cosine":
                return cosine_schedule(self.num_steps)
            case _:
                raise ValueError(f"schedule.name is unknown; got {self.name!r}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run; every field is a command-line option."""

    workdir: str = tyro.MISSING
    """Where checkpoints, samples, logs and config.json go. A run found there is resumed."""
    data: str = "cifar10"
    """digits, a TFDS name, a folder of images, or a .npz file of uint8 images."""
    data_dir: str | None = None
    """Where TFDS sets stand; its own default if not given."""
    split: str = "train"
    """Which part of the data to train on; TFDS slices such as train[:1000] work."""
    image_size: int | None = None
    """Resize and crop images to this side; without it all must have one size."""
    num_workers: int = 0
    """Processes that decode images of sets too large for memory; 0 uses threads."""

    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    spacing: Spacing = "uniform"
    """Sub-sequence that sampling from this model uses unless told otherwise."""

    max_steps: int = 800_000
    """Updates in all."""
    batch_size: int = 128
    """Global batch; must be divisible by the number of devices."""
    num_microbatches: int = 1
    """Take each device's batch in this many parts, to save memory."""
    learning_rate: float = 2e-4
    """Adam's rate."""
    warmup_steps: int = 5000
    """Updates over which the rate rises from 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights; warmed up over the first updates."""
    loss: Norm = "l2"
    """Squared or absolute error of the predicted noise."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over an image's pixels; the paper's torch code sums."""
    timesteps: Literal["independent", "antithetic"] = "independent"
    """How a batch's time indices are drawn; the paper's torch code pairs t with T - 1 - t."""
    flip: bool = True
    """Mirror images left to right at random."""
    label_dropout: float = 0.1
    """Share of examples shown without their label, which guidance needs; with model.num_classes."""

    seed: int = 0
    """Of the initial weights, the order of the data and all noise."""
    max_seconds: float | None = None
    """Stop cleanly, with a checkpoint, after this long; the next call goes on from there."""
    log_every: int = 100
    """Updates between two lines of metrics.jsonl."""
    sample_every: int = 10_000
    """Updates between two grids of samples; 0 for none."""
    checkpoint_every: int = 5_000
    """Updates between two checkpoints."""
    keep_checkpoints: int = 3
    """How many checkpoints to keep."""
    distributed: bool = False
    """Train with the same command on other hosts; SLURM and Cloud TPU need no other option."""
    coordinator: str | None = None
    """host:port of process 0, where the cluster does not say."""
    num_processes: int | None = None
    """How many processes there are, one for each host."""
    process_id: int | None = None
    """Which of them this is, from 0."""


CIFAR10 = TrainConfig(data="cifar10", spacing="quadratic", max_steps=790_000)

CELEBA = TrainConfig(
    data="celeb_a",
    model=ModelConfig(channel_mults=(1, 2, 2, 2, 4)),
    max_steps=500_000,
)

BEDROOM = TrainConfig(
    data="lsun/bedroom",
    model=ModelConfig(channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0),
    max_steps=2_388_000,
    batch_size=64,
    learning_rate=2e-5,
    clip_norm=None,
    ema_decay=0.999,
)

DIGITS = TrainConfig(
    data="digits",
    model=ModelConfig(
        channels=32,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        dropout=0.0,
        norm_groups=8,
    ),
    max_steps=3000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=200,
    ema_decay=0.999,
    flip=False,
    log_every=50,
    sample_every=1000,
    checkpoint_every=1000,
)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "digits": ("8x8 handwritten digits bundled with scikit-learn: minutes on a laptop", DIGITS),
    "cifar10": ("the paper's CIFAR-10 network with DDPM's recipe", CIFAR10),
    "cifar10-torch-recipe": (
        "the same network with the recipe of the paper's torch code",
        dataclasses.replace(CIFAR10, reduction="sum", timesteps="antithetic", warmup_steps=0),
    ),
    "cifar10-small": (
        "a quarter of that network, bfloat16: hours on one GPU",
        dataclasses.replace(
            CIFAR10, model=ModelConfig(channels=64, dtype="bfloat16"), max_steps=200_000
        ),
    ),
    "celeba": ("the paper's CelebA network, 64x64", CELEBA),
    "bedroom": ("the paper's LSUN bedroom network, 256x256", BEDROOM),
    "church": (
        "the paper's LSUN church network, 256x256",
        dataclasses.replace(BEDROOM, data="lsun/church_outdoor", max_steps=4_432_000),
    ),
}
