"""Shapes and the protocols everything else is built on.

Floor 0: imports nothing of ours. A floor imports only lower floors (tests/test_api.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer, Key, UInt32

Data: TypeAlias = Float[Array, "*shape"]
"""Data, noise or a state: any shape at all, images are (..., H, W, C) in [-1, 1]."""

Level: TypeAlias = Float[Array, "..."] | Float[np.ndarray, "..."] | np.floating | float
"""A noise level alpha_bar in [0, 1]: a scalar, or an array over the data's leading axes."""

Index: TypeAlias = Integer[Array, "*index"] | Integer[np.ndarray, "*index"] | np.integer | int
"""A time index t in [-1, T - 1]; -1 is clean data."""

Time: TypeAlias = Index | Float[Array, "*index"] | Float[np.ndarray, "*index"] | np.floating | float
"""A time as the schedule counts it: an index of `Schedule`, a real number of a continuous one."""

Timesteps: TypeAlias = (
    Sequence[int]
    | Sequence[float]
    | Integer[Array, "S"]
    | Float[Array, "S"]
    | Integer[np.ndarray, "S"]
    | Float[np.ndarray, "S"]
)
"""The times a sampler visits, descending, such as `ddim_timesteps` gives."""

PRNGKey: TypeAlias = Key[Array, "..."] | UInt32[Array, "... 2"]
"""One key, or a leading axis of keys, one for each image. Old-style uint32 keys work too."""


class Prediction(NamedTuple):
    """What a network says of x_t, both ways: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

    One determines the other, but not to the last digit, nor at alpha_bar = 0 or 1: whoever knows
    both hands on both.
    """

    x0: jax.Array
    """The predicted data (eq. 9)."""
    eps: jax.Array
    """The predicted noise."""


@runtime_checkable  # so that the shape checks of the tests can meet it
class EpsFn(Protocol):
    """Predicts the noise in x at time t; a network is one example, a closed form another.

    `x` has any shape, `t` is a scalar when sampling and has shape (B,) when training: an int32
    index, or what else the schedule counts in. Returns an array of x's shape.
    Paper: epsilon_theta^{(t)}(x), section 3.
    """

    def __call__(self, x: jax.Array, t: jax.Array, /) -> jax.Array: ...  # noqa: D102


@runtime_checkable
class Denoiser(Protocol):
    """An `EpsFn`, or the same with a `Prediction` for its answer, as `from_v` and `clip_x0` give.

    Every sampler, and all that takes an `eps_fn`, takes either.
    """

    def __call__(self, x: jax.Array, t: jax.Array, /) -> jax.Array | Prediction: ...  # noqa: D102


@runtime_checkable
class NoiseSchedule(Protocol):
    """How the noise grows with time: all that samplers, losses and runs ask of a schedule.

    `Schedule` is the paper's, over indices. Another kind, such as one over a continuous time, is
    one class with these methods; times are then whatever it counts in, as long as they grow with
    the noise.
    """

    @property
    def num_steps(self) -> int:
        """The most steps a sub-sequence has: T."""
        ...

    @property
    def clean(self) -> int | float:
        """The time of clean data, where alpha_bar is 1; -1 among indices."""
        ...

    def alpha_bar(self, t: Time, /) -> Float[Array, "*index"]:
        """Signal level in [0, 1]; 1 at `clean`, NaN for a time that is none."""
        ...

    def noise_variance(self, t: Time, /) -> Float[Array, "*index"]:
        """1 - alpha_bar(t), without the rounding of that difference."""
        ...

    def log_snr(self, t: Time, /) -> Float[Array, "*index"]:
        """log(alpha_bar / (1 - alpha_bar)); +inf at `clean`."""
        ...

    def is_clean(self, t: Time, /) -> Bool[Array, "*index"]:
        """Whether t is the time of clean data."""
        ...

    def nearest(self, log_snr: Level, /) -> jax.Array:
        """The noisy time whose log SNR is nearest to the one given."""
        ...

    def timesteps(self, num_sample_steps: int, spacing: str = "uniform") -> np.ndarray:
        """Exactly so many times, descending, the noisiest first; `clean` is not among them."""
        ...

    def check_timesteps(self, timesteps: Timesteps) -> jax.Array:
        """The times as an array; ValueError unless they descend through times of this schedule."""
        ...

    def draw(self, key: PRNGKey, /, shape: tuple[int, ...] = ()) -> jax.Array:
        """Times for training, uniform over all noisy ones."""
        ...

    def mirror(self, t: jax.Array, /) -> jax.Array:
        """The time as far from the noisy end as t is from the clean one, for antithetic pairs."""
        ...


def is_traced(value: object) -> bool:
    """Whether JAX is tracing `value`, so that it cannot be checked now."""
    return isinstance(value, Tracer)
