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

NEARLY_CONSTANT = 1e-2
"""Of the largest variance. A feature of less counts as one of this: what rounding in single
precision leaves of it may be all that there is."""

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
    largest = np.abs(cov.diagonal()).max()
    with np.errstate(over="ignore"):
        unit = np.clip(cov / (largest or 1.0), -2, 2)  # all beyond 1 is refused
    variances = unit.diagonal()
    if variances.min() < -TOLERANCE * NEARLY_CONSTANT:
        at = int(variances.argmin())
        raise ValueError(
            f"{name} must have variances on its diagonal, none negative; "
            f"got {cov[at, at]:.6g} at ({at}, {at}). {way_out}"
        )
    spread = np.sqrt(np.maximum(variances, NEARLY_CONSTANT))
    bound = (TOLERANCE if largest else 0.0) * np.outer(spread, spread)
    if (at := _first_above(np.abs(unit - unit.T), bound)) is not None:
        raise ValueError(
            f"{name} must be symmetric; got {cov[at]:.6g} at {at} and {cov.T[at]:.6g} at "
            f"{at[::-1]}.{_triangle(cov)} {way_out}"
        )
    bound *= 1 / TOLERANCE + 1
    if (at := _first_above(np.abs(unit), bound)) is not None:
        raise ValueError(
            f"{name} must have no covariance beyond the product of its standard deviations; got "
            f"{cov[at]:.6g} at {at}, between variances {cov[at[0], at[0]]:.6g} and "
            f"{cov[at[1], at[1]]:.6g}. {way_out}"
        )
    if largest and not _is_semidefinite(unit):
        raise ValueError(
            f"{name} must have no negative eigenvalue; the smallest is "
            f"{np.linalg.eigvalsh(cov)[0]:.6g}, the largest variance {largest:.6g}. {way_out}"
        )


def _check_numbers(name: str, array: Any, shape: str, way_out: str) -> None:
    try:
        array = np.asarray(array)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"{name} must hold real numbers, {shape}; {error}. {way_out}") from error
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


def _is_semidefinite(unit: np.ndarray) -> bool:
    """Whether no eigenvalue is below zero by more than rounding; the largest variance is 1.

    By Cholesky, which costs a tenth of the eigenvalues.
    """
    # Independent errors of relative size u move an eigenvalue by about u of the largest variance
    # (those of the diagonal) and of the eigenvalues' root mean square (the others).
    slack = TOLERANCE * (1 + np.linalg.norm(unit) / np.sqrt(len(unit)))
    shifted = unit.copy()
    shifted.flat[:: len(unit) + 1] += slack
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True
