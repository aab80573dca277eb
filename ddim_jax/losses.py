"""The training loss L_gamma for whatever a network predicts, one number for each example.

    L = weight(log SNR_t) |network(x_t, t) - target|^2        Song et al. 2021, eq. 5 with its gamma

The target is the noise, v or the data, as `PARAMETRIZATIONS` says. Weights are functions of the
log SNR, so that they mean the same on every schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddim_jax.checks import (
    check_callable,
    check_count,
    check_floating,
    check_one_of,
    check_real,
    check_schedule,
    look_up,
)
from ddim_jax.denoisers import PARAMETRIZATIONS, NetworkFn
from ddim_jax.keys import as_indices, check_keys, draw_each, draw_noise, image_keys, typed_key
from ddim_jax.predict import checked_answer
from ddim_jax.process import add_noise
from ddim_jax.types import Data, EpsFn, NoiseSchedule, Prediction, PRNGKey, Time

Norm = Literal["l2", "l1"]
Weight: TypeAlias = Callable[[Float[Array, "*index"]], Float[Array, "*index"]]
"""log SNR -> what the loss there is multiplied with."""


def eps_loss(
    key: PRNGKey,
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    x0: Data,
    *,
    t: Time | None = None,
    norm: Norm = "l2",
) -> Float[Array, "*index"]:
    """How far eps_fn is from the noise that was added: one number for each example, float32.

    x0 is (B, ...) in [-1, 1]; or one example, with a scalar `t`. `t` of shape (B,) picks the noise
    levels; without it they are drawn uniformly and independently. `key` is one key, or (B,) of
    them, and then example i depends on key i alone. "l2" is the squared error, "l1" the absolute
    one, each a mean over the data's axes; for the paper's code, which sums, multiply by x0[0].size.
    Differentiable in whatever eps_fn closes over.
    Source: eq. 5 with gamma = 1; Ho et al. 2020, algorithm 1.
    """
    return prediction_loss(key, eps_fn, schedule, x0, t=t, norm=norm)


def prediction_loss(
    key: PRNGKey,
    network_fn: NetworkFn,
    schedule: NoiseSchedule,
    x0: Data,
    *,
    predicts: str = "eps",
    t: Time | None = None,
    norm: Norm = "l2",
    weight: Weight | None = None,
) -> Float[Array, "*index"]:
    """`eps_loss` for a network that predicts "eps", "v" or "x0", or any other of PARAMETRIZATIONS.

    The network's own answer is compared with the right one. `weight`, such as `min_snr`, multiplies
    the loss of each example by a function of its log SNR; None is 1.
    """
    check_one_of("norm", norm, get_args(Norm))
    parametrization = look_up("predicts", predicts, PARAMETRIZATIONS)
    check_callable("network_fn", network_fn)
    check_schedule(schedule)
    check_floating("x0", x0)
    if x0.ndim == 0:
        raise ValueError("x0 must have a leading axis of examples; got a scalar.")
    key = typed_key(key)
    check_keys(key, x0)
    t_key, eps_key = _split(key)
    if t is None:
        t = draw_times(t_key, x0.shape[0], schedule)
    t = jnp.asarray(t)
    eps = draw_noise(eps_key, x0)
    x_t = add_noise(schedule, x0, eps.astype(x0.dtype), t)
    target = parametrization.target(x0, eps, schedule.alpha_bar(t))
    answer = checked_answer(network_fn, x_t, t)
    if isinstance(answer, Prediction) and predicts == "eps":
        answer = answer.eps
    if isinstance(answer, Prediction):
        raise ValueError(
            "network_fn must return what the network says, one array; got a Prediction, as from_v "
            "makes. Pass the network itself, and predicts."
        )
    error = target - answer
    distance = jnp.square(error) if norm == "l2" else jnp.abs(error)
    loss = distance.mean(axis=tuple(range(t.ndim, x0.ndim)))
    return loss if weight is None else weight(schedule.log_snr(t)) * loss


def min_snr(predicts: str = "eps", gamma: float = 5.0) -> Weight:
    """The weight min(SNR, gamma) of x0's squared error, for the loss of another prediction.

    For eps it is min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1). Raises ValueError for
    gamma <= 0, and for a prediction whose error is no multiple of x0's.
    Source: Hang et al. 2023 (arXiv:2303.09556), section 3.4.
    """
    check_real("gamma", gamma)
    if np.ndim(gamma) != 0 or not gamma > 0:
        raise ValueError(f"gamma must be above 0; got {gamma}.")
    check_one_of("predicts", predicts, ("eps", "v", "x0"))

    def weight(log_snr: Float[Array, "*index"]) -> Float[Array, "*index"]:
        snr = jnp.exp(log_snr)
        match predicts:
            case "eps":  # min(1, gamma / SNR), also where SNR is 0
                return jnp.exp(jnp.minimum(0.0, jnp.log(gamma) - log_snr))
            case "v":
                return jnp.minimum(snr, gamma) / (snr + 1)
            case _:
                return jnp.minimum(snr, gamma)

    return weight


def antithetic_timesteps(
    key: PRNGKey, indices: Int[Array, "B"], batch_size: int, schedule: NoiseSchedule
) -> jax.Array:
    """Times of a batch's examples `indices`, (B,), drawn in pairs t and `schedule.mirror(t)`.

    The batch's first batch_size // 2 + 1 times are drawn, the rest mirror them in order, so an
    example's time depends on (key, its place, batch_size) and not on how the batch is sharded.
    Source: the paper's code, which calls it antithetic sampling.
    """
    check_count("batch_size", batch_size)
    check_schedule(schedule)
    indices = as_indices(indices)
    num_drawn = batch_size // 2 + 1
    mirrored = indices >= num_drawn
    keys = image_keys(key, jnp.where(mirrored, indices - num_drawn, indices))
    t = draw_times(keys, indices.shape[0], schedule)
    return jnp.where(mirrored, schedule.mirror(t), t)


def draw_times(key: PRNGKey, batch_size: int, schedule: NoiseSchedule) -> jax.Array:
    """Times (B,) for training, independent and uniform, from one key or from (B,) of them."""
    if key.ndim == 0:
        return schedule.draw(key, (batch_size,))
    return draw_each(schedule.draw, key)


def _split(key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    if key.ndim == 0:
        first, second = jax.random.split(key)
        return first, second
    keys = draw_each(jax.random.split, key)
    return keys[:, 0], keys[:, 1]
