"""Moving between latents x_T: lines and grids, spherical and linear.

Latents live on a sphere: a standard normal vector of d dimensions has norm near sqrt(d). Spherical
interpolation stays there, linear interpolation falls inside, where the network never saw x_T.
Source: Song et al. 2021, section 5.3 and appendix D.5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddim_jax.checks import check_count, check_floating, check_real, check_same_shape
from ddim_jax.numerics import safe_sqrt
from ddim_jax.types import Data

Fraction = Float[Array, ""] | float


def lerp(a: Data, b: Data, fraction: Fraction) -> Data:
    """(1 - fraction) a + fraction b. Between two latents it loses norm; prefer `slerp`."""
    check_floating("a", a)
    check_same_shape("b", b, a)
    check_real("fraction", fraction)
    return ((1 - fraction) * a + fraction * b).astype(a.dtype)


def slerp(a: Data, b: Data, fraction: Fraction) -> Data:
    """Spherical interpolation of two latents of any one shape, taken as flat vectors.

    fraction in [0, 1] goes from a to b along the arc between them; parallel or opposite vectors,
    which have no single arc, are joined by a straight line, and so is a zero vector, which has no
    direction. Source: eq. 67 (Shoemake 1985).
    """
    check_floating("a", a)
    check_same_shape("b", b, a)
    check_real("fraction", fraction)
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    u, v = _norm(b.astype(dtype)) * a, _norm(a.astype(dtype)) * b
    # Not the arccos of the cosine, which loses half the digits near 0 and pi: opposite vectors
    # would miss the straight line and land anywhere.
    angle = 2 * jnp.arctan2(_norm(u - v), _norm(u + v))
    sine = jnp.sin(angle)
    no_arc = sine < 1e-5
    safe = jnp.where(no_arc, 1.0, sine)
    weight_a = jnp.where(no_arc, 1 - fraction, jnp.sin((1 - fraction) * angle) / safe)
    weight_b = jnp.where(no_arc, fraction, jnp.sin(fraction * angle) / safe)
    return (weight_a * a + weight_b * b).astype(a.dtype)


def _norm(x: jax.Array) -> jax.Array:
    """Euclidean norm over all axes, with gradient 0 at 0."""
    return safe_sqrt(jnp.sum(jnp.square(x)))


def interpolation_line(
    a: Data, b: Data, num_points: int, interpolate=slerp
) -> Float[Array, "N *shape"]:
    """`num_points` latents from a to b, both included; `interpolate` is slerp or lerp."""
    check_count("num_points", num_points, at_least=2)
    fractions = jnp.linspace(0.0, 1.0, num_points)
    return jax.vmap(lambda f: interpolate(a, b, f))(fractions)


def interpolation_grid(
    corners: Float[Array, "4 *shape"], num_rows: int, num_columns: int, interpolate=slerp
) -> Float[Array, "rows columns *shape"]:
    """A grid of latents between four: corners[0..3] are top left, top right, bottom left, right.

    Rows run between the two interpolated edges. Source: appendix D.5.
    """
    check_floating("corners", corners)
    if corners.shape[:1] != (4,):
        raise ValueError(f"corners must hold 4 latents; got shape {corners.shape}.")
    check_count("num_rows", num_rows, at_least=2)
    check_count("num_columns", num_columns, at_least=2)
    top_left, top_right, bottom_left, bottom_right = corners
    left = interpolation_line(top_left, bottom_left, num_rows, interpolate)
    right = interpolation_line(top_right, bottom_right, num_rows, interpolate)
    return jax.vmap(lambda a, b: interpolation_line(a, b, num_columns, interpolate))(left, right)
