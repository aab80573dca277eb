"""Checks of arguments: what is wrong, by which rule, with which value, and the way out."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

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


def check_schedule(schedule: object) -> None:
    """Raise ValueError for what is no `NoiseSchedule`, such as a table or a number of steps."""
    if not hasattr(schedule, "alpha_bar") or isinstance(schedule, type):
        raise ValueError(
            "schedule must be a noise schedule, such as linear_schedule() gives; got "
            f"{_kind(schedule)}. A table of alphas_cumprod becomes Schedule(table)."
        )


def check_callable(name: str, fn: object) -> None:
    """Raise ValueError unless `fn`, called `name` in the message, can be called."""
    if not callable(fn):
        raise ValueError(f"{name} must be a function of (x, t); got {_kind(fn)}.")


def check_count(name: str, value: Any, at_least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number, `at_least` or more."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < at_least:
        raise ValueError(
            f"{name} must be at least {at_least}; got {value!r}. It counts whole things."
        )


def check_real(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a real number or an array of floating point numbers."""
    kind = getattr(value, "dtype", None)
    if isinstance(value, np.ndarray | jax.Array):
        real = kind is not None and jnp.issubdtype(kind, jnp.floating)
    else:
        real = isinstance(value, int | float | np.integer | np.floating)
        real = real and not isinstance(value, bool)
    if not real:
        got = f"dtype {kind}" if kind is not None else repr(value)
        raise ValueError(f"{name} must be a real number, or an array of floats; got {got}.")


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is one real number that is known and finite."""
    check_real(name, value)
    if np.ndim(value) != 0 or not np.isfinite(float(value)):
        raise ValueError(f"{name} must be one finite number; got {value!r}.")


def check_std(name: str, value: object) -> None:
    """Raise ValueError unless `value` is real and, where it is known on the host, at least 0."""
    check_real(name, value)
    if not isinstance(value, jax.Array) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"{name} must be at least 0, a standard deviation; got {value!r}.")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_same_shape(name: str, array: jax.Array | np.ndarray, x: jax.Array | np.ndarray) -> None:
    """Raise ValueError unless `array`, called `name` in the message, is of floats of x's shape."""
    if not isinstance(array, float):  # Python's, beside data that is one number
        check_floating(name, array)
    if jnp.shape(array) != jnp.shape(x):
        raise ValueError(
            f"{name} must have the data's shape {jnp.shape(x)}; got {jnp.shape(array)}."
        )


def check_floating(name: str, x: jax.Array | np.ndarray) -> None:
    """Raise ValueError unless `x`, called `name` in the message, is floating point."""
    if not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array; got {type(x).__name__}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating point, data in [-1, 1]; got dtype {x.dtype}. "
            "Grey levels 0..255 become x / 127.5 - 1."
        )


def check_is(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raise ValueError unless `value` is an instance of the kind, which is `what` in words."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {what}; got {_kind(value)}.")


def check_array(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an array of NumPy's or JAX's."""
    check_is(name, value, (np.ndarray, jax.Array), "an array")


def check_vectors(name: str, x: Any, length: int | None = None) -> None:
    """Raise ValueError unless `x` is an array of floats of shape (N, D), D at least 1.

    D is `length` where that is given.
    """
    check_array(name, x)
    if x.ndim != 2 or x.shape[1] == 0 or (length is not None and x.shape[1] != length):
        wanted = "D), D at least 1" if length is None else f"{length})"
        raise ValueError(f"{name} must have shape (N, {wanted}; got {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point; got dtype {x.dtype}.")


def check_indices(name: str, indices: Any, bits: int = 32) -> None:
    """Raise ValueError unless they are integers (B,) and, known on the host, in [0, 2**bits)."""
    known = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    if known.ndim != 1 or not jnp.issubdtype(known.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be a vector (B,) of integers, which name the images; got shape "
            f"{known.shape} and dtype {known.dtype}. For the first 4: jnp.arange(4)."
        )
    if (
        isinstance(known, np.ndarray)
        and known.size
        and not 0 <= known.min() <= known.max() < 2**bits
    ):
        raise ValueError(
            f"{name} must be in [0, 2**{bits}), {bits} bits; got {known.min()} to {known.max()}."
        )


def check_grey_levels(name: str, images: Any, num_axes: int | None = None) -> None:
    """Raise ValueError unless `images` is an array of uint8, of so many axes and some image."""
    check_array(name, images)
    if images.dtype != np.uint8:
        raise ValueError(
            f"{name} must be uint8, grey levels 0 to 255; got dtype {images.dtype}. From floats in "
            "[-1, 1]: ddim_jax.data.to_uint8(x)."
        )
    if num_axes is not None and (images.ndim != num_axes or 0 in images.shape):
        raise ValueError(
            f"{name} must have shape (N, H, W, C), none of them 0; got {images.shape}."
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
    valid = tuple(valid)
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}.")


def look_up(name: str, value: str, table: Mapping[str, Value]) -> Value:
    """table[value]; ValueError, listing the names of the table, if it has none such."""
    check_one_of(name, value, table)
    return table[value]


# ---------------------------------------------------------------------------------------------
# What a file holds


def check_types(content: Mapping[str, Any], kinds: Mapping[str, Any], way_out: str = "") -> None:
    """Raise ValueError for an entry of a JSON object that is of another type than is said.

    `kinds`: key -> type, as a dataclass is annotated: int, float (an int will do), bool, str, dict,
    Mapping, None, tuple[int, ...] (a list in JSON), Literal, unions of those. "weights.kind" is an
    entry of an entry. Keys that are absent, and those not in `kinds`, are not looked at.
    """
    check_is("the content", content, Mapping, "a mapping of names to values")
    for key, kind in kinds.items():
        *outer, last = key.split(".")
        place: Any = content
        for name in outer:
            place = place.get(name) if isinstance(place, Mapping) else None
        if isinstance(place, Mapping) and last in place and not _is_of(place[last], kind):
            message = f"{key} must be {_in_words(kind)}; got {place[last]!r}. {way_out}"
            raise ValueError(message.rstrip())


def _is_of(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _is_of(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str | int) and value in inner
    if origin is tuple:
        several = [inner[0]] * len(value) if isinstance(value, list | tuple) else None
        wanted = several if inner[-1] is ... else inner
        return several is not None and len(wanted or ()) == len(value) and all(
            map(_is_of, value, wanted or ())
        )  # fmt: skip
    if kind is Any:
        return True
    if isinstance(value, bool):  # which Python counts as an int
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, types.NoneType if kind is None else origin or kind)


_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a string",
    dict: "an object", None: "null", types.NoneType: "null", Mapping: "an object",
}  # fmt: skip


def _in_words(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _in_words(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, inner))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        return f"a list, each entry {_in_words(inner[0])}" + (
            "" if inner[-1] is ... else f", {len(inner)} of them"
        )
    return _WORDS.get(kind) or _WORDS.get(origin) or kind.__name__
