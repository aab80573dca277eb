"""What a run minimises: settings, and the loss they make.

An `Objective` is a frozen dataclass; its fields are the options of the command line that it is
chosen on, and named nowhere else. The loss sees everything a step has: the parameters it is
differentiated in, and beside them `LossInputs`. The pieces that losses share are plain functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from ddim_jax.checks import check_one_of
from ddim_jax.codec import PIXELS, Codec
from ddim_jax.keys import image_keys
from ddim_jax.losses import Norm, Weight, antithetic_timesteps, draw_times, min_snr, prediction_loss
from ddim_jax.types import Data, NoiseSchedule, PRNGKey

Params: TypeAlias = Any
Batch: TypeAlias = Mapping[str, Array]


class Frozen(NamedTuple):
    """Arrays a loss reads and no step changes: arguments of the program, never donated."""

    codec: Any = ()
    """The codec's weights."""
    objective: Any = ()
    """What `Objective.frozen` gave, such as a teacher."""


class LossInputs(NamedTuple):
    """What a loss may look at beside the parameters."""

    ema_params: Params
    """The parameters' moving average."""
    frozen: Frozen
    state: Any
    """The loss's own, from the step before; a pytree of arrays, () for most."""
    key: PRNGKey
    """This step's; example i draws from image_keys(key, places)[i], whatever the sharding."""
    places: Int[Array, "B"]
    """Where in the global batch the examples stand."""
    batch: Batch
    """image: uint8 (B, H, W, C); label: (B,), where the network has classes."""


LossFn: TypeAlias = Callable[[Params, LossInputs], tuple[Float[Array, "B"], Any]]
"""(params, inputs) -> one loss for each example, and the loss's next state.

A state moves once an update. Of its real numbers the mean over devices and microbatches is kept, so
those may depend on the examples; whole numbers, such as a count, must not.
"""


class Setup(NamedTuple):
    """The run an objective makes a loss for."""

    apply_fn: Callable[..., Any]
    """A Flax model's: apply_fn({"params": params}, x, t[, label], train=True, rngs=...)."""
    schedule: NoiseSchedule
    batch_size: int
    """The global one."""
    predicts: str = "eps"
    """What the network predicts, a name of PARAMETRIZATIONS."""
    num_classes: int | None = None
    """With classes, the label num_classes means "no class"; see `Objective.trains_no_class`."""
    codec: Codec = PIXELS


@dataclasses.dataclass(frozen=True)
class Objective:
    """The protocol. Another objective is one subclass, one entry of OBJECTIVES, and a preset."""

    def check(self, predicts: str) -> None:
        """Raise ValueError for settings that no run could use; called before anything is made."""

    def trains_no_class(self) -> bool:
        """Whether the loss also shows examples of "no class", the label num_classes. Guidance
        starts from there, and is refused for a run whose objective answers False.

        Unless an objective says otherwise: whether it has a `label_dropout`, and that above 0.
        """
        return getattr(self, "label_dropout", 0) > 0

    def frozen(self) -> Any:
        """Arrays the loss reads and never changes, such as a teacher's weights; read when a run
        starts or resumes, and part of its fingerprint."""
        return ()

    def init_state(self, setup: Setup) -> Any:
        """The loss's own state before the first step."""
        del setup
        return ()

    def loss_fn(self, setup: Setup) -> LossFn:
        """The loss of this run."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """L_gamma, eq. 5: the network's prediction against the right one, at a random time.

    reduction "mean" with independent times is DDPM's recipe; "sum" over the pixels with antithetic
    ones is the recipe of the paper's torch code.
    """

    loss: Norm = "l2"
    """Squared or absolute error of what the network predicts."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over an image's pixels; the paper's torch code sums."""
    timesteps: Literal["independent", "antithetic"] = "independent"
    """How a batch's time indices are drawn; the paper's torch code pairs t with T - 1 - t."""
    weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight over the noise levels: 1, or min(SNR, 5) of the data's squared error."""
    flip: bool = True
    """Mirror images left to right at random."""
    label_dropout: float = 0.1
    """Share of examples shown without their label, which guidance needs; with model.num_classes."""

    def check(self, predicts: str) -> None:
        """Raise ValueError for a label dropout outside [0, 1), and for an unknown name."""
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1); got {self.label_dropout}.")
        check_one_of("loss", self.loss, get_args(Norm))
        check_one_of("reduction", self.reduction, ("mean", "sum"))
        check_one_of("timesteps", self.timesteps, ("independent", "antithetic"))
        self._weight(predicts)

    def _weight(self, predicts: str) -> Weight | None:
        check_one_of("weighting", self.weighting, ("uniform", "min_snr"))
        return None if self.weighting == "uniform" else min_snr(predicts)

    def loss_fn(self, setup: Setup) -> LossFn:
        """One example at a time under vmap, so that its dropout too depends on its own key."""
        weight = self._weight(setup.predicts)

        def example_loss(params, key, t, x0, label):
            _, loss_key, dropout_key = jax.random.split(key, 3)

            def network(x, t):
                labels = () if label is None else (label,)
                rngs = {"dropout": dropout_key}
                return setup.apply_fn({"params": params}, x, t, *labels, train=True, rngs=rngs)

            loss = prediction_loss(
                loss_key,
                network,
                setup.schedule,
                x0,
                predicts=setup.predicts,
                t=t,
                norm=self.loss,
                weight=weight,
            )
            return loss * x0.size if self.reduction == "sum" else loss

        def loss_fn(params, inputs):
            check_threefry(inputs.key)
            t_key, key = jax.random.split(inputs.key)
            t = self._draw_times(t_key, inputs.places, setup)
            keys = image_keys(key, inputs.places)
            label = None
            if setup.num_classes is not None:
                label = inputs.batch["label"]
                if self.label_dropout:
                    label = drop_labels(keys, label, setup.num_classes, self.label_dropout)
            x0 = self._x0(keys, inputs, setup.codec)
            losses = jax.vmap(example_loss, in_axes=(None, 0, 0, 0, 0))(params, keys, t, x0, label)
            return losses, inputs.state

        return loss_fn

    def _x0(self, keys: Key[Array, "B"], inputs: LossInputs, codec: Codec) -> Data:
        images = inputs.batch["image"]
        # A flip of pixels is the same before and after the codec; after it, runs keep their bits.
        if self.flip and not codec.is_identity:
            images = flip_at_random(keys, images)
        x0 = codec.encode(inputs.frozen.codec, images, keys)
        return flip_at_random(keys, x0) if self.flip and codec.is_identity else x0

    def _draw_times(self, key: PRNGKey, places: Int[Array, "B"], setup: Setup) -> Array:
        if self.timesteps == "antithetic":
            return antithetic_timesteps(key, places, setup.batch_size, setup.schedule)
        return draw_times(image_keys(key, places), places.shape[0], setup.schedule)


def flip_at_random(
    keys: Key[Array, "B"], images: Shaped[Array, "B H W C"]
) -> Shaped[Array, "B H W C"]:
    """Each image mirrored left to right, or not, by the toss of its own key."""

    def flip(key, image):
        flip_key, _, _ = jax.random.split(key, 3)
        return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)

    return jax.vmap(flip)(keys, images)


def drop_labels(
    keys: Key[Array, "B"], labels: Int[Array, "B"], num_classes: int, rate: float
) -> Int[Array, "B"]:
    """The labels, a share `rate` of them replaced by num_classes, "no class".

    So that one network learns both halves of classifier-free guidance.
    Source: Ho & Salimans 2022 (arXiv:2207.12598), algorithm 1.
    """

    def drop(key, label):
        dropped = jax.random.bernoulli(jax.random.fold_in(key, 3), jnp.float32(rate))
        return jnp.where(dropped, num_classes, label)

    return jax.vmap(drop)(keys, labels)


def check_threefry(key: PRNGKey) -> None:
    """Raise ValueError for a key of a generator that cannot be mapped over examples."""
    if jax.random.key_impl(key) != "threefry2x32":
        raise ValueError(
            "key must be of the threefry2x32 generator: under vmap the hardware generators "
            f"give every example the same noise; got {jax.random.key_impl(key)}. "
            'Make it with jax.random.key(seed, impl="threefry2x32").'
        )


DENOISING = Denoising()

OBJECTIVES: dict[str, type[Objective]] = {"denoising": Denoising}
"""The objectives a run may name."""
