"""Levels that meet the data's axes, and roots that keep their digits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from ddim_jax.numerics import as_level, expand_level, noise_kept, safe_sqrt, std_of, widen


def test_levels_are_at_least_float32_and_not_weak():
    for level in (0.5, np.float16(0.5), jnp.bfloat16(0.5), jnp.float16(0.5)):
        assert as_level(level).dtype == jnp.float32
        assert (jnp.ones(2, jnp.bfloat16) * as_level(level)).dtype == jnp.float32


def test_expand_level_appends_axes():
    x = jnp.zeros((2, 3, 4))
    assert expand_level(jnp.ones(2), x).shape == (2, 1, 1)
    assert expand_level(jnp.ones((2, 3)), x).shape == (2, 3, 1)
    assert expand_level(1.0, x).shape == (1, 1, 1)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 1), (3, 2), (2, 4)])
def test_a_level_that_does_not_meet_the_leading_axes_is_refused(shape):
    with refused(
        r"a noise level \(alpha_bar, t, eta\) must be a scalar or have the data's leading axes; "
        r"got level shape \(.*\) with data shape \(2, 3, 4\)"
    ):
        expand_level(jnp.ones(shape), jnp.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    "dtype, wide",
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.uint8, jnp.float32),
    ],
)
def test_widen_is_at_least_float32_and_changes_no_value(dtype, wide):
    with jax.enable_x64(True):
        x = jnp.asarray([0, 1, 3], dtype)
        assert widen(x).dtype == wide
        np.testing.assert_array_equal(widen(x), [0, 1, 3])


def test_safe_sqrt_and_its_gradient():
    x = jnp.array([-1.0, 0.0, 4.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(safe_sqrt(x), [0, 0, 2, np.nan, np.inf])
    np.testing.assert_array_equal(jax.vmap(jax.grad(safe_sqrt))(x[:3]), [0, 0, 0.25])


def test_std_of_forgives_rounding_alone():
    variance = jnp.array([0.25, 0.0, -1e-7, -1e-5, -1.0, jnp.nan])
    np.testing.assert_array_equal(std_of(variance), [0.5, 0, 0, np.nan, np.nan, np.nan])


def test_noise_kept_is_nan_where_no_process_has_this_sigma():
    np.testing.assert_allclose(noise_kept(0.75, 0.3), 0.4, rtol=1e-6)
    assert noise_kept(0.75, 0.5) == 0 and noise_kept(1.0, 0.0) == 0
    assert np.isnan(noise_kept(0.75, 0.51))


@given(ab_prev=st.floats(0, 1), share=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_noise_kept_and_sigma_are_the_sides_of_a_right_triangle(ab_prev, share):
    sigma = share * np.sqrt(1 - ab_prev)
    np.testing.assert_allclose(noise_kept(ab_prev, sigma) ** 2 + sigma**2, 1 - ab_prev, atol=3e-7)
