"""The named training runs."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from ddim_jax.objectives import DENOISING, Denoising, Objective
from ddim_jax.paths import Folder
from ddim_jax.runs import ModelConfig, ScheduleConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class TrainOptions(TrainConfig):
    """One training run; every field is a command-line option."""

    workdir: Folder = dataclasses.field(
        default=tyro.MISSING, metadata=TrainConfig.__dataclass_fields__["workdir"].metadata
    )
    """Where checkpoints, samples, logs and config.json go. A run found there is resumed."""
    objective: Annotated[Objective, tyro.conf.OmitArgPrefixes] = DENOISING
    """What is minimised. Its options stand beside the others."""


CIFAR10 = TrainOptions(data="cifar10", spacing="quadratic", max_steps=790_000)

CELEBA = TrainOptions(
    data="celeb_a",
    model=ModelConfig(channel_mults=(1, 2, 2, 2, 4)),
    max_steps=500_000,
)

BEDROOM = TrainOptions(
    data="lsun/bedroom",
    model=ModelConfig(channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0),
    max_steps=2_388_000,
    batch_size=64,
    learning_rate=2e-5,
    clip_norm=None,
    ema_decay=0.999,
)

DIGITS = TrainOptions(
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
    objective=Denoising(flip=False),
    log_every=50,
    sample_every=1000,
    checkpoint_every=1000,
)

PRESETS: dict[str, tuple[str, TrainOptions]] = {
    "digits": ("8x8 handwritten digits bundled with scikit-learn: minutes on a laptop", DIGITS),
    "digits-v": (
        "the same, predicting v on a schedule that ends in pure noise",
        dataclasses.replace(
            DIGITS,
            predicts="v",
            schedule=ScheduleConfig(zero_terminal_snr=True),
            spacing="trailing",
        ),
    ),
    "cifar10": ("the paper's CIFAR-10 network with DDPM's recipe", CIFAR10),
    "cifar10-torch-recipe": (
        "the same network with the recipe of the paper's torch code",
        dataclasses.replace(
            CIFAR10,
            objective=Denoising(reduction="sum", timesteps="antithetic"),
            warmup_steps=0,
        ),
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
