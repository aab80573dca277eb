"""Wrappers: every parametrisation is the same network; guidance and clipping are what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from refusals import refused

import ddim_jax as dj

SCHEDULE = dj.linear_schedule()
TIMESTEPS = dj.ddim_timesteps(1000, 6)
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
KEY = jax.random.key(1)
T = jnp.int32(5)


def eps_fn(x, t):
    return jnp.sqrt(1 - SCHEDULE.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


def predicting(target):
    """The same network, asked for another quantity."""
    convert = getattr(dj, f"epsilon_to_{target}")
    return lambda x, t: convert(eps_fn(x, t), x, SCHEDULE.alpha_bar(t))


@functools.partial(jax.jit, static_argnums=0)
def draw(network, eta):
    return dj.sample_trajectory(KEY, network, SCHEDULE, X, TIMESTEPS, dj.ddim(eta))


@pytest.mark.parametrize(
    "wrap, target", [("from_v", "v"), ("from_x0", "x0"), ("from_score", "score")]
)
def test_every_parametrisation_draws_the_same_trajectory(wrap, target):
    wrapped = getattr(dj, wrap)(predicting(target), SCHEDULE)
    for eta in (0.0, 1.0):
        states, x0s = draw(wrapped, eta)
        want_states, want_x0s = draw(eps_fn, eta)
        np.testing.assert_allclose(states, want_states, atol=2e-4)
        np.testing.assert_allclose(x0s, want_x0s, atol=1e-3)  # at first, x0 is 60 times eps


@pytest.mark.parametrize(
    "wrap, target", [("from_v", "v"), ("from_x0", "x0"), ("from_score", "score")]
)
def test_wrappers_against_the_linear_solve(wrap, target):
    value = jax.random.normal(jax.random.key(2), X.shape)
    wrapped = jax.jit(getattr(dj, wrap)(lambda x, t: value, SCHEDULE))
    for t in (0, 500, 999):
        want = reference.convert(target, "epsilon", value, X, float(SCHEDULE.alpha_bar(t)))
        np.testing.assert_allclose(wrapped(X, t), want, rtol=1e-4, atol=3e-2 if t == 0 else 1e-5)
    t = jnp.array([3, 700])  # as in training
    want = [
        reference.convert(target, "epsilon", value[i], X[i], float(SCHEDULE.alpha_bar(t[i])))
        for i in range(2)
    ]
    np.testing.assert_allclose(wrapped(X, t), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrap", [dj.from_v, dj.from_x0, dj.from_score, dj.clip_x0])
def test_wrapped_networks_keep_the_dtype_and_train(wrap):
    x = X.astype(jnp.bfloat16)
    got = wrap(lambda x, t: 0.5 * x, SCHEDULE)(x, jnp.array([3, 700]))
    assert got.dtype == (jnp.float32 if wrap is dj.clip_x0 else jnp.bfloat16)
    assert np.isfinite(np.float32(got)).all()
    loss = jax.grad(
        lambda w: dj.eps_loss(KEY, wrap(lambda x, t: w * x, SCHEDULE), SCHEDULE, X).sum()
    )
    assert np.isfinite(loss(0.5)) and loss(0.5) != 0


# ---------------------------------------------------------------------------------- clipping


def test_clip_x0_keeps_every_data_prediction_inside():
    clipped = dj.clip_x0(lambda x, t: -3 * x, SCHEDULE, low=-0.5, high=0.25)
    states, x0s = draw(clipped, 1.0)
    assert x0s.min() >= -0.5 - 1e-3 and x0s.max() <= 0.25 + 1e-3
    assert x0s.min() < -0.49 and x0s.max() > 0.24
    assert states[-1].min() >= -0.5 - 1e-5 and states[-1].max() <= 0.25 + 1e-5


def test_clip_x0_holds_for_bfloat16_states():
    """eps rounded to bfloat16 would let x0_hat out by 24 % at t = 999."""
    x, clipped = X.astype(jnp.bfloat16), dj.clip_x0(lambda x, t: -x, SCHEDULE)
    for t in (700, 999):
        x0 = dj.epsilon_to_x0(clipped(x, t), x.astype(jnp.float32), SCHEDULE.alpha_bar(t))
        assert np.abs(x0).max() < 1 + 1e-4


def test_clip_x0_re_derives_eps():
    t = jnp.int32(800)
    clipped = dj.clip_x0(eps_fn, SCHEDULE)(X, t)
    x0 = dj.epsilon_to_x0(eps_fn(X, t), X, SCHEDULE.alpha_bar(t))
    want = dj.x0_to_epsilon(jnp.clip(x0, -1, 1), X, SCHEDULE.alpha_bar(t))
    np.testing.assert_allclose(clipped, want, atol=1e-6)


def test_clip_x0_changes_nothing_when_nothing_is_cut():
    image = jnp.full(X.shape, 0.3)
    knows = dj.from_x0(lambda x, t: image, SCHEDULE)
    clipped = dj.clip_x0(knows, SCHEDULE)
    for t in (1, 500, 999):
        np.testing.assert_array_equal(clipped(X, t), knows(X, t))


def test_crossed_bounds_are_refused():
    with refused(r"low must be below high; got low=1.0, high=1.0"):
        dj.clip_x0(eps_fn, SCHEDULE, 1.0, 1.0)


# ---------------------------------------------------------------------------------- guidance


def cond_fn(x, t):
    return x + 1.0


def uncond_fn(x, t):
    return 0.5 * x


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0, jnp.float32(2.5)])
def test_guidance_is_the_line_through_both_networks(scale):
    got = jax.jit(dj.guided(cond_fn, uncond_fn, scale))(X, T)
    want = (1 - scale) * uncond_fn(X, T) + scale * cond_fn(X, T)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_guidance_scale_may_be_traced_mapped_and_per_image():
    one_compile = jax.jit(lambda scale: dj.guided(cond_fn, uncond_fn, scale)(X, T))
    scales = jnp.array([0.0, 3.0])
    mapped = jax.vmap(one_compile)(scales)
    for scale, got in zip(scales, mapped, strict=True):
        np.testing.assert_allclose(got, one_compile(scale), atol=1e-6)
    per_image = one_compile(scales)
    np.testing.assert_allclose(per_image[0], uncond_fn(X[0], T), atol=1e-6)
    np.testing.assert_allclose(per_image[1], mapped[1, 1], atol=1e-6)


def test_guidance_keeps_the_dtype():
    assert dj.guided(cond_fn, uncond_fn, 2.0)(X.astype(jnp.bfloat16), T).dtype == jnp.bfloat16


def test_wrappers_compose():
    composed = dj.clip_x0(
        dj.guided(dj.from_v(predicting("v"), SCHEDULE), eps_fn, 3.0), SCHEDULE, -1.0, 1.0
    )
    # Guidance between a network and itself is that network, whatever the scale.
    want = dj.clip_x0(eps_fn, SCHEDULE)(X, T)
    np.testing.assert_allclose(jax.jit(composed)(X, T), want, atol=1e-4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda bad: dj.guided(bad, uncond_fn, 2.0),
        lambda bad: dj.guided(cond_fn, bad, 2.0),
        lambda bad: dj.from_v(bad, SCHEDULE),
        lambda bad: dj.from_x0(bad, SCHEDULE),
        lambda bad: dj.from_score(bad, SCHEDULE),
        lambda bad: dj.clip_x0(bad, SCHEDULE),
    ],
)
def test_a_network_that_changes_shapes_is_refused_under_any_wrapper(wrap):
    for bad in (lambda x, t: x[:1], lambda x, t: x[..., :1], lambda x, t: jnp.float32(0.0)):
        with refused(r"must (return an array of x's|have the data's) shape \(2, 4, 4, 3\)"):
            wrap(bad)(X, T)


def test_a_guidance_scale_of_another_shape_is_refused():
    with refused(r"must be a scalar or have the data's leading axes; got level shape \(3,\)"):
        dj.guided(cond_fn, uncond_fn, jnp.ones(3))(X, T)
