"""Checks of arguments: what is wrong, by which rule, with which value, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Value = TypeVar("Value")

NUM_SEEDS = 2**32
"""Seeds are 0 .. NUM_SEEDS - 1: a larger one would be wrapped by JAX to another's numbers."""


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` is a whole number in [0, 2**32)."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < NUM_SEEDS:
        raise ValueError(f"seed must be in [0, {NUM_SEEDS}), 32 bits; got {seed!r}.")


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
