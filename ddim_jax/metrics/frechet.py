"""Frechet distance between two sets of features, in float64 on the host.

Moments are gathered in one pass over batches of any size, with three arrays as the whole state:

    moments = init_moments(dim)
    for features in batches:
        moments = update_moments(moments, features)
    distance = frechet_distance(*finalize_moments(moments), mean_ref, cov_ref)

Float64 on the host, not float32 on the device: with fewer samples than dimensions the square
root turns the rounding of a float32 product into a relative error of 3e-5 (250 samples of 512
features; 1e-7 at 20 000 samples). An Inception feature is 8 KB an image: cheaper to move and to
add up than to compute.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int

from ddim_jax.checks import check_count, check_is, check_vectors
from ddim_jax.metrics.covariance import check_covariance, check_mean
from ddim_jax.metrics.metric import Metric, Number, check_features, check_finite_features

Features: TypeAlias = Float[Array, "N D"] | Float[np.ndarray, "N D"]
Mean: TypeAlias = Float[np.ndarray, "D"]
Covariance: TypeAlias = Float[np.ndarray, "D D"]

MOMENTS = "moments"
"""What the state is called; statistics files hold it as mean and covariance."""


class FeatureMoments(NamedTuple):
    """Mean and scatter of the feature vectors seen so far.

    Plain float64 arrays: `np.savez(path, **moments._asdict())` keeps every bit, and
    `FeatureMoments(**np.load(path))` continues where it stopped.
    """

    count: Int[np.ndarray, ""]  # vectors seen
    mean: Mean
    scatter: Covariance  # sum of (x - mean)(x - mean)^T, not yet divided


class Gaussian(NamedTuple):
    """Mean and unbiased covariance: all that a published file says of the vectors behind it."""

    mean: Mean
    cov: Covariance


class RootedGaussian(NamedTuple):
    """A Gaussian that many others are compared with: its root is taken once."""

    mean: Mean
    cov: Covariance
    root: Covariance  # root root^T = cov


def init_moments(dim: int) -> FeatureMoments:
    """Moments of no vectors at all, for features of `dim` entries."""
    check_count("dim", dim)
    return FeatureMoments(np.array(0), np.zeros(dim), np.zeros((dim, dim)))


def update_moments(moments: FeatureMoments, features: Features) -> FeatureMoments:
    """Moments after also seeing `features`, a batch of any float dtype and any length.

    The same batches in the same order give the same bits. Raises ValueError on another feature
    length and on features that are not finite.
    """
    check_is("moments", moments, FeatureMoments, "FeatureMoments, such as init_moments gives")
    check_vectors("features", features, moments.mean.shape[0])
    if features.shape[0] == 0:
        return moments
    x = np.asarray(features, np.float64)
    check_finite_features("features", x)
    mean = x.mean(axis=0)
    centred = x - mean
    return merge_moments(moments, FeatureMoments(np.array(len(x)), mean, centred.T @ centred))


def merge_moments(a: FeatureMoments, b: FeatureMoments) -> FeatureMoments:
    """Moments of the two sets together. Source: Chan, Golub, LeVeque 1979."""
    for name, moments in (("a", a), ("b", b)):
        check_is(name, moments, FeatureMoments, "FeatureMoments, such as init_moments gives")
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"a and b must be of features of one length; got {len(a.mean)} and {len(b.mean)}."
        )
    count = a.count + b.count
    if count == 0:
        return a
    shift = b.mean - a.mean
    weight = b.count / count
    return FeatureMoments(
        count=np.array(count),
        mean=a.mean + weight * shift,
        scatter=a.scatter + b.scatter + (a.count * weight) * np.outer(shift, shift),
    )


def finalize_moments(moments: FeatureMoments | Gaussian) -> Gaussian:
    """Mean and unbiased covariance (divided by N - 1) of the vectors seen.

    A Gaussian is returned as it is. Raises ValueError on one that is none, see
    `covariance.check_covariance`, and on moments that are not finite.
    """
    if isinstance(moments, Gaussian):
        check_mean("mean", moments.mean)
        check_covariance("cov", moments.cov)
        return moments
    check_is("moments", moments, FeatureMoments, "FeatureMoments or a Gaussian")
    for name in ("mean", "scatter"):
        check_finite_features(name, getattr(moments, name))
    if moments.count < 2:
        raise ValueError(f"A covariance needs at least 2 samples; got {moments.count}.")
    return Gaussian(moments.mean, moments.scatter / (moments.count - 1))


def frechet_distance(
    mean1: Float[np.ndarray, "D"],
    cov1: Float[np.ndarray, "D D"],
    mean2: Float[np.ndarray, "E"],
    cov2: Float[np.ndarray, "E E"],
) -> float:
    """Squared 2-Wasserstein distance between two Gaussians, in squared feature units; >= 0.

    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)). The trace of the root is taken from
    the symmetric A^T cov1 A with A A^T = cov2, which has the eigenvalues of cov1 cov2. So it is
    real and finite for covariances of any rank, where the root of the bare product may not exist.
    Raises ValueError on shapes that do not fit, on values that are not finite, and on what is no
    covariance, such as one triangle of it; see `covariance.check_covariance`.
    Source: Heusel et al. 2017 (arXiv:1706.08500), eq. 6; Dowson and Landau 1982.
    """
    for side, mean, cov in ((1, mean1, cov1), (2, mean2, cov2)):
        check_mean(f"mean{side}", mean)
        check_covariance(f"cov{side}", cov)
    return _distance(Gaussian(mean1, cov1), Gaussian(mean2, cov2))


def _rooted(gaussian: Gaussian) -> RootedGaussian:
    """In float64, with its root."""
    mean, cov = (np.asarray(x, np.float64) for x in gaussian)
    return RootedGaussian(mean, cov, _root(cov))


def _distance(a: Gaussian, b: Gaussian | RootedGaussian) -> float:
    """The same of what is known to be Gaussians, such as moments gathered here.

    The root is the reference's, which mostly has full rank where a few samples have not.
    """
    _check_shapes(*a, b.mean, b.cov)
    b = b if isinstance(b, RootedGaussian) else _rooted(b)
    a = Gaussian(*(np.asarray(x, np.float64) for x in a))
    products = np.linalg.eigvalsh(b.root.T @ a.cov @ b.root)
    trace_of_root = np.sqrt(np.maximum(products, 0)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov)
    return max(float(distance - 2 * trace_of_root), 0.0)  # equal ones may round to -1e-12


def _check_shapes(mean1, cov1, mean2, cov2) -> None:
    dim = np.shape(mean1)[0] if np.ndim(mean1) == 1 else "D"
    arrays = {"mean1": (mean1, 1), "cov1": (cov1, 2), "mean2": (mean2, 1), "cov2": (cov2, 2)}
    for name, (array, ndim) in arrays.items():
        if np.shape(array) != (dim,) * ndim:
            raise ValueError(
                f"{name} must have shape {(dim,) * ndim}; got {np.shape(array)}. Were both sides "
                "made with the same feature network?"
            )


def _root(cov: Covariance) -> Covariance:
    """A with A A^T = cov: Cholesky where it exists, several times faster, else eigenvectors."""
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:  # rank deficient: rounding left an eigenvalue below zero
        values, vectors = np.linalg.eigh(cov)
        return vectors * np.sqrt(np.maximum(values, 0))


def frechet_distance_from_features(
    a: Float[Array, "N D"] | Float[np.ndarray, "N D"],
    b: Float[Array, "M E"] | Float[np.ndarray, "M E"],
) -> float:
    """Frechet distance between two sets of features that fit in memory; see `frechet_distance`."""
    check_features("a", a)
    check_features("b", b, a.shape[1])
    one, other = (update_moments(init_moments(x.shape[1]), x) for x in (a, b))
    return _distance(finalize_moments(one), finalize_moments(other))


def few_samples_warning(num_samples: int, dim: int) -> str | None:
    """A sentence for tables when the covariance cannot have full rank, else None."""
    if num_samples > dim:
        return None
    return (
        f"N = {num_samples} samples do not exceed the {dim} feature dimensions: the covariance is "
        "singular and the distance is biased upwards; compare only with equal N."
    )


def frechet_metric(num_kept: int | None = None) -> Metric:
    """The distance of pooled features, FID with Inception's. It keeps moments and no features.

    The reference is a `FeatureMoments`, or the `Gaussian` that is all a published file holds; its
    root, a good part of a distance's time, is taken once where it is prepared.
    """
    del num_kept
    return Metric(
        name="frechet",
        features="pool",
        state=MOMENTS,
        numbers=(Number("fd", "FID", "lower", "log", inception_name="fid"),),
        init=init_moments,
        update=lambda state, features, indices: update_moments(state, features),
        merge=merge_moments,
        compute=_compute,
        describe=lambda state, reference: f"{state.count} images",
        warning=lambda state, reference: few_samples_warning(int(state.count), len(state.mean)),
        prepare=_prepared,
    )


def _prepared(reference: FeatureMoments | Gaussian) -> RootedGaussian:
    return _rooted(finalize_moments(reference))


def _compute(
    state: FeatureMoments, reference: FeatureMoments | Gaussian | RootedGaussian | None
) -> dict[str, float]:
    if reference is None:
        raise ValueError("frechet needs a reference, moments or a Gaussian; got None.")
    if not isinstance(reference, RootedGaussian):
        reference = _prepared(reference)
    return {"fd": _distance(finalize_moments(state), reference)}
