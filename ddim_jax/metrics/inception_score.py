"""Inception score: how sure a classifier is of each image, and how varied its answers are."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from ddim_jax.checks import check_count
from ddim_jax.metrics.kept import NUM_KEPT, KeptFeatures, describe_kept, metric_over_kept
from ddim_jax.metrics.metric import Metric, Number, check_features

NUM_SPLITS, PUBLISHED_IMAGES = 10, 50_000
"""The protocol of published scores."""


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(
    logits: Float[Array, "N K"] | Float[np.ndarray, "N K"], num_splits: int = NUM_SPLITS
) -> InceptionScore:
    """exp of the mean KL divergence from p(class | image) to p(class); in [1, K].

    Split i holds images i N // num_splits to (i + 1) N // num_splits. Published scores were made
    without the bias of the last layer: pass `logits - params["fc"]["bias"]` to compare with them.
    Source: Salimans et al. 2016 (arXiv:1606.03498), section 4.
    """
    check_features("logits", logits)
    check_count("num_splits", num_splits)
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


def inception_score_metric(num_kept: int = NUM_KEPT) -> Metric:
    """The score of the logits that are kept, in 10 splits; in N splits of N < 10 images.

    It needs no reference. Inception's logits come without the last bias, as published scores do.
    """
    numbers = (
        Number("inception_score", "Inception score", "higher", "linear"),
        Number(
            "inception_score_std",
            "Inception score, deviation of a split",
            "lower",
            "linear",
            std_of="inception_score",
        ),
    )
    return metric_over_kept(
        "inception_score",
        "logits",
        numbers,
        num_kept,
        compute=_compute,
        describe=_describe,
        warning=_warning,
        needs_reference=False,
    )


def _compute(state: KeptFeatures, reference: None) -> dict[str, float]:
    del reference
    mean, std = inception_score(state.features, _num_splits(state))
    return {"inception_score": mean, "inception_score_std": std}


def _describe(state: KeptFeatures, reference: None) -> str:
    del reference
    return f"{describe_kept(state)} in {_num_splits(state)} splits"


def _num_splits(state: KeptFeatures) -> int:
    return min(NUM_SPLITS, len(state.features))


def _warning(state: KeptFeatures, reference: None) -> str | None:
    del reference
    if (count := len(state.features)) >= PUBLISHED_IMAGES:
        return None
    return (
        f"N = {count} images, fewer than the {PUBLISHED_IMAGES} of published scores: the score is "
        "biased downwards; compare only with equal N."
    )
