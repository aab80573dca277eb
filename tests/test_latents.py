"""Interpolation: eq. 67 in float64, norms, ends, and the cases where there is no single arc."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

import ddim_jax as dj

A, B = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
FRACTIONS = [0.0, 0.1, 0.5, 0.75, 1.0]
slerp = jax.jit(dj.slerp)
lerp = jax.jit(dj.lerp)


def norm(x):
    return float(np.linalg.norm(np.float64(x)))


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_slerp_is_eq_67(fraction):
    want = reference.slerp(A, 3 * B, fraction)  # of vectors that are not of one length
    np.testing.assert_allclose(slerp(A, 3 * B, fraction), want, atol=2e-6)


@given(angle=st.floats(0.001, np.pi - 0.01), fraction=st.floats(0, 1), d=st.integers(2, 5))
@settings(deadline=None, max_examples=60)
def test_slerp_turns_at_a_constant_rate_on_the_sphere(angle, fraction, d):
    radius = 2.0
    a, b = np.zeros((2, d))
    a[0] = radius
    b[:2] = radius * np.cos(angle), radius * np.sin(angle)
    got = np.float64(slerp(jnp.float32(a), jnp.float32(b), fraction))
    want = np.zeros(d)
    want[:2] = radius * np.cos(fraction * angle), radius * np.sin(fraction * angle)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_slerp_keeps_the_norm_of_latents_and_lerp_loses_it():
    size = np.sqrt(A.size)
    assert abs(norm(slerp(A, B, 0.5)) / size - 1) < 0.1
    assert abs(norm(lerp(A, B, 0.5)) / size - np.sqrt(0.5)) < 0.1


def test_slerp_between_vectors_of_one_norm_keeps_it_exactly():
    b = B * (norm(A) / norm(B))
    for fraction in FRACTIONS:
        np.testing.assert_allclose(norm(slerp(A, b, fraction)), norm(A), rtol=1e-6)


@pytest.mark.parametrize("interpolate", [slerp, lerp])
def test_the_ends_are_the_latents(interpolate):
    np.testing.assert_allclose(interpolate(A, B, 0.0), A, atol=1e-6)
    np.testing.assert_allclose(interpolate(A, B, 1.0), B, atol=1e-6)


def test_slerp_is_symmetric():
    np.testing.assert_allclose(slerp(A, B, 0.3), slerp(B, A, 0.7), atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, -3.0, 1.0 + 1e-6])
@pytest.mark.parametrize("size", [1, 3, 1000, 200_000])
def test_parallel_and_opposite_latents_are_joined_by_a_straight_line(size, factor):
    a = jax.random.normal(jax.random.key(size), (size,))
    for fraction in (0.0, 0.25, 1.0):
        want = np.float64(a) * (1 + fraction * (factor - 1))
        np.testing.assert_allclose(slerp(a, factor * a, fraction), want, atol=2e-5)


def test_slerp_with_a_zero_latent_is_a_straight_line():
    zero = jnp.zeros(3)
    b = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(slerp(zero, b, 0.25), 0.25 * b, rtol=1e-6)
    np.testing.assert_array_equal(slerp(zero, zero, 0.5), zero)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_lerp_is_the_straight_line(fraction):
    want = (1 - fraction) * np.float64(A) + fraction * np.float64(B)
    np.testing.assert_allclose(lerp(A, B, fraction), want, atol=1e-6)


# -------------------------------------------------------------------------------- lines and grids


@pytest.mark.parametrize("interpolate", [dj.slerp, dj.lerp])
def test_a_line_is_its_points(interpolate):
    line = jax.jit(lambda a, b: dj.interpolation_line(a, b, 5, interpolate))(A, B)
    assert line.shape == (5, *A.shape)
    for point, fraction in zip(line, np.linspace(0, 1, 5), strict=True):
        np.testing.assert_allclose(point, interpolate(A, B, float(fraction)), atol=1e-6)


def test_a_line_is_spherical_unless_told():
    middle = jax.jit(lambda a, b: dj.interpolation_line(a, b, 3)[1])(A, B)
    np.testing.assert_allclose(middle, reference.slerp(A, B, 0.5), atol=2e-6)


def test_a_grid_has_its_corners_edges_and_inside():
    corners = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    grid = jax.jit(lambda corners: dj.interpolation_grid(corners, 4, 5))(corners)
    assert grid.shape == (4, 5, 8, 8, 1)
    for corner, place in zip(corners, [(0, 0), (0, -1), (-1, 0), (-1, -1)], strict=True):
        np.testing.assert_allclose(grid[place], corner, atol=1e-5)
    top = reference.slerp(corners[0], corners[1], 1 / 4)
    np.testing.assert_allclose(grid[0, 1], top, atol=1e-5)
    left = reference.slerp(corners[0], corners[2], 1 / 3)
    right = reference.slerp(corners[1], corners[3], 1 / 3)
    np.testing.assert_allclose(grid[1, 3], reference.slerp(left, right, 3 / 4), atol=1e-5)


def test_a_linear_grid_is_bilinear():
    corners = jnp.array([0.0, 1.0, 10.0, 11.0])
    grid = jax.jit(lambda corners: dj.interpolation_grid(corners, 3, 3, dj.lerp))(corners)
    np.testing.assert_allclose(grid, [[0, 0.5, 1], [5, 5.5, 6], [10, 10.5, 11]], atol=1e-6)


# --------------------------------------------------------------------------- dtypes, vmap, grad


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_latents_keep_their_dtype_and_angles_are_float32(dtype):
    a, b = A.astype(dtype), B.astype(dtype)
    for interpolate, want in ((slerp, reference.slerp), (lerp, None)):
        got = interpolate(a, b, 0.3)
        assert got.dtype == dtype
        if want is not None:
            exact = want(np.float64(a), np.float64(b), 0.3)
            np.testing.assert_allclose(np.float64(got), exact, rtol=2**-8, atol=1e-3)


def test_float64_latents_are_interpolated_in_float64():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    with jax.enable_x64(True):
        got = np.asarray(dj.slerp(jnp.asarray(a), jnp.asarray(b), 0.3))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, reference.slerp(a, b, 0.3), rtol=1e-13, atol=1e-15)


def test_vmap_over_pairs_and_fractions():
    a, b = jax.random.normal(jax.random.key(2), (2, 3, 10))
    fractions = jnp.array([0.0, 0.4, 1.0])
    got = jax.jit(jax.vmap(dj.slerp))(a, b, fractions)
    for i in range(3):
        np.testing.assert_allclose(got[i], slerp(a[i], b[i], fractions[i]), atol=1e-6)


def test_gradients_are_finite_also_where_there_is_no_arc():
    gradient = jax.jit(jax.grad(lambda a, b, f: dj.slerp(a, b, f).sum(), argnums=(0, 1, 2)))
    for b in (B, A, -A, 2 * A):
        assert all(np.isfinite(g).all() for g in gradient(A, b, 0.3))
    h = 1e-5
    want = (reference.slerp(A, B, 0.3 + h) - reference.slerp(A, B, 0.3 - h)).sum() / (2 * h)
    np.testing.assert_allclose(gradient(A, B, 0.3)[2], want, rtol=1e-3)


# ------------------------------------------------------------------------------------ refusals


def test_bad_input_is_refused_by_name():
    for interpolate in (dj.slerp, dj.lerp):
        with refused(r"b must have the data's shape \(8, 8, 3\); got \(3,\)"):
            interpolate(A, B[0, 0], 0.5)
    with refused("num_points must be at least 2; got 1"):
        dj.interpolation_line(A, B, 1)
    corners = jnp.stack([A, B, A, B])
    with refused(r"corners must hold 4 latents; got shape \(3"):
        dj.interpolation_grid(corners[:3], 2, 2)
    with refused("num_rows must be at least 2"):
        dj.interpolation_grid(corners, 1, 2)
    with refused("num_columns must be at least 2"):
        dj.interpolation_grid(corners, 2, 1)
