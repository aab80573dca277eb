"""One reverse step: against the paper's equations in float64, and by what the maths promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

import ddim_jax as dj
from ddim_jax.steps import is_zero

SCHEDULE = dj.linear_schedule()
TABLE = np.float64(SCHEDULE.alphas_cumprod)
X, EPS, NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 4, 3)), jnp.float32)
TRANSITIONS = [(999, 949), (999, 0), (500, 499), (100, -1), (1, 0), (0, -1)]

ddim_step = jax.jit(dj.ddim_step)


def clip_data_step(x, eps, ab, ab_prev, *, eta=0.0, noise=None, low=-1.0, high=1.0):
    """diffusers' `clip_sample`: a network that says eps, wrapped, and the step with its pair."""
    levels = jnp.atleast_1d(jnp.asarray(ab, jnp.float32))
    t = jnp.arange(levels.size).reshape(jnp.shape(ab))
    schedule = jax.tree.map(lambda _: levels, dj.Schedule(jnp.float32([0.5])))  # in no order
    wrapped = dj.clip_x0_keep_eps(lambda x, t: eps, schedule, low, high)
    return dj.ddim_step(x, wrapped(x, t), ab, ab_prev, eta=eta, noise=noise)


by_transition = pytest.mark.parametrize("t, t_prev", TRANSITIONS)


def levels(t, t_prev):
    return reference.level(TABLE, t), reference.level(TABLE, t_prev)


# --------------------------------------------------------------------------------------- sigma


@by_transition
@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
def test_ddim_sigma_is_eq_16(t, t_prev, eta):
    got = jax.jit(dj.ddim_sigma)(*levels(t, t_prev), eta)
    want = reference.ddim_sigma(*levels(t, t_prev), eta)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-9)


@by_transition
def test_sigma_of_eta_1_is_the_posteriors(t, t_prev):
    if t_prev == -1:
        assert dj.ddim_sigma(*levels(t, t_prev)) == 0
        return
    _, variance = reference.ddpm_posterior(0.0, 0.0, *levels(t, t_prev))
    np.testing.assert_allclose(dj.ddim_sigma(*levels(t, t_prev)), np.sqrt(variance), rtol=2e-4)


@by_transition
def test_sigma_hat_is_the_larger_variance_and_nothing_at_the_end(t, t_prev):
    ab, ab_prev = levels(t, t_prev)
    want = np.sqrt(1 - ab / ab_prev) if t_prev >= 0 else 0.0
    np.testing.assert_allclose(jax.jit(dj.ddim_sigma_hat)(ab, ab_prev), want, rtol=2e-4)
    assert dj.ddim_sigma_hat(ab, ab_prev) >= dj.ddim_sigma(ab, ab_prev)


@given(t=st.integers(-1, 999), t_next=st.integers(-1, 999))
@settings(deadline=None, max_examples=50)
def test_stepping_towards_noise_adds_none(t, t_next):
    t, t_next = min(t, t_next), max(t, t_next)
    assert dj.ddim_sigma(*levels(t, t_next), 1.0) == 0
    assert dj.ddim_sigma_hat(*levels(t, t_next)) == 0


def test_sigma_of_nan_is_nan():
    for sigma in (dj.ddim_sigma, dj.ddim_sigma_hat):
        assert np.isnan(sigma(np.nan, 0.5)) and np.isnan(sigma(0.5, np.nan))


# ---------------------------------------------------------------------------------- eq. 12


@by_transition
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_eq_12(t, t_prev, eta):
    got = ddim_step(X, EPS, *levels(t, t_prev), eta=eta, noise=NOISE)
    want = reference.ddim_step(X, EPS, *levels(t, t_prev), eta, NOISE)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@given(t=st.integers(0, 999), gap=st.integers(1, 1000), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_step_with_the_true_noise_lands_on_the_marginal(t, gap, seed):
    x0, eps = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    ab, ab_prev = levels(t, max(t - gap, -1))
    x_t = np.float32(reference.add_noise(x0, eps, ab))
    got = ddim_step(x_t, eps, ab, ab_prev)
    np.testing.assert_allclose(got, reference.add_noise(x0, eps, ab_prev), atol=2e-4)


@given(t=st.integers(0, 999), up=st.integers(0, 999), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_a_step_up_and_down_with_the_same_noise_is_no_step(t, up, seed):
    x, eps = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    low, high = levels(t, min(t + up, 999))
    there = ddim_step(x, eps, low, high)
    np.testing.assert_allclose(ddim_step(there, eps, high, low), x, atol=3e-4)


@given(t=st.integers(0, 999), eta=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_a_repeated_index_leaves_x_unchanged(t, eta):
    got = ddim_step(X, EPS, *levels(t, t), eta=eta, noise=NOISE)
    np.testing.assert_allclose(got, X, atol=2e-5)


@by_transition
def test_two_steps_with_one_noise_are_one_step(t, t_prev):
    """With the same eps the path is a straight line in x / sqrt(ab)."""
    middle = (t + t_prev) // 2
    if middle in (t, t_prev):
        return
    ab, ab_prev = levels(t, t_prev)
    ab_middle = reference.level(TABLE, middle)
    by_two = ddim_step(ddim_step(X, EPS, ab, ab_middle), EPS, ab_middle, ab_prev)
    np.testing.assert_allclose(by_two, ddim_step(X, EPS, ab, ab_prev), rtol=1e-4, atol=1e-4)


@by_transition
def test_eta_1_is_the_posterior_of_the_predicted_data(t, t_prev):
    ab, ab_prev = levels(t, t_prev)
    x0 = dj.epsilon_to_x0(EPS, X, ab)
    mean, variance = dj.ddpm_posterior(x0, X, ab, ab_prev)
    want = mean + jnp.sqrt(variance) * NOISE
    got = ddim_step(X, EPS, ab, ab_prev, eta=1.0, noise=NOISE)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=3e-4)


def test_clean_data_encodes_to_itself_plus_noise():
    got = ddim_step(X, EPS, 1.0, 0.7)
    np.testing.assert_allclose(got, reference.add_noise(X, EPS, 0.7), atol=1e-6)


def test_eta_may_be_traced_and_differ_between_examples():
    ab, ab_prev = levels(800, 600)
    both = ddim_step(X, EPS, ab, ab_prev, eta=jnp.array([0.0, 0.7]), noise=NOISE)
    for i, eta in enumerate([0.0, 0.7]):
        one = dj.ddim_step(X[i], EPS[i], ab, ab_prev, eta=eta, noise=NOISE[i])
        np.testing.assert_allclose(both[i], one, atol=1e-6)


def test_levels_may_differ_between_examples():
    ab, ab_prev = jnp.array([0.1, 0.5]), jnp.array([0.4, 1.0])
    for step in (dj.ddim_step, clip_data_step, dj.ddpm_step, dj.sigma_hat_step):
        both = jax.jit(step)(X, EPS, ab, ab_prev, noise=NOISE)
        each = jax.jit(jax.vmap(lambda x, e, a, p, z, step=step: step(x, e, a, p, noise=z)))
        np.testing.assert_allclose(both, each(X, EPS, ab, ab_prev, NOISE), atol=1e-5)


@pytest.mark.parametrize("eta", [1.5, jnp.float32(1.5)])
def test_more_noise_than_the_process_has_gives_nan(eta):
    assert np.isnan(ddim_step(X, EPS, *levels(999, 0), eta=eta, noise=NOISE)).all()


def test_eta_above_one_is_allowed_where_it_fits():
    ab, ab_prev = levels(999, 400)
    sigma = reference.ddim_sigma(ab, ab_prev, 1.0)
    eta = 0.999 * np.sqrt(1 - ab_prev) / sigma
    got = ddim_step(X, EPS, ab, ab_prev, eta=eta, noise=NOISE)
    np.testing.assert_allclose(got, reference.ddim_step(X, EPS, ab, ab_prev, eta, NOISE), atol=5e-4)


# ---------------------------------------------------------------------------- its relatives


@by_transition
def test_ddpm_step_with_the_small_variance_is_eta_1(t, t_prev):
    got = dj.ddpm_step(X, EPS, *levels(t, t_prev), noise=NOISE)
    want = dj.ddim_step(X, EPS, *levels(t, t_prev), eta=1.0, noise=NOISE)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@by_transition
def test_ddpm_step_with_the_large_variance(t, t_prev):
    ab, ab_prev = levels(t, t_prev)
    got = jax.jit(lambda *a: dj.ddpm_step(*a, noise=NOISE, variance="fixed_large"))(
        X, EPS, ab, ab_prev
    )
    x0 = (np.float64(X) - np.sqrt(1 - ab) * EPS) / np.sqrt(ab)
    want = x0
    if t_prev >= 0:
        mean, _ = reference.ddpm_posterior(x0, X, ab, ab_prev)
        want = mean + np.sqrt(1 - ab / ab_prev) * NOISE
    np.testing.assert_allclose(got, want, rtol=3e-4, atol=3e-4)


@by_transition
def test_sigma_hat_step_is_appendix_d3_with_the_published_clamp(t, t_prev):
    got = jax.jit(dj.sigma_hat_step)(X, EPS, *levels(t, t_prev), noise=NOISE)
    want = reference.sigma_hat_step(X, EPS, *levels(t, t_prev), NOISE)
    np.testing.assert_allclose(got, want, atol=5e-4)


@by_transition
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_clip_data_step_clips_x0_and_keeps_eps(t, t_prev, eta):
    got = jax.jit(clip_data_step)(X, EPS, *levels(t, t_prev), eta=eta, noise=NOISE)
    want = reference.clip_data_step(X, EPS, *levels(t, t_prev), eta, NOISE)
    np.testing.assert_allclose(got, want, atol=5e-4)


def test_clip_data_step_without_a_cut_is_eq_12():
    x, eps = 0.1 * X, 0.1 * EPS
    want = dj.ddim_step(x, eps, 0.5, 0.6)
    np.testing.assert_array_equal(clip_data_step(x, eps, 0.5, 0.6), want)
    wide = clip_data_step(X, EPS, 0.1, 0.6, low=-100.0, high=100.0)
    np.testing.assert_array_equal(wide, dj.ddim_step(X, EPS, 0.1, 0.6))


# ------------------------------------------------------------------------ a pair as prediction

X0 = jnp.asarray(np.random.default_rng(1).uniform(-2, 2, size=X.shape), jnp.float32)
SPOKEN = dj.Prediction(X0, EPS)  # any two arrays: what a step does with each of them shows


def eq_12(ab, ab_prev, x0, eps, room, std):
    """Eq. 12 in float64, with noise of another std than the mean leaves room for."""
    x0, eps = np.float64(x0), np.float64(eps)
    return (
        math.sqrt(ab_prev) * x0
        + math.sqrt(max(1 - ab_prev - room**2, 0)) * eps
        + std * np.float64(NOISE)
    )


PAIR_TRANSITIONS = [*TRANSITIONS, ("zero", 949), ("zero", 0), ("zero", -1)]
by_pair_transition = pytest.mark.parametrize("t, t_prev", PAIR_TRANSITIONS)


def pair_levels(t, t_prev):
    """The levels of t and t_prev; "zero" is alpha_bar = 0, pure noise."""
    return 0.0 if t == "zero" else reference.level(TABLE, t), reference.level(TABLE, t_prev)


@by_pair_transition
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_pair_is_used_as_it_is(t, t_prev, eta):
    """Also at alpha_bar = 0, where x0 does not follow from eps."""
    ab, ab_prev = pair_levels(t, t_prev)
    sigma = reference.ddim_sigma(ab, ab_prev, eta)
    got = ddim_step(X, SPOKEN, ab, ab_prev, eta=eta, noise=NOISE)
    want = eq_12(ab, ab_prev, X0, EPS, sigma, sigma)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=5e-5)


@by_pair_transition
def test_the_two_variances_and_sigma_hat_with_a_pair(t, t_prev):
    ab, ab_prev = pair_levels(t, t_prev)
    room = reference.ddim_sigma(ab, ab_prev, 1.0)
    large = math.sqrt(1 - ab / ab_prev) if t_prev != -1 else 0.0
    for variance, std in [("fixed_small", room), ("fixed_large", large)]:
        got = dj.ddpm_step(X, SPOKEN, ab, ab_prev, noise=NOISE, variance=variance)
        want = eq_12(ab, ab_prev, X0, EPS, room, std)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=5e-5)

    x0 = np.clip(np.float64(X0), -1, 1)
    rederived = (np.float64(X) - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
    eps = np.where(x0 == np.float64(X0), np.float64(EPS), rederived)
    got = dj.sigma_hat_step(X, SPOKEN, ab, ab_prev, noise=NOISE)
    np.testing.assert_allclose(got, eq_12(ab, ab_prev, x0, eps, room, large), atol=5e-4)


@by_transition
def test_the_pair_of_an_eps_gives_the_step_of_that_eps(t, t_prev):
    ab, ab_prev = levels(t, t_prev)
    pair = dj.Prediction(dj.epsilon_to_x0(EPS, X, ab), EPS)
    for step in (dj.ddim_step, dj.ddpm_step, dj.sigma_hat_step):
        got = step(X, pair, ab, ab_prev, noise=NOISE)
        np.testing.assert_array_equal(got, step(X, EPS, ab, ab_prev, noise=NOISE))


def test_a_step_that_stands_still_at_pure_noise_leaves_x_unchanged():
    """A repeated index at alpha_bar = 0: there eps is x, and no noise is added."""
    assert dj.ddim_sigma(0.0, 0.0) == 0 and dj.ddim_sigma_hat(0.0, 0.0) == 0
    for eta in (0.0, 1.0):
        got = ddim_step(X, dj.Prediction(X0, X), 0.0, 0.0, eta=eta, noise=NOISE)
        np.testing.assert_array_equal(got, X)


def test_a_pair_meets_the_dtype_of_x():
    x = X.astype(jnp.bfloat16)
    for step in (dj.ddim_step, dj.ddpm_step, dj.sigma_hat_step):
        got = step(x, SPOKEN, 0.999, 0.9999, noise=NOISE)
        want = step(x.astype(jnp.float32), SPOKEN, 0.999, 0.9999, noise=NOISE)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(got), want, rtol=2**-8)  # rounded once


def test_either_half_of_a_pair_of_another_shape_is_refused():
    for step in (dj.ddim_step, dj.ddpm_step, dj.sigma_hat_step):
        for name, pair in [("x0", (X0[0], EPS)), ("eps", (X0, EPS[0]))]:
            shapes = r"must have the data's shape \(2, 4, 4, 3\); got \(4, 4, 3\)"
            with refused(rf"eps.{name} {shapes}"):
                step(X, dj.Prediction(*pair), 0.5, 0.6, noise=NOISE)


# ---------------------------------------------------------------------- shapes, dtypes, grad

STEPS = {
    "ddim": lambda x, e, a, p, z: dj.ddim_step(x, e, a, p, eta=0.5, noise=z),
    "clip_data": lambda x, e, a, p, z: clip_data_step(x, e, a, p, eta=0.5, noise=z),
    "ddpm": lambda x, e, a, p, z: dj.ddpm_step(x, e, a, p, noise=z),
    "ddpm_large": lambda x, e, a, p, z: dj.ddpm_step(x, e, a, p, noise=z, variance="fixed_large"),
    "sigma_hat": lambda x, e, a, p, z: dj.sigma_hat_step(x, e, a, p, noise=z),
}
by_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@by_step
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 3, 1), (2, 1, 4, 4, 3)])
def test_any_shape_and_dtype_comes_back(step, shape):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones(shape, dtype)
        noise = jnp.ones(shape)  # float32, as draw_noise gives it
        got = jax.eval_shape(step, x, x, 0.5, 0.6, noise)
        assert got.shape == shape and got.dtype == dtype


def test_bfloat16_data_meets_float32_levels():
    """Both levels are 1 in bfloat16: there the step would divide 0 by 0 or stand still."""
    x, eps, noise = (a.astype(jnp.bfloat16) for a in (X, EPS, NOISE))
    got = dj.ddim_step(x, eps, 0.999, 0.9999, eta=1.0, noise=noise)
    x, eps, noise = (np.float64(a) for a in (x, eps, noise))
    want = reference.ddim_step(x, eps, 0.999, 0.9999, 1.0, noise)
    np.testing.assert_allclose(np.float64(got), want, rtol=2**-8, atol=1e-5)  # rounded once


@by_step
def test_gradients_are_finite_at_both_ends(step):
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradient(x, eps, ab, ab_prev):
        return step(x, eps, ab, ab_prev, NOISE[0, 0, 0]).sum()

    for t, t_prev in TRANSITIONS:
        grads = gradient(X[0, 0, 0], EPS[0, 0, 0], *levels(t, t_prev))
        assert all(np.isfinite(g).all() for g in grads), (t, t_prev)


def test_gradient_in_eta_is_that_of_eq_12():
    ab, ab_prev, eta, h = 0.2, 0.5, 0.6, 1e-5
    x, eps, z = 0.3, -0.7, 1.1

    def by_hand(eta):
        return reference.ddim_step(x, eps, ab, ab_prev, eta, z)

    def ours(eta):
        return dj.ddim_step(*jnp.float32([x, eps]), ab, ab_prev, eta=eta, noise=jnp.float32(z))

    want = (by_hand(eta + h) - by_hand(eta - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(eta), want, rtol=1e-4)
    at_end = jax.grad(lambda eta: dj.ddim_step(X, EPS, ab, 1.0, eta=eta, noise=NOISE).sum())(0.5)
    assert at_end == 0


def test_encoding_has_finite_gradients_at_clean_data():
    grad = jax.grad(lambda x: dj.ddim_step(x, 2 * x, 1.0, 0.7).sum())(X)
    np.testing.assert_allclose(grad, np.sqrt(0.7) + 2 * np.sqrt(0.3), rtol=1e-5)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("eta", [-0.1, float("nan"), jnp.array([0.5, -0.5])])
def test_negative_eta_is_refused(eta):
    for step in (dj.ddim_step, clip_data_step):
        with refused(r"eta must be at least 0 \(0 is DDIM, 1 is DDPM\); got"):
            step(X, EPS, 0.5, 0.6, eta=eta, noise=NOISE)
    with refused(r"eta must be at least 0"):
        dj.ddim_sigma(0.5, 0.6, eta)


def test_eta_without_noise_is_refused_even_when_traced():
    for step in (dj.ddim_step, clip_data_step):
        with refused(r"noise must be given when eta is not 0; got eta=0.5 and noise=None"):
            step(X, EPS, 0.5, 0.6, eta=0.5)
        with refused(r"noise must be given when eta is not 0"):
            jax.jit(lambda eta, step=step: step(X, EPS, 0.5, 0.6, eta=eta))(0.0)
        with refused(r"noise must be given when eta is not 0"):
            step(X, EPS, 0.5, 0.6, eta=jnp.array([0.0, 1.0]))


@by_step
def test_shapes_that_do_not_match_are_refused_by_name(step):
    with refused(r"eps(_fn)? must .* shape \(2, 4, 4, 3\); got \(4, 4, 3\)"):
        step(X, EPS[0], 0.5, 0.6, NOISE)
    with refused(r"noise must have the data's shape \(2, 4, 4, 3\); got \(1, 4, 4, 3\)"):
        step(X, EPS, 0.5, 0.6, NOISE[:1])
    with refused(r"level .* got level shape \(3,\) with data shape \(2, 4, 4, 3\)"):
        step(X, EPS, jnp.full(3, 0.5), 0.6, NOISE)
    with refused(r"level .* got level shape \(3,\) with data shape \(2, 4, 4, 3\)"):
        step(X, EPS, 0.5, jnp.full(3, 0.6), NOISE)
    with refused(r"x(_t)? must be floating point"):
        step(jnp.zeros(3, jnp.uint8), jnp.zeros(3), 0.5, 0.6, jnp.zeros(3))


def test_an_eta_of_another_shape_is_refused():
    with refused(r"level \(alpha_bar, t, eta\) must .* got level shape \(3,\)"):
        dj.ddim_step(X, EPS, 0.5, 0.6, eta=jnp.full(3, 0.5), noise=NOISE)


def test_unknown_variance_is_refused_with_the_valid_names():
    with refused(r"variance must be one of fixed_small, fixed_large; got 'learned'"):
        dj.ddpm_step(X, EPS, 0.5, 0.6, noise=NOISE, variance="learned")


def test_is_zero_knows_what_it_knows():
    assert is_zero(0.0) and is_zero(jnp.zeros(3))
    assert not is_zero(0.1) and not is_zero(jnp.array([0.0, 1.0]))
    seen = []
    jax.jit(lambda eta: seen.append(is_zero(eta)))(0.0)
    assert seen == [False]
