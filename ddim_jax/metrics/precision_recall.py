"""Fidelity and variety apart: precision and recall, density and coverage, by nearest neighbours.

Both pairs draw a ball around every point of a set, out to its k-th nearest neighbour in that set,
and count who lies inside. Squared distances come in blocks of rows from matrix products on the
device, so that memory is `block_size` times the other set's size, never the square of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddim_jax.checks import check_count
from ddim_jax.metrics.kept import (
    NUM_KEPT,
    KeptFeatures,
    both_sides,
    describe_kept,
    metric_over_kept,
)
from ddim_jax.metrics.metric import Metric, Number, check_features, check_finite_features

BLOCK_SIZE = 1000


class PrecisionRecall(NamedTuple):
    """Share of generated images among the real ones, and of real among the generated; in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Real balls around a generated image over k, about 1 at best; share of real balls hit."""

    density: float
    coverage: float


def precision_recall(
    real: Float[Array, "N D"] | Float[np.ndarray, "N D"],
    generated: Float[Array, "M E"] | Float[np.ndarray, "M E"],
    *,
    k: int = 3,
    block_size: int = BLOCK_SIZE,
) -> PrecisionRecall:
    """Improved precision and recall of the generated features against the real ones.

    Compare only at equal numbers of samples and equal k. Raises ValueError unless both sets have
    more than k points of one length, all finite.
    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eq. 1 and 2.
    """
    real, generated = _prepare(real, generated, k, block_size)
    in_real = _num_balls(generated, real, _squared_radii(real, k, block_size), block_size)
    in_generated = _num_balls(real, generated, _squared_radii(generated, k, block_size), block_size)
    return PrecisionRecall(float(np.mean(in_real > 0)), float(np.mean(in_generated > 0)))


def density_coverage(
    real: Float[Array, "N D"] | Float[np.ndarray, "N D"],
    generated: Float[Array, "M E"] | Float[np.ndarray, "M E"],
    *,
    k: int = 5,
    block_size: int = BLOCK_SIZE,
) -> DensityCoverage:
    """Density and coverage: like precision and recall, but one stray point moves them little.

    Only real points have balls. Raises ValueError as `precision_recall` does.
    Source: Naeem et al. 2020 (arXiv:2002.09797), section 3.
    """
    real, generated = _prepare(real, generated, k, block_size)
    radii = _squared_radii(real, k, block_size)
    density = np.mean(_num_balls(generated, real, radii, block_size)) / k
    nearest = np.concatenate(
        [_nearest(real[rows], generated) for rows in _blocks(real, block_size)]
    )
    return DensityCoverage(float(density), float(np.mean(nearest <= radii)))


def _prepare(real, generated, k: int, block_size: int) -> tuple[Array, Array]:
    # NaN is in no ball: it would give a low number, not NaN.
    check_features("real", real)
    check_features("generated", generated, real.shape[1])
    check_count("k", k)
    check_count("block_size", block_size)
    smallest = min(len(real), len(generated))
    if not 1 <= k < smallest:
        raise ValueError(f"k must be in [1, {smallest - 1}], below the set sizes; got {k}.")
    real, generated = jnp.asarray(real, jnp.float32), jnp.asarray(generated, jnp.float32)
    for name, features in (("real", real), ("generated", generated)):
        check_finite_features(name, features)  # float64 may be beyond float32
    centre = real.mean(axis=0)  # small coordinates lose fewer digits in |a|^2 + |b|^2 - 2 a.b
    return real - centre, generated - centre


def _blocks(points: Array, block_size: int) -> list[slice]:
    return [slice(i, i + block_size) for i in range(0, len(points), block_size)]


def _squared_radii(points: Array, k: int, block_size: int) -> Float[np.ndarray, "N"]:
    """Squared distance from each point to its k-th nearest neighbour among the others."""
    blocks = [
        _squared_radii_of_rows(points[rows], points, rows.start, k=k)
        for rows in _blocks(points, block_size)
    ]
    return np.concatenate(blocks)


def _num_balls(points: Array, centres: Array, squared_radii, block_size: int):
    """How many of the balls hold each point."""
    blocks = [
        _num_balls_of_rows(points[rows], centres, squared_radii)
        for rows in _blocks(points, block_size)
    ]
    return np.concatenate(blocks)


@functools.partial(jax.jit, static_argnames="k")
def _squared_radii_of_rows(rows, points, start, *, k: int) -> Float[Array, "B"]:
    distances = _squared_distances(rows, points)
    index = jnp.arange(rows.shape[0])
    others = distances.at[index, start + index].set(jnp.inf)
    return -jax.lax.top_k(-others, k)[0][:, -1]


@jax.jit
def _num_balls_of_rows(rows, centres, squared_radii) -> Int[Array, "B"]:
    return jnp.sum(_squared_distances(rows, centres) <= squared_radii, axis=1)


@jax.jit
def _nearest(rows, points) -> Float[Array, "B"]:
    return _squared_distances(rows, points).min(axis=1)


def _squared_distances(a: Float[Array, "A D"], b: Float[Array, "B D"]) -> Float[Array, "A B"]:
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1) - 2 * products


def precision_recall_metric(num_kept: int = NUM_KEPT) -> Metric:
    """Improved precision and recall of the pooled features that are kept, k = 3."""
    return _metric("precision_recall", ("precision", "recall"), precision_recall, 3, num_kept)


def density_coverage_metric(num_kept: int = NUM_KEPT) -> Metric:
    """Density and coverage of the pooled features that are kept, k = 5."""
    return _metric("density_coverage", ("density", "coverage"), density_coverage, 5, num_kept)


def _metric(
    name: str,
    names: tuple[str, str],
    function: Callable[..., tuple[float, float]],
    k: int,
    num_kept: int,
) -> Metric:
    """The metric of function(real, generated, k=k), which gives the numbers called `names`."""

    def compute(state: KeptFeatures, reference: KeptFeatures | None) -> dict[str, float]:
        generated, real = both_sides(name, state, reference)
        return dict(zip(names, function(real, generated, k=k), strict=True))

    def describe(state: KeptFeatures, reference: KeptFeatures | None) -> str:
        return f"{describe_kept(state, reference)}, k = {k}"

    def warning(state: KeptFeatures, reference: KeptFeatures | None) -> str | None:
        generated, real = (len(side) for side in both_sides(name, state, reference))
        if generated == real:
            return None
        return (
            f"N = {generated} images against {real}: {' and '.join(names)} depend on both; compare "
            f"at one N, such as num_kept = {min(generated, real)}."
        )

    numbers = tuple(Number(number, number.capitalize(), "higher", "linear") for number in names)
    return metric_over_kept(
        name, "pool", numbers, num_kept, compute=compute, describe=describe, warning=warning
    )
