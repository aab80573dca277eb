"""Our Frechet distance beside the usual one, scipy's sqrtm of the product of covariances.

    python experiments/benchmarks/benchmark_frechet.py

One process, the same features for both, about a minute on 2 CPU cores at the default size. Exits
with an error when the two disagree by more than 1e-6 or ours is not 5 times faster.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import tyro

from ddim_jax.checks import NUM_SEEDS
from ddim_jax.metrics.frechet import (
    finalize_moments,
    frechet_distance,
    init_moments,
    update_moments,
)
from ddim_jax.runs.options import check_limits, option


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured; the defaults are the size of a published FID."""

    num_samples: int = 50_000
    """Feature vectors on each side."""
    dim: int = 2048
    """Length of a feature vector."""
    batch_size: int = 500
    """Feature vectors in one update of the moments."""
    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Seed of the made-up features."""


def feature_batches(config: BenchmarkConfig, side: int):
    """Batches of correlated, non-negative float32 features, as pooled ReLUs are."""
    mixing = np.random.default_rng(config.seed).normal(size=(config.dim, config.dim))
    mixing *= np.geomspace(1, 0.01, config.dim)[:, None] / np.sqrt(config.dim)
    rng = np.random.default_rng([config.seed, side])
    for start in range(0, config.num_samples, config.batch_size):
        size = min(config.batch_size, config.num_samples - start)
        noise = rng.normal(size=(size, config.dim)).astype(np.float32)
        yield np.maximum(noise @ mixing.astype(np.float32) + 0.02 * side, 0)


def sqrtm_distance(mean1, cov1, mean2, cov2) -> float:
    """The Frechet distance as it is usually written: the root of the bare product."""
    root = np.real(scipy.linalg.sqrtm(cov1 @ cov2))
    return np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root)


def timed(fn: Callable[..., float], *args: np.ndarray) -> tuple[float, float]:
    """fn(*args), and the seconds it took."""
    start = time.perf_counter()
    return fn(*args), time.perf_counter() - start


def main(config: BenchmarkConfig) -> int:
    """Print both distances and times; 0 when ours agrees and is 5 times faster, else 1."""
    check_limits(config)
    statistics, seconds_moments = [], 0.0
    for side in range(2):
        moments = init_moments(config.dim)
        for features in feature_batches(config, side):
            start = time.perf_counter()
            moments = update_moments(moments, features)
            seconds_moments += time.perf_counter() - start
        statistics += finalize_moments(moments)
    print(f"2 x {config.num_samples} features of {config.dim}")
    print(f"moments, one pass, both sides: {seconds_moments:8.2f} s")

    frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))  # loads LAPACK
    ours, seconds = timed(frechet_distance, *statistics)
    print(f"ours, symmetric form:          {seconds:8.2f} s   {ours:.12g}")
    theirs, seconds_sqrtm = timed(sqrtm_distance, *statistics)
    print(f"scipy {scipy.__version__}, sqrtm:          {seconds_sqrtm:8.2f} s   {theirs:.12g}")

    error, ratio = abs(ours / theirs - 1), seconds_sqrtm / seconds
    print(f"relative difference {error:.1e} (at most 1e-6), {ratio:.1f} times faster (at least 5)")
    return int(error > 1e-6 or ratio < 5)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchmarkConfig)))
