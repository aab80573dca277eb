"""What can be a mean and a covariance passes every door; what cannot passes none."""

import warnings

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from ddim_jax.metrics.covariance import check_covariance, check_mean
from ddim_jax.metrics.frechet import (
    FeatureMoments,
    Gaussian,
    finalize_moments,
    frechet_distance,
    frechet_metric,
    init_moments,
    update_moments,
)
from ddim_jax.metrics.statistics import load_statistics


def cov_of(num_samples, dim, seed=0):
    """Of features as networks give them: not negative, of very different sizes, one constant."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.exp(-np.arange(dim) / 4)
    x = np.maximum(rng.normal(size=(num_samples, dim)) @ mix + 0.3, 0)
    x[:, 0] = 0.7
    return x, np.cov(x, rowvar=False)


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.sampled_from([2, 5, 40, 3000]),
    dim=st.sampled_from([2, 9, 40]),
    dtype=st.sampled_from([np.float64, np.float32, np.float16]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_what_is_published_passes(num_samples, dim, dtype, scale, seed):
    x, cov = cov_of(num_samples, dim, seed)
    # numpy's, rounded; and a sloppy one: one pass in single precision, its halves not equal.
    check_covariance("sigma", cov.astype(dtype).astype(np.float64) * scale)
    x32 = x.astype(np.float32)
    mean = x32.mean(axis=0)
    sloppy = x32.T @ x32 / np.float32(num_samples) - np.outer(mean, mean)
    noise = np.random.default_rng(seed).uniform(-1e-6, 1e-6, sloppy.shape)
    if num_samples > 5 and dim > 2:  # else the constant's rounding is all there is
        check_covariance("sigma", sloppy + noise * sloppy.diagonal().max())


def test_no_variance_at_all_and_single_features_pass():
    for cov in (np.zeros((3, 3)), np.eye(1), np.eye(4, dtype=int)):
        check_covariance("sigma", cov)
    check_mean("mu", np.zeros(1, np.float16))


def other_than_covariances():
    """What it is -> (array, what the message says); wrong by more than any rounding."""
    _, cov = cov_of(500, 8)
    at = 5, 2

    def changed(value, *places):
        other = cov.copy()
        for place in places:
            other[place] = value
        return other

    bound = np.sqrt(cov[2, 2] * cov[5, 5])
    equal = np.full((3, 3), -0.9) + 1.9 * np.eye(3)  # eigenvalues 1.9, 1.9 and 1 - 2 * 0.9
    cases = {
        "NaN": (changed(np.nan, at), r"finite; got NaN or infinity in 1 of 64 places"),
        "infinity": (changed(np.inf, at, at[::-1]), r"finite; .* in 2 of 64"),
        "complex": (cov + 0j, "real numbers; got dtype complex128"),
        "text": (cov.astype(str), "real numbers; got dtype <U"),
        "truth": (cov > 0, "real numbers; got dtype bool"),
        "one half": (np.tril(cov), "symmetric; .* One triangle is zero"),
        "the other half": (np.triu(cov), "symmetric; .* One triangle is zero"),
        "a factor": (scipy.linalg.cholesky(cov[1:, 1:], lower=True), "symmetric; .* L @ L.T"),
        "one element": (changed(-cov[at], at), r"symmetric; got .* at \(2, 5\) and .* at \(5, 2\)"),
        "negative variance": (changed(-cov[3, 3], (3, 3)), r"none negative; got -.* at \(3, 3\)"),
        "all negative": (-cov, "none negative"),
        "correlation 1.01": (changed(1.01 * bound, at, at[::-1]), "beyond the product"),
        "beyond float": (changed(1e300, at, at[::-1]) * 1e-100, "beyond the product"),
        "no variance": (np.ones((3, 3)) - np.eye(3), "beyond the product"),
        "indefinite": (equal, "negative eigenvalue; the smallest is -0.8"),
        "a vector": (cov.diagonal(), r"shape"),
        "not square": (cov[1:], r"shape"),
        "empty": (np.zeros((0, 0)), r"shape"),
    }
    return {name: (array, f"{{}} must .*{message}") for name, (array, message) in cases.items()}


@pytest.mark.parametrize("case", other_than_covariances())
def test_what_is_no_covariance_passes_no_door(case, tmp_path):
    cov, message = other_than_covariances()[case]
    mean = np.zeros(max(len(cov), 1))
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=cov)
    moments = update_moments(init_moments(8), cov_of(20, 8)[0])
    doors = {
        "sigma": lambda: check_covariance("sigma", cov),
        "cov1": lambda: frechet_distance(mean, cov, mean, np.eye(len(mean))),
        "cov2": lambda: frechet_distance(mean, np.eye(len(mean)), mean, cov),
        "cov": lambda: frechet_metric().compute(moments, Gaussian(mean, cov)),
        r"stats\.npz(: sigma)?": lambda: load_statistics(tmp_path / "stats.npz"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, door in doors.items():
            with refused(message.format(name)):
                door()


@pytest.mark.parametrize(
    "mean, message",
    [
        (np.array([0, np.nan, 1]), "finite; got NaN or infinity in 1 of 3"),
        (np.array([0, np.inf, 1]), "finite"),
        (np.array([0, 1j, 1]), "real numbers; got dtype complex"),
        (np.zeros((1, 3)), "shape"),
    ],
)
def test_what_is_no_mean_passes_no_door(mean, message, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=np.eye(3))
    for name, door in {
        "mu": lambda: check_mean("mu", mean),
        "mean2": lambda: frechet_distance(np.zeros(3), np.eye(3), mean, np.eye(3)),
        "mean": lambda: finalize_moments(Gaussian(mean, np.eye(3))),
        r"stats\.npz(: mu)?": lambda: load_statistics(tmp_path / "stats.npz"),
    }.items():
        with refused(f"{name} must .*{message}"):
            door()


def test_moments_that_were_saved_with_nan_are_refused():
    with refused("scatter must be finite"):
        finalize_moments(FeatureMoments(np.array(9), np.zeros(2), np.full((2, 2), np.nan)))
