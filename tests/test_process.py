"""The forward side: eq. 4, and the joint family q_sigma by its marginals and by Bayes' rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

import ddim_jax as dj

SCHEDULE = dj.linear_schedule()
TABLE = np.float64(SCHEDULE.alphas_cumprod)
RNG = np.random.default_rng(0)
X0, EPS = jnp.asarray(RNG.normal(size=(2, 3, 4, 4, 2)), jnp.float32)

posterior_mean = jax.jit(dj.posterior_mean)
ddpm_posterior = jax.jit(dj.ddpm_posterior)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_add_noise_is_eq_4(t):
    got = jax.jit(dj.add_noise)(SCHEDULE, X0, EPS, t)
    np.testing.assert_allclose(got, reference.add_noise(X0, EPS, TABLE[t]), atol=1e-6)


def test_add_noise_with_an_index_for_each_example():
    t = jnp.array([3, 999, 0])
    got = jax.jit(dj.add_noise)(SCHEDULE, X0, EPS, t)
    want = [reference.add_noise(X0[i], EPS[i], TABLE[t[i]]) for i in range(3)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(dj.add_noise, in_axes=(None, 0, 0, 0))(SCHEDULE, X0, EPS, t), want, atol=1e-6
    )


def test_add_noise_at_clean_data_and_outside_the_schedule():
    np.testing.assert_array_equal(dj.add_noise(SCHEDULE, X0, EPS, -1), X0)
    for t in (1000, -2):
        assert np.isnan(dj.add_noise(SCHEDULE, X0, EPS, t)).all()
    got = dj.add_noise(SCHEDULE, X0, EPS, jnp.array([5, 1000, 7]))
    assert np.isnan(got).all(axis=(1, 2, 3)).tolist() == [False, True, False]


def test_pure_noise_holds_nothing_of_the_data():
    """alpha_bar = 0: x_t is the noise, and the posterior is the marginal of x_prev given x0."""
    schedule = dj.zero_terminal_snr(SCHEDULE)
    np.testing.assert_array_equal(dj.add_noise(schedule, X0, EPS, 999), EPS)
    ab_prev, sigma = 0.3, 0.5
    mean, variance = ddpm_posterior(X0, EPS, 0.0, ab_prev)
    np.testing.assert_allclose(mean, np.sqrt(ab_prev) * np.float64(X0), atol=1e-6)
    np.testing.assert_allclose(variance, 1 - ab_prev, rtol=1e-6)
    want = np.sqrt(ab_prev) * np.float64(X0) + np.sqrt(1 - ab_prev - sigma**2) * EPS
    np.testing.assert_allclose(posterior_mean(X0, EPS, 0.0, ab_prev, sigma), want, atol=1e-6)


def test_add_noise_keeps_the_variance_of_normal_data():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 100_000))
    for t in (0, 300, 999):
        x_t = dj.add_noise(SCHEDULE, x0, eps, t)
        assert abs(x_t.var() - 1) < 4 * np.sqrt(2 / x0.size)


def test_add_noise_keeps_the_dtype_with_float32_levels():
    x0, eps = X0.astype(jnp.bfloat16), EPS.astype(jnp.bfloat16)
    got = dj.add_noise(SCHEDULE, x0, eps, 0)
    assert got.dtype == jnp.bfloat16
    # A bfloat16 level would be 1 here, and the noise, of standard deviation 0.01, gone.
    noise = np.float64(got) - np.sqrt(TABLE[0]) * np.float64(x0)
    small = np.abs(np.float64(x0)) < 0.5
    assert np.corrcoef(noise[small], np.float64(eps)[small])[0, 1] > 0.99


def test_add_noise_is_differentiable_everywhere_it_is_defined():
    def total(x0, eps, t):
        return dj.add_noise(SCHEDULE, x0, eps, t).sum()

    for t, want in [(0, (TABLE[0] ** 0.5, (1 - TABLE[0]) ** 0.5)), (-1, (1.0, 0.0))]:
        grads = jax.grad(total, argnums=(0, 1))(X0[0, 0, 0], EPS[0, 0, 0], t)
        for grad, number in zip(grads, want, strict=True):
            np.testing.assert_allclose(grad, number, rtol=1e-4)


# -------------------------------------------------------------------------- the joint family


@given(t=st.integers(0, 999), gap=st.integers(1, 999), fraction=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_every_sigma_keeps_the_marginal(t, gap, fraction):
    """Eq. 7 composed with q(x_t | x0) is q(x_prev | x0): its mean and its variance."""
    ab, ab_prev = reference.level(TABLE, t), reference.level(TABLE, max(t - gap, -1))
    sigma = fraction * np.sqrt(1 - ab_prev)

    def mean(x0, x_t):
        return float(posterior_mean(jnp.float32(x0), jnp.float32(x_t), ab, ab_prev, sigma))

    per_x0, per_x_t = mean(1, 0), mean(0, 1)  # the mean is linear in both
    np.testing.assert_allclose(per_x0 + per_x_t * np.sqrt(ab), np.sqrt(ab_prev), atol=1e-5)
    np.testing.assert_allclose(per_x_t**2 * (1 - ab) + sigma**2, 1 - ab_prev, atol=1e-5)


def test_composed_samples_have_the_marginal():
    n, ab, ab_prev, sigma = 200_000, 0.3, 0.6, 0.4
    eps, z = jax.random.normal(jax.random.key(1), (2, n))
    x0 = jnp.full(n, 0.7)
    x_t = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * eps
    x_prev = posterior_mean(x0, x_t, ab, ab_prev, sigma) + sigma * z
    variance = 1 - ab_prev
    assert abs(x_prev.mean() - 0.7 * np.sqrt(ab_prev)) < 4 * np.sqrt(variance / n)
    assert abs(x_prev.var() - variance) < 4 * variance * np.sqrt(2 / n)


@given(t=st.integers(1, 999), gap=st.integers(1, 999), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_ddpm_posterior_is_bayes_rule(t, gap, seed):
    ab, ab_prev = TABLE[t], TABLE[max(t - gap, 0)]
    x0, x_t = np.random.default_rng(seed).normal(size=(2, 20)).astype(np.float32)
    mean, variance = ddpm_posterior(x0, x_t, ab, ab_prev)
    want_mean, want_variance = reference.ddpm_posterior(x0, x_t, ab, ab_prev)
    # 1 - alpha_bar carries the rounding of a float32 near 1, 6e-8 over at least 1e-4.
    np.testing.assert_allclose(mean, want_mean, atol=4e-3 if ab > 0.99 else 2e-4)
    np.testing.assert_allclose(variance, want_variance, rtol=4e-3 if ab > 0.99 else 2e-4)


def test_ddpm_posterior_is_the_member_with_its_own_variance():
    for ab, ab_prev in [(0.1, 0.3), (0.5, 0.9), (1e-4, 2e-4)]:
        mean, variance = ddpm_posterior(X0, EPS, ab, ab_prev)
        again = posterior_mean(X0, EPS, ab, ab_prev, jnp.sqrt(variance))
        np.testing.assert_allclose(again, mean, atol=2e-6)


def test_the_last_posterior_is_the_data():
    mean, variance = ddpm_posterior(X0, EPS, TABLE[0], 1.0)
    np.testing.assert_allclose(mean, X0, rtol=1e-6)
    assert variance == 0
    np.testing.assert_allclose(posterior_mean(X0, EPS, TABLE[0], 1.0, 0.0), X0, rtol=1e-6)


def test_posteriors_take_a_level_for_each_example():
    ab, ab_prev = jnp.array([0.1, 0.5, 0.9]), jnp.array([0.2, 0.9, 1.0])
    mean, variance = ddpm_posterior(X0, EPS, ab, ab_prev)
    assert mean.shape == X0.shape and variance.shape == (3,)
    for i in range(3):
        want, want_variance = ddpm_posterior(X0[i], EPS[i], ab[i], ab_prev[i])
        np.testing.assert_allclose(mean[i], want, rtol=1e-5)
        np.testing.assert_allclose(variance[i], want_variance, rtol=1e-6)
    shared = posterior_mean(X0, EPS, 0.1, ab_prev, jnp.zeros(3))  # levels of unlike shapes mix
    np.testing.assert_allclose(shared[2], posterior_mean(X0[2], EPS[2], 0.1, 1.0, 0.0), rtol=1e-5)


def test_posteriors_keep_the_dtype():
    x = jnp.ones((2, 3), jnp.bfloat16)
    mean, variance = dj.ddpm_posterior(x, x, 0.5, 0.6)
    assert mean.dtype == jnp.bfloat16 and variance.dtype == jnp.float32
    assert dj.posterior_mean(x, x, 0.5, 0.6, 0.1).dtype == jnp.bfloat16


def test_a_sigma_that_no_process_has_gives_nan():
    assert np.isnan(dj.posterior_mean(X0, EPS, 0.3, 0.6, 0.64)).all()
    assert np.isfinite(dj.posterior_mean(X0, EPS, 0.3, 0.6, 0.63)).all()


# ----------------------------------------------------------------------------------- refusals


def test_bad_input_is_refused_by_name():
    with refused(r"eps must have the data's shape \(3, 4, 4, 2\); got \(4, 4, 2\)"):
        dj.add_noise(SCHEDULE, X0, EPS[0], 5)
    with refused(r"level \(alpha_bar, t, eta\) must .* got level shape \(4,\)"):
        dj.add_noise(SCHEDULE, X0, EPS, jnp.arange(4))
    with refused(r"t must be integer indices .* float32"):
        dj.add_noise(SCHEDULE, X0, EPS, jnp.ones(3))
    with refused(r"x0 must be floating point, data in \[-1, 1\]; got dtype uint8"):
        dj.add_noise(SCHEDULE, jnp.zeros(3, jnp.uint8), jnp.zeros(3), 5)
    with refused(r"x0 must have the data's shape"):
        dj.posterior_mean(X0[:1], EPS, 0.3, 0.6, 0.1)
    with refused(r"x0 must have the data's shape"):
        dj.ddpm_posterior(X0[:1], EPS, 0.3, 0.6)
