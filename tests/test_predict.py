"""The twelve conversions among eps, x0, v and score: against a linear solve, and as round trips."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

import ddim_jax as dj
from ddim_jax.predict import (
    as_level,
    check_floating,
    clip_epsilon,
    expand_level,
    noise_kept,
    predict_noise,
    safe_sqrt,
)

PAIRS = list(itertools.permutations(reference.PREDICTIONS, 2))
CONVERTERS = {(a, b): getattr(dj, f"{a}_to_{b}") for a, b in PAIRS}
JITTED = {pair: jax.jit(convert) for pair, convert in CONVERTERS.items()}
RNG = np.random.default_rng(0)
X_T, VALUE = jnp.asarray(RNG.normal(size=(2, 3, 4, 2)), jnp.float32)

by_pair = pytest.mark.parametrize("source, target", PAIRS, ids=[f"{a}_to_{b}" for a, b in PAIRS])


def test_there_are_twelve():
    assert len(CONVERTERS) == 12


@by_pair
@pytest.mark.parametrize("ab", [0.9999, 0.7, 0.5, 0.01, 4.0358e-5])
def test_conversion_solves_the_linear_system(source, target, ab):
    ab = float(np.float32(ab))
    got = JITTED[source, target](VALUE, X_T, ab)
    want = reference.convert(source, target, VALUE, X_T, ab)
    # Dividing by a small signal or noise magnifies the rounding of what is divided.
    unit = 1e-6 / np.sqrt(min(ab, 1 - ab)) ** (2 if target in ("v", "score") else 1)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=max(unit, 3e-6))


@by_pair
@given(log_snr=st.floats(-4, 4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=8)
def test_round_trip(source, target, log_snr, seed):
    ab = 1 / (1 + np.exp(-log_snr))
    x_t, value = np.random.default_rng(seed).normal(size=(2, 3, 4, 2)).astype(np.float32)
    there = JITTED[source, target](value, x_t, ab)
    np.testing.assert_allclose(JITTED[target, source](there, x_t, ab), value, atol=2e-4)


@pytest.mark.parametrize("first, second, third", itertools.permutations(reference.PREDICTIONS, 3))
def test_going_through_a_third_prediction_changes_nothing(first, second, third):
    direct = JITTED[first, third](VALUE, X_T, 0.4)
    around = JITTED[second, third](JITTED[first, second](VALUE, X_T, 0.4), X_T, 0.4)
    np.testing.assert_allclose(around, direct, atol=1e-5)


def test_the_four_predictions_of_one_noised_example():
    x0, eps = RNG.normal(size=(2, 5)).astype(np.float32)
    ab = 0.3
    x_t = np.float32(reference.add_noise(x0, eps, ab))
    truth = {
        "epsilon": eps,
        "x0": x0,
        "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0,
        "score": -(x_t - np.sqrt(ab) * x0) / (1 - ab),  # grad of log N(x_t; sqrt(ab) x0, 1 - ab)
    }
    for (source, target), convert in CONVERTERS.items():
        np.testing.assert_allclose(
            convert(jnp.asarray(truth[source], jnp.float32), jnp.asarray(x_t), ab),
            truth[target],
            atol=3e-6,
        )


# ------------------------------------------------------------------------ levels, shapes, dtypes


@by_pair
def test_a_level_for_each_example(source, target):
    levels = jnp.array([0.1, 0.5, 0.9])
    convert = CONVERTERS[source, target]
    want = [reference.convert(source, target, VALUE[i], X_T[i], float(levels[i])) for i in range(3)]
    for shaped in (levels, levels[:, None, None], np.asarray(levels)):
        np.testing.assert_allclose(JITTED[source, target](VALUE, X_T, shaped), want, atol=2e-5)
    np.testing.assert_allclose(jax.vmap(convert)(VALUE, X_T, levels), want, atol=2e-5)


@by_pair
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 3, 1)])
def test_any_shape_and_dtype_comes_back(source, target, shape):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jnp.ones(shape, dtype)
        got = jax.eval_shape(CONVERTERS[source, target], x, x, 0.5)
        assert got.shape == shape and got.dtype == dtype


@by_pair
def test_bfloat16_data_meets_float32_levels(source, target):
    # In bfloat16 this level is 1.0, where half of the conversions divide by zero.
    ab = 0.9999
    value, x_t = jnp.asarray(VALUE, jnp.bfloat16), jnp.asarray(X_T, jnp.bfloat16)
    got = CONVERTERS[source, target](value, x_t, ab)
    want = reference.convert(source, target, np.float64(value), np.float64(x_t), ab)
    np.testing.assert_allclose(np.float64(got), want, rtol=2**-7, atol=2e-3)


@by_pair
def test_gradients_are_those_of_the_linear_map(source, target):
    def total(value, x_t):
        return CONVERTERS[source, target](value, x_t, 0.3).sum()

    def want(value, x_t):
        return reference.convert(source, target, value, x_t, 0.3).item()

    grads = jax.grad(total, argnums=(0, 1))(jnp.asarray(0.7), jnp.asarray(-0.2))
    np.testing.assert_allclose(grads, (want(1, 0), want(0, 1)), rtol=1e-5, atol=1e-6)


def test_clean_data_is_where_the_mathematics_is():
    x, v = jnp.array([0.3, -2.0]), jnp.array([1.0, 5.0])
    np.testing.assert_array_equal(dj.epsilon_to_x0(v, x, 1.0), x)
    np.testing.assert_array_equal(dj.v_to_x0(v, x, 1.0), x)
    np.testing.assert_array_equal(dj.v_to_epsilon(v, x, 1.0), v)
    assert not np.isfinite(dj.x0_to_epsilon(v, x, 1.0)).any()


def test_nan_levels_give_nan():
    x = jnp.ones(3)
    for convert in CONVERTERS.values():
        assert np.isnan(convert(x, x, np.nan)).all()


@pytest.mark.parametrize("shape", [(2,), (3, 4, 2, 1), (3, 2), (4, 4, 2)])
def test_levels_that_do_not_fit_the_data_are_refused(shape):
    with refused(r"level .* must be a scalar or have the data's leading axes; got level shape"):
        dj.epsilon_to_x0(VALUE, X_T, np.full(shape, 0.5, np.float32))


@by_pair
def test_predictions_of_another_shape_are_refused_by_name(source, target):
    name = "eps" if source == "epsilon" else source
    for bad in (VALUE[:1], VALUE[..., None], np.float32(0.0)):
        with refused(rf"{name} must have the data's shape \(3, 4, 2\); got \("):
            CONVERTERS[source, target](bad, X_T, 0.5)


@by_pair
def test_integer_data_is_refused(source, target):
    image = jnp.arange(4, dtype=jnp.uint8)
    with refused(r"x_t must be floating point, data in \[-1, 1\]; got dtype uint8.*127.5"):
        CONVERTERS[source, target](jnp.zeros(4), image, 0.5)


# --------------------------------------------------------------------------------------- helpers


def test_levels_are_at_least_float32_and_not_weak():
    for level in (0.5, np.float16(0.5), jnp.bfloat16(0.5), jnp.float16(0.5)):
        assert as_level(level).dtype == jnp.float32
        assert (jnp.ones(2, jnp.bfloat16) * as_level(level)).dtype == jnp.float32


def test_expand_level_appends_axes():
    x = jnp.zeros((2, 3, 4))
    assert expand_level(jnp.ones(2), x).shape == (2, 1, 1)
    assert expand_level(jnp.ones((2, 3)), x).shape == (2, 3, 1)
    assert expand_level(1.0, x).shape == (1, 1, 1)


def test_safe_sqrt_and_its_gradient():
    x = jnp.array([-1.0, 0.0, 4.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(safe_sqrt(x), [0, 0, 2, np.nan, np.inf])
    np.testing.assert_array_equal(jax.vmap(jax.grad(safe_sqrt))(x[:3]), [0, 0, 0.25])


def test_noise_kept_is_nan_where_no_process_has_this_sigma():
    np.testing.assert_allclose(noise_kept(0.75, 0.3), 0.4, rtol=1e-6)
    assert noise_kept(0.75, 0.5) == 0 and noise_kept(1.0, 0.0) == 0
    assert np.isnan(noise_kept(0.75, 0.51))


@given(log_snr=st.floats(-8, 9), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_clip_epsilon_clips_the_data_it_stands_for(log_snr, seed):
    ab = float(np.float32(1 / (1 + np.exp(-log_snr))))
    x_t, eps = np.random.default_rng(seed).normal(size=(2, 50)).astype(np.float32)
    clipped = np.asarray(jax.jit(clip_epsilon)(eps, x_t, ab))
    want = np.clip(reference.convert("epsilon", "x0", eps, x_t, ab), -1, 1)
    got = reference.convert("epsilon", "x0", clipped.astype(np.float64), x_t, ab)
    np.testing.assert_allclose(got, want, atol=2e-6 / np.sqrt(min(ab, 1 - ab)))
    inside = np.abs(reference.convert("epsilon", "x0", eps, x_t, ab)) < 0.999
    np.testing.assert_array_equal(clipped[inside], eps[inside])


def test_clip_epsilon_to_other_bounds():
    eps, x_t = jnp.zeros(3), jnp.array([-3.0, 0.1, 3.0])
    clipped = clip_epsilon(eps, x_t, 0.25, low=0.0, high=2.0)
    np.testing.assert_allclose(dj.epsilon_to_x0(clipped, x_t, 0.25), [0.0, 0.2, 2.0], atol=1e-6)


def test_predict_noise_refuses_another_shape():
    x = jnp.zeros((2, 8, 8, 3))
    doubled = jax.jit(lambda x: predict_noise(lambda x, t: jnp.concatenate([x, x], -1), x, 0))
    with refused(r"eps_fn must return an array of x's shape \(2, 8, 8, 3\); got \(2, 8, 8, 6\)"):
        doubled(x)
    np.testing.assert_array_equal(predict_noise(lambda x, t: x + t, x, jnp.int32(3)), x + 3)


def test_check_floating_takes_every_float():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        check_floating("x", jnp.zeros(1, dtype))
