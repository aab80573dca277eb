"""Inception score: how sure a classifier is of each image, and how varied its answers are."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(
    logits: Float[Array, "N K"] | Float[np.ndarray, "N K"], num_splits: int = 10
) -> InceptionScore:
    """exp of the mean KL divergence from p(class | image) to p(class); in [1, K].

    Split i holds images i N // num_splits to (i + 1) N // num_splits. Published scores were made
    without the bias of the last layer: pass `logits - params["fc"]["bias"]` to compare with them.
    Source: Salimans et al. 2016 (arXiv:1606.03498), section 4.
    """
    num_samples = logits.shape[0]
    if not 1 <= num_splits <= num_samples:
        raise ValueError(
            f"num_splits must be in [1, {num_samples}], the number of samples; got {num_splits}."
        )
    bounds = np.arange(num_splits + 1) * num_samples // num_splits
    scores = [float(_score(logits[a:b])) for a, b in itertools.pairwise(bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


@jax.jit
def _score(logits: Float[Array, "N K"]) -> Float[Array, ""]:
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    marginal = p.mean(axis=0)
    entropy = -jnp.sum(p * log_p, axis=1).mean()
    entropy_of_marginal = -jnp.sum(xlogy(marginal, marginal))  # 0 log 0 is 0
    return jnp.exp(entropy_of_marginal - entropy)
