"""What a run is, without its weights: the network, its schedule, what it predicts, its codec.

The settings are frozen dataclasses of plain values, so that they can be written to a file, compared
and given on a command line; what they make is made when asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddim_jax.checks import check_types, look_up
from ddim_jax.codec import CODECS, PIXELS, Codec, Images
from ddim_jax.denoisers import PARAMETRIZATIONS, clip_x0, guided
from ddim_jax.numerics import Precision, check_precision, matmul_precision
from ddim_jax.objectives import OBJECTIVES
from ddim_jax.schedule import (
    Spacing,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    zero_terminal_snr,
)
from ddim_jax.types import Data, Denoiser, NoiseSchedule
from ddim_jax.unet import UNet, parameter_shapes

Shape: TypeAlias = tuple[int, ...]

ROUNDING = "nearest"
"""How samples become uint8 (`ddim_jax.data.pixels.to_uint8`). Written beside every number: a
Frechet distance differs with it."""


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
    no_class_row: bool = True
    """With num_classes, learn one row more, for "no class"; guidance needs it."""

    def make(self, image_channels: int) -> UNet:
        """The network for images of that many channels."""
        return UNet(image_channels=image_channels, **dataclasses.asdict(self))


CIFAR10_MODEL = ModelConfig()


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule; the defaults are every published network's."""

    name: str = "linear"
    """How the noise grows with t: linear, scaled_linear or cosine."""
    num_steps: int = 1000
    """T, the number of noise levels."""
    beta_start: float = 1e-4
    """First per-step variance (linear, scaled_linear)."""
    beta_end: float = 0.02
    """Last per-step variance (linear, scaled_linear)."""
    zero_terminal_snr: bool = False
    """Shift the levels so that the last is pure noise; not for a network that predicts eps."""

    def make(self) -> NoiseSchedule:
        """The schedule."""
        return look_up("schedule.name", self.name, SCHEDULES)(self)


LINEAR = ScheduleConfig()


def _discrete(make: Callable[[ScheduleConfig], Any]) -> Callable[[ScheduleConfig], NoiseSchedule]:
    def schedule(config: ScheduleConfig) -> NoiseSchedule:
        made = make(config)
        return zero_terminal_snr(made) if config.zero_terminal_snr else made

    return schedule


SCHEDULES: dict[str, Callable[[ScheduleConfig], NoiseSchedule]] = {
    "linear": _discrete(lambda c: linear_schedule(c.num_steps, c.beta_start, c.beta_end)),
    "scaled_linear": _discrete(
        lambda c: scaled_linear_schedule(c.num_steps, c.beta_start, c.beta_end)
    ),
    "cosine": _discrete(lambda c: cosine_schedule(c.num_steps)),
}
"""The schedules a run may name. One of another kind is its class and an entry here."""


class RunParams(NamedTuple):
    """All weights that a program of a run takes."""

    network: Any
    """The network's, as Flax's "params"."""
    codec: Any
    """The codec's; without leaves for pixels."""


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A run without weights. Everything here decides what its images are."""

    model_config: ModelConfig
    schedule_config: ScheduleConfig
    image_shape: tuple[int, int, int]
    """(H, W, C) of the images, which need not be x_T's: that is `latent_shape`."""
    spacing: Spacing = "uniform"
    """Sub-sequence that sampling takes unless told otherwise."""
    predicts: str = "eps"
    """What the network predicts, a name of PARAMETRIZATIONS."""
    codec: Codec = PIXELS
    """What stands between images and x0."""
    unconditional: bool = True
    """Whether a network with classes was taught "no class" too, which guidance starts from."""
    precision: Precision | None = None
    """How products of float32 matrices are computed; as `jax.default_matmul_precision` says if
    None."""
    clip_x0: bool = False
    """Clip every data prediction to [-1, 1], as Ho et al. 2020 do and the paper does not."""

    def __post_init__(self) -> None:
        """Refuses what is no run."""
        check_precision(self.precision)
        if self.clip_x0 and not self.codec.is_identity:
            raise ValueError(
                "clip_x0 must be left out for a model of latents, whose x0 need not lie in [-1, 1];"
                f" got one with the codec {type(self.codec).__name__}."
            )
        look_up("predicts", self.predicts, PARAMETRIZATIONS)
        if self.schedule_config.zero_terminal_snr and self.predicts == "eps":
            raise ValueError(
                "predicts must not be eps with schedule.zero_terminal_snr: where alpha_bar is 0 "
                "eps says nothing of the image; got eps. Take v or x0."
            )

    @functools.cached_property
    def latent_shape(self) -> Shape:
        """The shape of x0 and x_T, without a batch."""
        return self.codec.latent_shape(self.image_shape)

    @functools.cached_property
    def model(self) -> UNet:
        """The network."""
        return self.model_config.make(self.latent_shape[-1])

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return self.schedule_config.make()

    @property
    def num_classes(self) -> int | None:
        """Classes that the network was trained with, or None."""
        return self.model_config.num_classes

    def parameter_shapes(self) -> Any:
        """Shapes and dtypes of the network's parameters, without computing any."""
        return parameter_shapes(self.model, self.latent_shape)

    def denoiser(
        self, params: RunParams, label: jax.Array | None = None, guidance_scale: float = 1.0
    ) -> Denoiser:
        """The network as what samplers take; `params` is an argument, so that jit need not bake it
        into its program.

        A network that was trained without labels does not see `label`.
        A guidance scale other than 1 takes two network evaluations where others take one; without
        labels, or for a network that was not taught "no class", it is a ValueError.
        """
        if guidance_scale != 1 and (label is None or self.num_classes is None):
            raise ValueError(
                f"guidance_scale must be 1 without a label; got {guidance_scale:g}. Guidance goes "
                "from no class to one."
            )
        self.check_guidance(guidance_scale)
        denoiser = self._unclipped(params, label, guidance_scale)
        # Last, as the codes that clip do: of a guided network what is cut is the mixture.
        return clip_x0(denoiser, self.schedule) if self.clip_x0 else denoiser

    def _unclipped(
        self, params: RunParams, label: jax.Array | None, guidance_scale: float
    ) -> Denoiser:
        wrap = PARAMETRIZATIONS[self.predicts].denoiser

        def given(*label: jax.Array) -> Denoiser:
            def network(x: jax.Array, t: jax.Array) -> jax.Array:
                with matmul_precision(self.precision):
                    return cast(
                        jax.Array, self.model.apply({"params": params.network}, x, t, *label)
                    )

            return wrap(network, self.schedule)

        if label is None or self.num_classes is None:
            return given()
        if guidance_scale == 1:
            return given(label)
        no_class = jnp.full_like(label, self.num_classes)
        return guided(given(label), given(no_class), guidance_scale)

    def timesteps(self, num_sample_steps: int, spacing: str | None = None) -> np.ndarray:
        """A sub-sequence of so many times; the run's own spacing if none is given."""
        return self.schedule.timesteps(num_sample_steps, spacing or self.spacing)

    def encode(self, params: RunParams, images: Images) -> Data:
        """x0 (B, *latent_shape) of uint8 images."""
        with matmul_precision(self.precision):
            return self.codec.encode(params.codec, images)

    def decode(self, params: RunParams, x0: Data) -> Float[Array, "B H W C"]:
        """Images in [-1, 1] of x0 (B, *latent_shape)."""
        with matmul_precision(self.precision):
            return self.codec.decode(params.codec, x0)

    def check_label(self, label: int) -> None:
        """Raise ValueError unless the network has this class; one without labels has only 0."""
        classes = self.num_classes or 1
        if isinstance(label, bool) or label not in range(classes):
            raise ValueError(
                f"label must be in [0, {classes - 1}], the classes of this network; got {label}."
            )

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise ValueError for a scale other than 1 of a network that does not know "no class"."""
        if guidance_scale == 1 or (self.model_config.no_class_row and self.unconditional):
            return
        reason = (
            "whose label 'no class' is not known to be trained: it was trained with a label "
            "dropout of 0, or converted before that was written down"
            if self.model_config.no_class_row
            else "without a row for 'no class'"
        )
        raise ValueError(
            f"guidance_scale must be 1 for a network {reason}; got {guidance_scale:g}. Guidance "
            "goes from no class to one: train with a label dropout above 0, or, where the last "
            "class of published weights means none, convert them again and say so."
        )

    def describe(self) -> dict[str, Any]:
        """The run as JSON holds it; `spec_from` reads it."""
        model = dataclasses.asdict(self.model_config)
        if self.model_config.no_class_row:
            del model["no_class_row"]  # so that the fingerprints of older files stay
        knows = {} if self.num_classes is None else {"unconditional": self.unconditional}
        return {
            "model": model,
            "schedule": dataclasses.asdict(self.schedule_config),
            "predicts": self.predicts,
            "codec": described(self.codec, CODECS),
            "spacing": self.spacing,
            "image_shape": list(self.image_shape),
            "rounding": ROUNDING,
            **knows,
            # Only where they are set, so that the fingerprints of older files stay.
            **({"precision": self.precision} if self.precision else {}),
            **({"clip_x0": True} if self.clip_x0 else {}),
        }


_KINDS = {
    **dict.fromkeys(("model", "schedule", "codec", "objective"), dict),
    **dict.fromkeys(("spacing", "predicts", "rounding", "codec.name", "objective.name"), str),
    "image_shape": tuple[int, int, int],
    "unconditional": bool,
    "precision": str | None,
    "objective.label_dropout": float,
}


def spec_from(config: Mapping[str, Any]) -> RunSpec:
    """The run that a description holds; settings it lacks have the defaults of older files.

    Raises KeyError, TypeError or ValueError for what describes no run.
    """
    check_types(config, _KINDS)
    for part, settings in (("model", ModelConfig), ("schedule", ScheduleConfig)):
        kinds = get_type_hints(settings).items()
        check_types(config, {f"{part}.{name}": kind for name, kind in kinds})
    if (rounding := config.get("rounding", ROUNDING)) != ROUNDING:
        raise ValueError(f"rounding must be {ROUNDING}, the only one there is; got {rounding!r}.")
    return RunSpec(
        model_config=ModelConfig(**with_tuples(config["model"])),
        schedule_config=ScheduleConfig(**config["schedule"]),
        image_shape=_three(config["image_shape"]),
        spacing=config["spacing"],
        predicts=config.get("predicts", "eps"),
        codec=restored("codec", config.get("codec", {"name": "pixels"}), CODECS),
        unconditional=config.get("unconditional", _was_unconditional(config)),
        precision=config.get("precision"),
    )


def _was_unconditional(config: Mapping[str, Any]) -> bool:
    """Whether a run of a file that does not say so was taught "no class"."""
    if "objective" in config:
        kind = OBJECTIVES.get(config["objective"].get("name"))
        return config["objective"].get("label_dropout", getattr(kind, "label_dropout", 0)) > 0
    # The last class of converted weights was taken for "no class", whatever it was.
    return "converted_from" not in config


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    height, width, channels = shape
    return height, width, channels


def described(settings: Any, table: Mapping[str, type]) -> dict[str, Any]:
    """A dataclass as JSON holds it: its name in the table, and its fields."""
    names = [name for name, kind in table.items() if kind is type(settings)]
    if not names:
        raise ValueError(
            f"{type(settings).__name__} must stand in the table of its kind, which has "
            f"{', '.join(table)}: table[name] = {type(settings).__name__}."
        )
    return {"name": names[0], **dataclasses.asdict(settings)}


def restored(what: str, description: Mapping[str, Any], table: Mapping[str, type]) -> Any:
    """What `described` wrote."""
    fields = with_tuples(description)
    kind = look_up(f"{what}.name", fields.pop("name"), table)
    check_types(fields, get_type_hints(kind))
    return kind(**fields)


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with JSON's lists as tuples again."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
