"""Checks of arguments: what is wrong, by which rule, with which value, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Value = TypeVar("Value")


def check_same_shape(name: str, array: jax.Array, x: jax.Array) -> None:
    """Raise ValueError unless `array`, called `name` in the message, has x's shape."""
    if jnp.shape(array) != jnp.shape(x):
        raise ValueError(
            f"{name} must have the data's shape {jnp.shape(x)}; got {jnp.shape(array)}."
        )


def check_floating(name: str, x: jax.Array) -> None:
    """Raise ValueError unless `x`, called `name` in the message, is floating point."""
    if not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array; got {type(x).__name__}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating point, data in [-1, 1]; got dtype {x.dtype}. "
            "Grey levels 0..255 become x / 127.5 - 1."
        )


def check_finite(name: str, array: Any, way_out: str) -> None:
    """Raise ValueError, ending in `way_out`, if `array` on the host holds NaN or infinity."""
    array = np.asarray(array)
    if (count := int(np.count_nonzero(~np.isfinite(array)))) > 0:
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {count} of {array.size} places. "
            f"{way_out}"
        )


def check_finite_weights(params: Any) -> None:
    """Raise ValueError, naming the first, if an array of a pytree holds NaN or infinity."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [path for path, leaf in leaves if not np.isfinite(np.asarray(leaf)).all()]
    if bad:
        first = jax.tree_util.keystr(bad[0], simple=True, separator="/")
        raise ValueError(
            f"weights must be finite; {len(bad)} of {len(leaves)} arrays hold NaN or infinity, "
            f"first {first}. The training that saved them diverged, or they did not fit half "
            "precision: take an earlier checkpoint, or a file in single precision."
        )


def check_bounds(low: float, high: float) -> None:
    """Raise ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"low must be below high; got low={low}, high={high}.")


def check_one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """Raise ValueError unless `value` is among those valid, listing them."""
    if value not in (valid := tuple(valid)):
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}.")


def look_up(name: str, value: str, table: Mapping[str, Value]) -> Value:
    """table[value]; ValueError, listing the names of the table, if it has none such."""
    check_one_of(name, value, table)
    return table[value]
