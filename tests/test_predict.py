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
from ddim_jax.predict import as_prediction, clip_prediction, predict, predict_noise

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


# -------------------------------------------------------------------------------------- velocity


@given(log_snr=st.floats(-10, 10), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_velocity_is_the_v_of_a_noised_example(log_snr, seed):
    ab = float(np.float32(1 / (1 + np.exp(-log_snr))))
    x0, eps = np.random.default_rng(seed).normal(size=(2, 20)).astype(np.float32)
    v = jax.jit(dj.velocity)(x0, eps, ab)
    np.testing.assert_allclose(v, np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0, atol=1e-6)
    x_t = np.float32(reference.add_noise(x0, eps, ab))
    np.testing.assert_allclose(JITTED["v", "x0"](v, x_t, ab), x0, atol=2e-6)
    np.testing.assert_allclose(JITTED["v", "epsilon"](v, x_t, ab), eps, atol=2e-6)


def test_velocity_at_both_ends_and_for_each_example():
    np.testing.assert_array_equal(dj.velocity(VALUE, X_T, 0.0), -VALUE)
    np.testing.assert_array_equal(dj.velocity(VALUE, X_T, 1.0), X_T)
    each = dj.velocity(VALUE, X_T, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(each[1], (X_T[1] - VALUE[1]) / np.sqrt(2), atol=1e-6)
    assert dj.velocity(VALUE.astype(jnp.bfloat16), X_T, 0.3).dtype == jnp.bfloat16
    with refused(r"eps must have the data's shape \(3, 4, 2\); got \(4, 2\)"):
        dj.velocity(VALUE, X_T[0], 0.5)


# ---------------------------------------------------------------------------------------- pairs


@given(log_snr=st.floats(-8, 9), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_clip_prediction_clips_the_data_and_the_eps_that_stands_for_it(log_snr, seed):
    ab = float(np.float32(1 / (1 + np.exp(-log_snr))))
    x_t, eps = np.random.default_rng(seed).normal(size=(2, 50)).astype(np.float32)
    pair = jax.jit(lambda e, x: clip_prediction(as_prediction(e, x, ab), x, ab))(eps, x_t)
    clipped = np.asarray(pair.eps)
    want = np.clip(reference.convert("epsilon", "x0", eps, x_t, ab), -1, 1)
    got = reference.convert("epsilon", "x0", clipped.astype(np.float64), x_t, ab)
    np.testing.assert_allclose(got, want, atol=2e-6 / np.sqrt(min(ab, 1 - ab)))
    np.testing.assert_allclose(pair.x0, want, atol=1e-6 / np.sqrt(ab))
    assert np.abs(pair.x0).max() <= 1
    inside = np.abs(reference.convert("epsilon", "x0", eps, x_t, ab)) < 0.999
    np.testing.assert_array_equal(clipped[inside], eps[inside])


def test_clip_prediction_to_other_bounds():
    eps, x_t = jnp.zeros(3), jnp.array([-3.0, 0.1, 3.0])
    pair = clip_prediction(as_prediction(eps, x_t, 0.25), x_t, 0.25, low=0.0, high=2.0)
    np.testing.assert_allclose(pair.x0, [0.0, 0.2, 2.0], atol=1e-6)
    np.testing.assert_allclose(dj.epsilon_to_x0(pair.eps, x_t, 0.25), [0.0, 0.2, 2.0], atol=1e-6)


def test_clip_prediction_works_where_there_is_no_signal_and_leaves_what_is_inside():
    """At alpha_bar = 0 the eps that goes with any x0 is x_t itself."""
    x_t, said = jnp.array([5.0, -5.0, 0.5]), jnp.array([7.0, 7.0, 7.0])
    pair = clip_prediction(dj.Prediction(jnp.array([3.0, -0.5, 1.0]), said), x_t, 0.0)
    np.testing.assert_array_equal(pair.x0, [1.0, -0.5, 1.0])
    np.testing.assert_array_equal(pair.eps, [5.0, 7.0, 7.0])
    unbounded = clip_prediction(dj.Prediction(x_t, said), x_t, 0.5, -jnp.inf, jnp.inf)
    np.testing.assert_array_equal(unbounded.x0, x_t)
    np.testing.assert_array_equal(unbounded.eps, said)


@pytest.mark.parametrize("ab", [0.9999, 0.5, 4.0358e-5])
def test_predict_makes_the_pair_of_an_eps(ab):
    ab = float(np.float32(ab))
    got = jax.jit(lambda x: predict(lambda x, t: VALUE * (t + 1), x, jnp.int32(0), ab))(X_T)
    assert isinstance(got, dj.Prediction)
    np.testing.assert_array_equal(got.eps, VALUE)
    want = reference.convert("epsilon", "x0", VALUE, X_T, ab)
    np.testing.assert_allclose(got.x0, want, atol=1e-6 / np.sqrt(ab))


def test_predict_hands_a_pair_on_as_it_is():
    def network(x, t):
        return dj.Prediction(2 * x, 3 * x + t)

    x0, eps = predict(network, X_T, jnp.int32(5), 0.5)
    np.testing.assert_array_equal(x0, 2 * X_T)
    np.testing.assert_array_equal(eps, 3 * X_T + 5)
    np.testing.assert_array_equal(predict_noise(network, X_T, jnp.int32(5)), 3 * X_T + 5)


def test_the_data_that_goes_with_bfloat16_noise_is_float32():
    x, eps, ab = X_T.astype(jnp.bfloat16), VALUE.astype(jnp.bfloat16), float(np.float32(0.9999))
    got = predict(lambda x, t: eps, x, 0, ab)
    assert got.x0.dtype == jnp.float32
    want = reference.convert("epsilon", "x0", np.float64(eps), np.float64(x), ab)
    np.testing.assert_allclose(got.x0, want, atol=1e-6)


def test_a_step_and_a_network_say_what_shape_they_want_of_a_pair():
    for field in ("x0", "eps"):
        pair = dj.Prediction(VALUE, VALUE)._replace(**{field: VALUE[:1]})
        with refused(rf"eps.{field} must have the data's shape \(3, 4, 2\); got \(1, 4, 2\)"):
            as_prediction(pair, X_T, 0.5)
        for ask in (predict_noise, lambda f, x, t: predict(f, x, t, 0.5)):
            with refused(r"eps_fn must return an array of x's shape \(3, 4, 2\); got \(1, 4, 2\)"):
                ask(lambda x, t, pair=pair: pair, X_T, 0)


@pytest.mark.parametrize("answer", [None, "eps", [1.0], (X_T, X_T), {"sample": X_T}])
def test_what_is_neither_an_array_nor_a_pair_is_refused(answer):
    kind = type(answer).__name__
    with refused(rf"eps_fn must return an array or a Prediction of two; got {kind}"):
        predict_noise(lambda x, t: answer, X_T, 0)
    with refused("eps_fn must return an array or a Prediction of two; got"):
        predict(lambda x, t: dj.Prediction(x, answer), X_T, 0, 0.5)


def test_predict_noise_refuses_another_shape():
    x = jnp.zeros((2, 8, 8, 3))
    doubled = jax.jit(lambda x: predict_noise(lambda x, t: jnp.concatenate([x, x], -1), x, 0))
    with refused(r"eps_fn must return an array of x's shape \(2, 8, 8, 3\); got \(2, 8, 8, 6\)"):
        doubled(x)
    np.testing.assert_array_equal(predict_noise(lambda x, t: x + t, x, jnp.int32(3)), x + 3)
