"""Kernel Inception distance: an unbiased distance with an error bar, on the host in float64.

Unlike the Frechet distance its expectation does not depend on the number of samples, so it serves
where samples are few. Float64, because the distance is a small difference of large means.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from ddim_jax.checks import check_count, check_seed
from ddim_jax.metrics.kept import (
    NUM_KEPT,
    KeptFeatures,
    both_sides,
    describe_kept,
    metric_over_kept,
)
from ddim_jax.metrics.metric import Metric, Number, check_features

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
"""The usual protocol."""


class KernelDistance(NamedTuple):
    """Mean over subsets, and the standard deviation of one subset's estimate."""

    mean: float
    std: float


def kid(
    x: Float[Array, "N D"] | Float[np.ndarray, "N D"],
    y: Float[Array, "M E"] | Float[np.ndarray, "M E"],
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> KernelDistance:
    """Squared MMD between two sets of features under the kernel (a.b / D + 1)^3.

    Averaged over random subsets, drawn without replacement; the defaults are the usual protocol.
    May be slightly negative where the sets agree. Raises ValueError when a set is smaller than a
    subset, on features that are not finite, and for a seed outside [0, 2**32).
    Source: Binkowski et al. 2018 (arXiv:1801.01401).
    """
    check_features("x", x)
    check_features("y", y, x.shape[1])
    check_count("subset_size", subset_size, 2)
    check_count("num_subsets", num_subsets)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subset_size must be in [2, {min(len(x), len(y))}], the smaller number of samples; "
            f"got {subset_size}."
        )
    check_seed(seed)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    rng = np.random.default_rng(seed)

    def draw(features):
        return features[rng.choice(len(features), subset_size, replace=False)]

    estimates = [_polynomial_mmd(draw(x), draw(y)) for _ in range(num_subsets)]
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)))


def polynomial_mmd(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M E"]) -> float:
    """Unbiased squared MMD under the kernel (a.b / D + 1)^3, in float64 if x and y are.

    Source: Gretton et al. 2012 (JMLR 13), Lemma 6.
    """
    check_features("x", x)
    check_features("y", y, x.shape[1])
    for name, features in (("x", x), ("y", y)):
        check_count(f"the length of {name}", len(features), 2)
    return float(_polynomial_mmd(x, y))


def _polynomial_mmd(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M E"]) -> float:
    def kernel(a, b):
        gram = a @ b.T / x.shape[1] + 1
        return gram * gram * gram  # numpy's ** 3 takes longer than the product of matrices

    def mean_of_pairs(a):
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()


def kid_metric(num_kept: int = NUM_KEPT) -> Metric:
    """The distance of the pooled features that are kept, by the usual protocol.

    A side of fewer than 1000 images makes subsets of its size; description and warning say so.
    """
    numbers = (
        Number("kid", "KID", "lower", "linear"),  # it may be negative
        Number("kid_std", "KID, deviation of a subset", "lower", "linear", std_of="kid"),
    )
    return metric_over_kept(
        "kid", "pool", numbers, num_kept, compute=_compute, describe=_describe, warning=_warning
    )


def _compute(state: KeptFeatures, reference: KeptFeatures | None) -> dict[str, float]:
    size = _subset_size(state, reference)
    mean, std = kid(*both_sides("kid", state, reference), subset_size=size)
    return {"kid": mean, "kid_std": std}


def _describe(state: KeptFeatures, reference: KeptFeatures | None) -> str:
    size = _subset_size(state, reference)
    return f"{describe_kept(state, reference)}, {NUM_SUBSETS} subsets of {size}"


def _warning(state: KeptFeatures, reference: KeptFeatures | None) -> str | None:
    if (size := _subset_size(state, reference)) == SUBSET_SIZE:
        return None
    return (
        f"N = {size} images on the smaller side are less than the {SUBSET_SIZE} of a subset: each "
        "subset holds them all, so that the deviation between subsets is no error bar."
    )


def _subset_size(state: KeptFeatures, reference: KeptFeatures | None) -> int:
    counts = [len(side) for side in both_sides("kid", state, reference)]
    if min(counts) < 2:
        raise ValueError(f"kid needs at least 2 images on each side; got {counts}.")
    return min(SUBSET_SIZE, *counts)
