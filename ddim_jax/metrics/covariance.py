"""Is this a mean, is this a covariance: what can be said of two arrays that somebody else made.

A covariance of few samples has no full rank, sums of floats leave its two halves a little apart and
an eigenvalue a little below zero, and files hold it in single or half precision: all that passes.
What does not pass: numbers that are not finite, one triangle alone, negative variances, more
covariance between two features than they have variance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ddim_jax.checks import check_finite

TOLERANCE = 1e-3
"""Of a correlation: twice the rounding of half precision, and less than a distance shows."""

WAY_OUT = "Copy the file again, or make the statistics anew from the images."


def check_mean(name: str, mean: Any, way_out: str = WAY_OUT) -> None:
    """Raise ValueError unless `mean` (D,), called `name`, is real and finite."""
    _check_numbers(name, mean, "(D,), D at least 1", way_out)
    if np.ndim(mean) != 1:
        raise ValueError(f"{name} must have shape (D,); got {np.shape(mean)}. {way_out}")


def check_covariance(name: str, cov: Any, way_out: str = WAY_OUT) -> None:
    """Raise ValueError unless `cov` (D, D), called `name`, can be a covariance up to rounding.

    Real, finite, no negative variance, symmetric, no correlation beyond 1, no negative eigenvalue.
    Of any rank. Costs one Cholesky factorisation.
    """
    _check_numbers(name, cov, "(D, D), D at least 1", way_out)
    if np.ndim(cov) != 2 or np.shape(cov)[0] != np.shape(cov)[1]:
        raise ValueError(f"{name} must have shape (D, D); got {np.shape(cov)}. {way_out}")
    cov = np.asarray(cov, np.float64)
    variances = cov.diagonal()
    largest = np.abs(variances).max()
    # A feature that is nearly constant counts as one of a thousandth of the largest variance: what
    # rounding leaves of it in single precision may be all that there is.
    spread = np.sqrt(np.maximum(variances, TOLERANCE * largest))

    if (worst := variances.min()) < -(TOLERANCE**2) * largest:
        raise ValueError(
            f"{name} must have variances on its diagonal, none negative; "
            f"got {worst:.6g} at {(int(variances.argmin()),) * 2}. {way_out}"
        )
    bound = np.outer(spread, spread)
    if (at := _first_above(np.abs(cov - cov.T), TOLERANCE * bound)) is not None:
        raise ValueError(
            f"{name} must be symmetric; got {cov[at]:.6g} at {at} and {cov.T[at]:.6g} at "
            f"{at[::-1]}.{_triangle(cov)} {way_out}"
        )
    if (at := _first_above(np.abs(cov), (1 + TOLERANCE) * bound)) is not None:
        raise ValueError(
            f"{name} must have no covariance beyond the product of its standard deviations; got "
            f"{cov[at]:.6g} at {at}, between variances {variances[at[0]]:.6g} and "
            f"{variances[at[1]]:.6g}. {way_out}"
        )
    if not _is_semidefinite(cov, largest):
        raise ValueError(
            f"{name} must have no negative eigenvalue; the smallest is "
            f"{np.linalg.eigvalsh(cov)[0]:.6g}, the largest variance {largest:.6g}. {way_out}"
        )


def _check_numbers(name: str, array: Any, shape: str, way_out: str) -> None:
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers; got dtype {array.dtype}. {way_out}")
    if array.size == 0:
        raise ValueError(f"{name} must have shape {shape}; got {array.shape}. {way_out}")
    check_finite(name, array, way_out)


def _first_above(array: np.ndarray, bound: np.ndarray) -> tuple[int, int] | None:
    """Row and column of the first element above its bound."""
    above = array > bound
    if not above.any():
        return None
    row, column = np.unravel_index(int(above.argmax()), above.shape)
    return int(row), int(column)


def _triangle(cov: np.ndarray) -> str:
    """A sentence on a matrix of one triangle alone: a Cholesky factor, or a half."""
    if np.triu(cov, 1).any() and np.tril(cov, -1).any():
        return ""
    return " One triangle is zero: give both halves, or L @ L.T of a Cholesky factor L."


def _is_semidefinite(cov: np.ndarray, largest: float) -> bool:
    """Whether no eigenvalue is below zero by more than rounding: by Cholesky, not eigenvalues."""
    # Independent errors of relative size u move an eigenvalue by about u of the largest variance
    # (the diagonal's) and of the eigenvalues' root mean square (the others').
    slack = TOLERANCE * (largest + np.linalg.norm(cov) / np.sqrt(len(cov)))
    if slack == 0:
        return True  # all zero
    try:
        np.linalg.cholesky(cov + slack * np.eye(len(cov)))
    except np.linalg.LinAlgError:
        return False
    return True
