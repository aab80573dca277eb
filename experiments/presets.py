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


CIFAR10 = TrainOptions(data="cifar10", spacing="quadratic", max_steps=790_000, ema_warmup=False)
"""DDPM's run_cifar.py: network, dropout 0.1, flip, batch 128, rate 2e-4 after 5000 updates of
warm-up, gradients clipped at 1, EMA 0.9999; 790k updates are what its paper reports. The
sub-sequence is DDIM's for its Table 1."""

CELEBA = TrainOptions(
    data="celeb_a",
    model=ModelConfig(channel_mults=(1, 2, 2, 2, 4)),
    max_steps=500_000,
    ema_warmup=False,
)
"""DDPM's code has no CelebA. Network, dropout, flip, batch 128, rate 2e-4, clipping at 1 and EMA
0.9999 are of DDIM's torch code; the rate's warm-up, the mean loss and independent times are DDPM's.
The length is ours: none is published."""

BEDROOM = TrainOptions(
    data="lsun/bedroom",
    model=ModelConfig(channel_mults=(1, 1, 2, 2, 4, 4), dropout=0.0),
    max_steps=2_388_000,
    batch_size=64,
    learning_rate=2e-5,
    clip_norm=None,
    ema_decay=0.999,
    ema_warmup=False,
)
"""Network, no dropout, flip, batch 64, rate 2e-5 and its warm-up are of DDPM's run_lsun.py; no
clipping and EMA 0.999 are of DDIM's torch code, where DDPM's has 1 and 0.9999. 2388k updates are
the length of the weights DDPM published; church's is 4432k."""

DIGITS = TrainOptions(
    data="digits",
    model=ModelConfig(
        channels=16,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        dropout=0.0,
        norm_groups=8,
    ),
    max_steps=5000,
    batch_size=32,
    learning_rate=2e-3,
    warmup_steps=100,
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
    "celeba": ("the paper's CelebA network, 64x64, with DDPM's loss and warm-up", CELEBA),
    "bedroom": (
        "the paper's LSUN bedroom network, 256x256, with DDPM's loss and warm-up",
        BEDROOM,
    ),
    "church": (
        "the paper's LSUN church network, 256x256, likewise",
        dataclasses.replace(BEDROOM, data="lsun/church_outdoor", max_steps=4_432_000),
    ),
}
