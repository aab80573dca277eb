"""The convolution of our networks, whose gradients are fast on a CPU inside loops too.

XLA:CPU brings convolutions into the layout of its fast kernel in the entry computation of a program
alone. JAX writes the two gradients of a convolution in other layouts; inside a loop they run a
naive kernel, tens of times slower. Here each factor's tangent is a convolution of transposed
arrays, such that JAX's own transpose of it, the gradient, is in the fast layout from the start.
Forward-mode tangents are then in the other one: right everywhere, slow inside a CPU's loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], ...] | str
FAST = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    lhs: Float[Array, "B *size I"],
    rhs: Float[Array, "*window J O"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B *smaller O"]:
    """`jax.lax.conv_general_dilated` for flax's layers, the same on every platform but a CPU.

    There it is the same value, with gradients that a loop does not slow down; but for arrays on
    explicit mesh axes.
    """
    precision = options.pop("precision", None)
    fixed = padding if isinstance(padding, str) else tuple((low, high) for low, high in padding)
    if jax.default_backend() != "cpu" or _on_explicit_axes(lhs) or not _is_plain(lhs, **options):
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, precision=precision, **options
        )
    return _convolved(lhs, rhs, tuple(window_strides), fixed, precision)


def _on_explicit_axes(x: Array) -> bool:
    """Whether x is of a mesh whose axes stand in its type: JAX has no rule for these layouts."""
    mesh = jax.typeof(x).sharding.mesh
    return any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


def _is_plain(
    lhs: Array,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> bool:
    """Whether it is of images, channels last, without dilation or groups."""
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, (1,) * lhs.ndim, dimension_numbers)
    plain = lhs.ndim == 4 and numbers == jax.lax.conv_dimension_numbers(lhs.shape, (1,) * 4, FAST)
    return plain and not dilated and feature_group_count == 1 and not any(options.values())


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolved(x: Array, kernel: Array, strides: tuple, padding: Padding, precision: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=FAST, precision=precision
    )


def _tangent(strides: tuple, padding: Padding, precision: Any, primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents

    def convolved(a: Array, b: Array, layouts: tuple[str, str, str]) -> Array:
        return jax.lax.conv_general_dilated(
            a, b, strides, padding, dimension_numbers=layouts, precision=precision
        )

    y = _convolved(x, kernel, strides, padding, precision)
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(convolved(dx, kernel.transpose(0, 1, 3, 2), ("NHWC", "HWOI", "NHWC")))
    if not isinstance(dkernel, SymbolicZero):
        turned = x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3)
        parts.append(convolved(*turned, ("CHWN", "IHWO", "HWNC")).transpose(2, 0, 1, 3))
    return y, sum(parts[1:], parts[0]) if parts else SymbolicZero.from_primal_value(y)


_convolved.defjvp(_tangent, symbolic_zeros=True)
