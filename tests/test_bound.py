"""The variational bound against another project's numbers, closed forms and theorem 1."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from counting import visited
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from scipy.stats import norm

import ddim_jax as dj
from ddim_jax.bound import (
    bound_term,
    discretized_log_likelihood,
    fixed_large_sigmas,
    gaussian_kl,
    prior_bpd,
    process_sigmas,
    variational_bound,
    variational_weights,
)

SCHEDULE = dj.linear_schedule()
TABLE = reference.cumulative_levels(reference.linear_betas())
ALL = np.arange(1000)[::-1].astype(np.int32)
GREY_LEVELS = np.arange(256) / 127.5 - 1


def golden_eps(x, t, schedule=SCHEDULE):
    """The network of the golden files."""
    return jnp.sqrt(schedule.noise_variance(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


def images(seed, shape):
    """8-bit images in [-1, 1]."""
    return jnp.asarray(np.random.default_rng(seed).choice(GREY_LEVELS, shape), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_same_terms_as_improved_diffusion(golden, dtype):
    arrays = golden("variational_bound.npz")
    noise = np.random.default_rng(int(arrays["noise_seed"])).standard_normal(
        (1000, *arrays["x0"].shape), dtype=np.float32
    )
    with jax.enable_x64(dtype == jnp.float64):
        schedule = dj.Schedule(jnp.asarray(TABLE, dtype), jnp.asarray(1 - TABLE, dtype))
        x0 = jnp.asarray(arrays["x0"], dtype)
        sigma = process_sigmas(schedule, ALL)

        def term(inputs):
            noise, t, t_prev, sigma = inputs
            eps_fn = functools.partial(golden_eps, schedule=schedule)
            return bound_term(eps_fn, schedule, x0, noise, t, t_prev, sigma, sigma)

        t = jnp.asarray(ALL)
        steps = jax.lax.map(term, (jnp.asarray(noise, dtype), t, t - 1, sigma))
        prior = np.asarray(prior_bpd(schedule, x0, 999))
        steps = np.asarray(steps)
    np.testing.assert_allclose(steps.T, arrays["vb"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(prior, arrays["prior_bpd"], rtol=1e-4)
    np.testing.assert_allclose(steps.sum(0) + prior, arrays["total_bpd"], atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------- the pieces


@given(
    mean=st.floats(-2, 2), std=st.floats(0.01, 2), other=st.floats(-2, 2), wide=st.floats(0.01, 2)
)
@settings(max_examples=50, deadline=None)
def test_gaussian_kl_is_the_textbooks(mean, std, other, wide):
    want = math.log(wide / std) + (std**2 + (mean - other) ** 2) / (2 * wide**2) - 0.5
    got = gaussian_kl(jnp.asarray(mean), std, jnp.asarray(other), wide)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert got >= 0


@pytest.mark.parametrize("std", [0.002, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("mean", [-1.3, -0.5, 0.123, 1.0])
def test_decoder_is_a_distribution_near_the_gaussians(mean, std):
    levels = jnp.asarray(GREY_LEVELS, jnp.float32)
    p = np.exp(discretized_log_likelihood(levels, jnp.full_like(levels, mean), std))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-4)
    edges = np.array([-np.inf, *(GREY_LEVELS[:-1] + 1 / 255), np.inf])
    np.testing.assert_allclose(p, np.diff(norm.cdf(edges, mean, std)), atol=6e-4)


def test_decoder_stays_finite_far_from_the_data():
    x0 = jnp.asarray([-1.0, 1 / 255, 1.0])
    log_p = discretized_log_likelihood(x0, -4 * jnp.sign(x0), 0.01)
    assert np.isfinite(log_p).all() and (log_p < -1000).all()
    slope = jax.grad(lambda m: discretized_log_likelihood(x0, m, 0.01).sum())(-4 * jnp.sign(x0))
    assert np.isfinite(slope).all() and (jnp.sign(slope) == jnp.sign(x0)).all()


@pytest.mark.parametrize("t", [3, 400, 999])
def test_prior_is_the_kl_to_the_start(t):
    x0, ab = np.asarray(images(0, (2, 4, 4, 1)), np.float64), TABLE[t]
    nats = (ab * x0**2 + (1 - ab) - 1 - np.log1p(-ab)) / 2
    got = prior_bpd(SCHEDULE, jnp.asarray(x0, jnp.float32), t)
    np.testing.assert_allclose(got, nats.mean((1, 2, 3)) / np.log(2), rtol=1e-4)


@pytest.mark.parametrize("timesteps", [ALL, dj.ddim_timesteps(1000, 20), np.array([900, 3])])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_process_sigmas_are_eq_16s_and_the_decoder_copies(timesteps, eta):
    got = process_sigmas(SCHEDULE, timesteps, eta)
    want = [
        reference.ddim_sigma(TABLE[t], TABLE[t_prev], eta)
        for t, t_prev in reference.transitions(timesteps)[:-1]
    ]
    np.testing.assert_allclose(got, [*want, want[-1]], rtol=1e-5)


def test_fixed_large_is_beta():
    betas = np.asarray(reference.linear_betas())[::-1]
    got = np.asarray(fixed_large_sigmas(SCHEDULE, ALL)) ** 2
    np.testing.assert_allclose(got[:-1], betas[:-1], rtol=2e-5)
    np.testing.assert_allclose(got[-1], process_sigmas(SCHEDULE, ALL)[-2] ** 2, rtol=1e-6)


# ----------------------------------------------------------------------------------- theorem 1


@given(t=st.integers(1, 999), gap=st.integers(1, 999), share=st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_kl_of_means_and_variances_is_the_weighted_eps_error(t, gap, share):
    """Both sides of theorem 1 for one step and any sigma; the left in float64 from eq. 7."""
    t_prev = max(t - gap, 0)
    ab, ab_prev = TABLE[t], TABLE[t_prev]
    # share = 1 is all fresh noise, and no more of it once sigma is rounded to float32.
    sigma = np.nextafter(np.float32(share * math.sqrt(1 - ab_prev)), np.float32(0))
    x0, eps, error = np.random.default_rng(t).normal(size=(3, 10))
    x_t = reference.add_noise(x0, eps, ab)
    x0_hat = (x_t - math.sqrt(1 - ab) * (eps + error)) / math.sqrt(ab)

    def mean(x0):  # eq. 7
        direction = (x_t - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
        return math.sqrt(ab_prev) * x0 + math.sqrt(1 - ab_prev - float(sigma) ** 2) * direction

    kl = np.sum((mean(x0) - mean(x0_hat)) ** 2) / (2 * float(sigma) ** 2)
    gamma = variational_weights(SCHEDULE, np.array([t, t_prev]), jnp.full(2, sigma))[0]
    np.testing.assert_allclose(gamma * np.sum(error**2), kl, rtol=5e-4)


def test_last_weight_is_a_gaussian_decoders():
    x0, error = np.random.default_rng(0).normal(size=(2, 10))
    ab, std = TABLE[7], 0.05
    x0_hat = x0 - math.sqrt((1 - ab) / ab) * error
    log_p = norm.logpdf(x0, x0_hat, std).sum() - norm.logpdf(x0, x0, std).sum()
    gamma = variational_weights(SCHEDULE, np.array([500, 7]), jnp.asarray([0.1, std]))[-1]
    np.testing.assert_allclose(gamma * np.sum(error**2), -log_p, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_bound_and_weighted_loss_differ_by_a_constant(eta):
    """Theorem 1 through the library: two networks' bounds differ as their weighted losses do."""
    timesteps, x0 = dj.ddim_timesteps(1000, 20), images(0, (2, 4, 4, 1))
    sigma = process_sigmas(SCHEDULE, timesteps, eta)
    noise = jax.random.normal(jax.random.key(0), (20, *x0.shape))

    def steps_and_errors(eps_fn):
        def one(inputs):
            noise, t, t_prev, sigma = inputs
            x_t = dj.add_noise(SCHEDULE, x0, noise, t)
            term = bound_term(eps_fn, SCHEDULE, x0, noise, t, t_prev, sigma, sigma)
            return term, jnp.sum((noise - eps_fn(x_t, t)) ** 2, (1, 2, 3))

        steps = noise[:-1], timesteps[:-1], timesteps[1:], sigma[:-1]
        return jax.lax.map(one, steps)

    (J_1, errors_1), (J_2, errors_2) = map(steps_and_errors, [golden_eps, lambda x, t: 0.7 * x])
    gamma = variational_weights(SCHEDULE, timesteps, sigma)[:-1, None]
    assert np.all(np.abs(J_1 - J_2).sum(0) > 0.1)
    want = (gamma * (errors_1 - errors_2)).sum(0) / (16 * np.log(2))
    np.testing.assert_allclose((J_1 - J_2).sum(0), want, rtol=1e-3)


# ------------------------------------------------------------------------------------ the whole


def gaussian_eps(std):
    """E[eps | x_t] for data N(0, std^2)."""

    def eps_fn(x, t):
        ab = SCHEDULE.alpha_bar(t)
        return jnp.sqrt(1 - ab) * x / (ab * std**2 + 1 - ab)

    return eps_fn


@pytest.mark.parametrize(
    "eta, timesteps, fixed_large",
    [
        (1.0, dj.ddim_timesteps(1000, 10), False),
        (0.4, np.array([999, 600, 200]), False),
        (1.0, np.array([999, 600, 200]), True),
    ],
)
def test_expected_terms_of_gaussian_data(eta, timesteps, fixed_large):
    """With the optimal network, E||x0 - x0_hat||^2 is the variance of x0 given x_t."""
    std = 0.4
    x0 = std * jax.random.normal(jax.random.key(0), (4, 100, 100))
    sigma = process_sigmas(SCHEDULE, timesteps, eta)
    model_sigma = fixed_large_sigmas(SCHEDULE, timesteps) if fixed_large else None
    terms = variational_bound(
        jax.random.key(1), gaussian_eps(std), SCHEDULE, x0, timesteps, sigma, model_sigma
    )
    want = []
    for t, t_prev in reference.transitions(timesteps)[:-1]:
        ab, ab_prev = TABLE[t], TABLE[t_prev]
        var = reference.ddim_sigma(ab, ab_prev, eta) ** 2
        model_var = 1 - ab / ab_prev if fixed_large else var
        c = math.sqrt(ab_prev) - math.sqrt((1 - ab_prev - var) * ab / (1 - ab))
        mean_var = std**2 * (1 - ab) / (ab * std**2 + 1 - ab)
        nats = (var + c**2 * mean_var) / model_var - 1 + math.log(model_var / var)
        want.append(nats / 2 / math.log(2))
    # 40 000 pixels: a mean of squares to 0.7 % (one standard deviation).
    np.testing.assert_allclose(terms.steps.mean(1), want, rtol=0.03)
    np.testing.assert_allclose(
        terms.total, terms.prior + terms.steps.sum(0) + terms.decoder, rtol=1e-6
    )


def test_never_below_the_entropy_and_near_it_in_all_steps():
    """Two equally likely images of 4 pixels: 1 bit, 0.25 bits per dimension, is the best code.

    The decoder adds what it spreads over grey levels beside the right one, +-1, where half a
    Gaussian of its std fits the bin's half-width inwards.
    """
    both = jnp.asarray([[1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, -1.0]])

    def eps_fn(x, t):
        ab = SCHEDULE.alpha_bar(t)
        distance = jnp.sum((x[:, None] - jnp.sqrt(ab) * both) ** 2, -1)
        x0 = jax.nn.softmax(-distance / (2 * (1 - ab)), -1) @ both
        return dj.x0_to_epsilon(x0, x, ab)

    @functools.partial(jax.jit, static_argnums=0)
    def terms(num_steps):
        timesteps, x0 = dj.ddim_timesteps(1000, num_steps), jnp.tile(both, (500, 1))
        sigma = process_sigmas(SCHEDULE, timesteps)
        return variational_bound(jax.random.key(0), eps_fn, SCHEDULE, x0, timesteps, sigma)

    few, more, every = (float(terms(n).total.mean()) for n in (10, 50, 1000))
    assert 0.25 < every < more < few
    decoder = -np.log2(norm.cdf(1 / 255, scale=process_sigmas(SCHEDULE, ALL)[-1]))
    np.testing.assert_allclose(every, 0.25 + decoder, atol=0.01)


@pytest.mark.parametrize("network", [golden_eps, gaussian_eps(0.4)], ids=["golden", "optimal"])
@pytest.mark.parametrize("target", ["v", "x0"])
def test_a_network_that_predicts_something_else_has_the_same_terms(target, network):
    """At every index, from either half of its pair."""
    x0, sigma = images(0, (2, 4, 4, 1)), process_sigmas(SCHEDULE, ALL)
    convert = getattr(dj, f"epsilon_to_{target}")
    wrap = getattr(dj, f"from_{target}")
    denoiser = wrap(lambda x, t: convert(network(x, t), x, SCHEDULE.alpha_bar(t)), SCHEDULE)

    @functools.partial(jax.jit, static_argnums=0)
    def terms(network):
        return variational_bound(jax.random.key(0), network, SCHEDULE, x0, ALL, sigma)

    got, want = terms(denoiser), terms(network)
    np.testing.assert_allclose(got.steps, want.steps, rtol=1e-4)
    np.testing.assert_allclose(got.decoder, want.decoder, rtol=1e-4)
    np.testing.assert_array_equal(got.prior, want.prior)


def test_keys_per_image_make_the_batch_irrelevant():
    x0, timesteps = images(0, (3, 4, 4, 1)), dj.ddim_timesteps(1000, 5)
    keys, sigma = (
        dj.image_keys(jax.random.key(0), jnp.arange(3)),
        process_sigmas(SCHEDULE, timesteps),
    )

    @jax.jit
    def total(keys, x0):
        return variational_bound(keys, golden_eps, SCHEDULE, x0, timesteps, sigma).total

    alone = [total(keys[i : i + 1], x0[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(total(keys, x0), alone, rtol=1e-5)
    assert len(np.unique(total(keys, jnp.tile(x0[:1], (3, 1, 1, 1))))) == 3


def test_network_calls_and_gradient():
    """S calls, at the timesteps; and the bound trains a network."""
    timesteps = dj.ddim_timesteps(1000, 6)
    sigma, x0 = process_sigmas(SCHEDULE, timesteps), images(0, (2, 3))

    def bound(eps_fn):
        return variational_bound(jax.random.key(0), eps_fn, SCHEDULE, x0, timesteps, sigma)

    assert visited(bound, golden_eps) == timesteps.tolist()
    total = jax.jit(lambda scale: bound(lambda x, t: scale * golden_eps(x, t)).total.sum())
    quotient = (total(1.01) - total(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(total)(1.0), quotient, rtol=1e-2)


def test_sigmas_may_be_traced_and_too_large_ones_give_nan():
    timesteps, x0 = np.array([500, 100, 0]), images(0, (2, 3))

    @jax.jit
    def steps(eta):
        sigma = process_sigmas(SCHEDULE, timesteps, eta)
        return variational_bound(
            jax.random.key(0), golden_eps, SCHEDULE, x0, timesteps, sigma
        ).steps

    assert np.isfinite(steps(0.5)).all()
    assert np.isnan(steps(50.0)).all()


def test_refusals():
    x0, key = images(0, (2, 3)), jax.random.key(0)
    timesteps = np.array([500, 100, 0])
    sigma = process_sigmas(SCHEDULE, timesteps)

    def bound(x0=x0, timesteps=timesteps, sigma=sigma, eps_fn=golden_eps, **model):
        return variational_bound(key, eps_fn, SCHEDULE, x0, timesteps, sigma, **model)

    with refused("eta must be positive; got 0.0. The bound of a deterministic process is infinite"):
        process_sigmas(SCHEDULE, timesteps, 0.0)
    with refused("eta must be at least 0"):
        process_sigmas(SCHEDULE, timesteps, -1.0)
    with refused("timesteps must be at least two"):
        process_sigmas(SCHEDULE, [0])
    with refused("timesteps must descend strictly"):
        process_sigmas(SCHEDULE, [5, 0, 0])
    with refused("timesteps must descend strictly"):
        bound(timesteps=np.array([5, 0, 0]))
    with refused(r"sigma must have one std for each timestep, shape \(3,\); got \(2,\)"):
        bound(sigma=sigma[:2])
    with refused("sigma must be positive; got a smallest value of 0.0"):
        bound(sigma=sigma.at[-1].set(0.0))
    with refused("model_sigma must be positive"):
        bound(model_sigma=-sigma)
    with refused("x0 must be floating point"):
        bound(x0=jnp.zeros((2, 3), jnp.uint8))
    with refused("eps_fn must return an array of x's shape"):
        bound(eps_fn=lambda x, t: x[:1])
    with refused("key must be a PRNG key"):
        variational_bound(0, golden_eps, SCHEDULE, x0, timesteps, sigma)
