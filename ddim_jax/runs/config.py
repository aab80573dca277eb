"""The settings of a training run."""

from __future__ import annotations

import dataclasses
from typing import Any

from ddim_jax.checks import NUM_SEEDS
from ddim_jax.codec import CODECS, PIXELS, Codec
from ddim_jax.data.load import CropName
from ddim_jax.numerics import Precision, check_precision
from ddim_jax.objectives import DENOISING, OBJECTIVES, Objective
from ddim_jax.paths import DataName, File, Folder
from ddim_jax.runs.options import MAX_BATCH, MAX_SIDE, check_limits, option
from ddim_jax.runs.spec import (
    CIFAR10_MODEL,
    LINEAR,
    ModelConfig,
    RunSpec,
    ScheduleConfig,
    described,
)
from ddim_jax.schedule import Spacing


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run; every field is a command-line option."""

    workdir: Folder = option("", may_change=True)
    """Where checkpoints, samples, logs and config.json go. A run found there is resumed."""
    data: DataName = "cifar10"
    """digits, a TFDS name, a folder of images, or a .npz or .npy file of uint8 images. A resumed
    run may spell it otherwise: its images must be the same."""
    data_dir: Folder | None = option(None, may_change=True)
    """Where TFDS sets stand; its own default if not given."""
    split: str = "train"
    """Which part of the data to train on; TFDS slices such as train[:1000] work."""
    image_size: int | None = option(None, at_least=1, below=MAX_SIDE)
    """Resize and crop images to this side; without it all must have one size."""
    crop: CropName | None = None
    """celeba cuts the paper's 128x128 out of aligned CelebA images, 178x218, and makes it 64x64
    unless image_size is given; TFDS's celeb_a always has it."""
    num_workers: int = option(0, at_least=0, may_change=True)
    """Processes that decode images of sets too large for memory; 0 uses threads."""

    model: ModelConfig = CIFAR10_MODEL
    schedule: ScheduleConfig = LINEAR
    predicts: str = "eps"
    """What the network predicts: eps, v or x0."""
    codec: Codec = PIXELS
    precision: Precision | None = None
    """How products of float32 matrices are computed, when sampling too unless told otherwise:
    default is the device's quickest way (TF32, bfloat16), highest is float32; as JAX is set if not
    given."""
    spacing: Spacing = "uniform"
    """Sub-sequence that sampling from this model uses unless told otherwise."""
    objective: Objective = DENOISING

    max_steps: int = option(800_000, at_least=1, may_change=True)
    """Updates in all."""
    batch_size: int = option(128, at_least=1, below=MAX_BATCH)
    """Global batch; must be divisible by the number of devices."""
    num_microbatches: int = option(1, at_least=1, may_change=True)
    """Take each device's batch in this many parts, to save memory."""
    remat: bool = option(False, may_change=True)
    """Keep what stands between the network's blocks alone, and compute each again for its gradient:
    less memory, about a third more time, the same update up to rounding."""
    learning_rate: float = option(2e-4, above=0, below=float("inf"))
    """Adam's rate."""
    warmup_steps: int = option(5000, at_least=0)
    """Updates over which the rate rises from 0."""
    clip_norm: float | None = option(1.0, above=0, below=float("inf"))
    """Largest global norm of the gradient."""
    ema_decay: float = option(0.9999, at_least=0, below=1)
    """Decay of the averaged weights: in the mean they are 1 / (1 - ema_decay) updates old, 10,000
    with 0.9999."""
    ema_warmup: bool = True
    """Let the decay rise to that over the first 9 / (1 - ema_decay) updates, as (1 + n) / (10 + n):
    until then the average is n / 10 updates old in the mean. Without it, as in DDPM's code, the
    random first weights count for ema_decay ** n. There is none with init_from."""
    init_from: Folder | None = None
    """Start from the weights of this workdir, trained or converted, instead of random ones; the
    average then goes on from its average, without a warm-up."""

    skip_updates: int = option(0, at_least=0, may_change=True)
    """So many updates whose loss or gradient is not finite are left out, in all, before the run
    stops; each is a line of metrics.jsonl. With 0 the first one stops it."""

    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Of the initial weights, the order of the data and all noise."""
    max_seconds: float | None = option(None, at_least=0, may_change=True)
    """Stop cleanly, with a checkpoint, after this long; the next call goes on from there."""
    log_every: int = option(100, at_least=1, may_change=True)
    """Updates between two lines of metrics.jsonl."""
    sample_every: int = option(10_000, at_least=0, may_change=True)
    """Updates between two grids of samples; 0 for none."""
    fid_every: int = option(0, at_least=0, may_change=True)
    """Updates between two measurements of the averaged weights: the distance of fid_samples samples
    to fid_stats, and the loss on images held out; 0 for none."""
    fid_stats: File | None = option(None, may_change=True)
    """What make_statistics.py wrote of the data; without it the held-out loss alone is measured."""
    fid_samples: int = option(1000, at_least=2, may_change=True)
    """Samples behind each distance, and the most images held out."""
    fid_sample_steps: int = option(50, at_least=1, may_change=True)
    """S of those samples, by DDIM."""
    held_out_split: str | None = option(None, may_change=True)
    """The split for the held-out loss; if not given test or validation, where it is not trained
    on."""
    checkpoint_every: int = option(5_000, at_least=1, may_change=True)
    """Updates between two checkpoints."""
    checkpoint_minutes: float | None = option(None, at_least=0, may_change=True)
    """Minutes between two checkpoints, besides those of checkpoint_every."""
    keep_checkpoints: int = option(3, at_least=1, may_change=True)
    """How many checkpoints to keep, the newest."""
    keep_every: int = option(0, at_least=0, may_change=True)
    """Updates between two checkpoints that are saved and kept for ever; 0 for none."""
    distributed: bool = option(False, may_change=True)
    """Train with the same command on other hosts; SLURM and Cloud TPU need no other option."""
    coordinator: str | None = option(None, may_change=True)
    """host:port of process 0, where the cluster does not say."""
    num_processes: int | None = option(None, may_change=True)
    """How many processes there are, one for each host."""
    process_id: int | None = option(None, may_change=True)
    """Which of them this is, from 0."""

    def check_hosts(self) -> None:
        """Raise ValueError for what only a run on several hosts uses, without `distributed`."""
        for name in ("coordinator", "num_processes", "process_id"):
            value = getattr(self, name)
            if value is not None and not self.distributed:
                raise ValueError(
                    f"{name} must be given with distributed only; got {value}. Without it each "
                    "process would train alone: set distributed too, or leave it out."
                )

    def check(self) -> None:
        """Raise ValueError for settings that no run could use."""
        self.check_hosts()
        if not self.workdir:
            raise ValueError("workdir must name the folder of the run; got ''.")
        check_limits(self)
        check_precision(self.precision)
        self.objective.check(self.predicts)
        model = self.model
        if model.num_classes and not model.no_class_row and self.objective.trains_no_class():
            raise ValueError(
                "model.no_class_row must be true for an objective that shows examples without "
                "their label; got False. Or give a label_dropout of 0."
            )

    def spec(self, image_shape: tuple[int, int, int]) -> RunSpec:
        """The run on images of this shape (H, W, C)."""
        return RunSpec(
            model_config=self.model,
            schedule_config=self.schedule,
            image_shape=image_shape,
            spacing=self.spacing,
            predicts=self.predicts,
            codec=self.codec,
            unconditional=self.objective.trains_no_class(),
            precision=self.precision,
        )

    def describe(self) -> dict[str, Any]:
        """The settings as config.json holds them."""
        return dataclasses.asdict(self) | {
            "objective": described(self.objective, OBJECTIVES),
            "codec": described(self.codec, CODECS),
        }
