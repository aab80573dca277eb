"""What is known exactly without a trained network: data whose optimal eps_fn is a formula.

One image, Gaussian data and any finite set of data. Where a test says float64 it runs in JAX's, so
that the error of the method is seen and not that of the arithmetic.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import ddim_jax as dj
from ddim_jax.schedule import Spacing

SCHEDULE = dj.linear_schedule()
TABLE = np.float64(SCHEDULE.alphas_cumprod)
KEY = jax.random.key(0)
SPACINGS = Spacing.__args__


def padded(lists, length):
    """Lists of any lengths as one array: each led by repeats of its first, which leave x alone."""
    return np.stack([np.pad(ts, (length - len(ts), 0), mode="edge") for ts in lists])


# ------------------------------------------------------------------------------------ one image

IMAGE = np.linspace(-1, 1, 4, dtype=np.float32)


def knows_one_image(x, t, image=IMAGE):
    return dj.x0_to_epsilon(jnp.broadcast_to(image, x.shape), x, SCHEDULE.alpha_bar(t))


@pytest.mark.parametrize("sigma_hat", [False, True])
def test_every_grid_eta_and_number_of_steps_finds_the_one_image(sigma_hat):
    lists = [dj.ddim_timesteps(1000, S, spacing) for spacing in SPACINGS for S in range(1, 1001)]
    etas = np.resize(np.float32([0.0, 0.3, 1.0]), len(lists))
    x_T = jax.random.normal(KEY, IMAGE.shape)

    @jax.jit
    @jax.vmap
    def run(timesteps, eta):
        sampler = dj.ddim_or_sigma_hat(eta, sigma_hat)
        return dj.sample(KEY, knows_one_image, SCHEDULE, x_T, timesteps, sampler)

    found = run(padded(lists, 1000), etas)
    # A single step from t = 999 divides by sqrt(alpha_bar) = 0.006: the worst case.
    np.testing.assert_allclose(found, np.broadcast_to(IMAGE, found.shape), atol=3e-5)
    finds_it_at_once = run(np.full((1, 1), 500), np.float32([1.0]))
    np.testing.assert_allclose(finds_it_at_once[0], IMAGE, atol=2e-6)


def test_the_quickstart_of_the_readme():
    image = jnp.linspace(-1, 1, 32 * 32).reshape(32, 32)
    eps_fn = functools.partial(knows_one_image, image=image)
    x_T = jax.random.normal(jax.random.key(0), image.shape)
    x = dj.sample(jax.random.key(1), eps_fn, SCHEDULE, x_T, dj.ddim_timesteps(1000, 50))
    assert jnp.abs(x - image).max() < 1e-6


def test_every_eta_keeps_the_marginals_all_along_the_trajectory():
    """Theorem 1's family: q(x_t | x_0) is the same for each sigma, so a network that knows x_0
    must pass through N(sqrt(ab) x_0, (1 - ab) I) at every index."""
    n, image = 100_000, 0.7
    timesteps = dj.ddim_timesteps(1000, 5, "trailing")
    x_T = dj.add_noise(
        SCHEDULE, jnp.full(n, image), jax.random.normal(KEY, (n,)), int(timesteps[0])
    )
    eps_fn = functools.partial(knows_one_image, image=jnp.float32(image))

    @jax.jit
    def states(eta):
        key, sampler = jax.random.key(1), dj.ddim(eta)
        return dj.sample_trajectory(key, eps_fn, SCHEDULE, x_T, timesteps, sampler)[0]

    for eta in (0.0, 0.5, 1.0):
        for x, t in zip(np.float64(states(eta)[:-1]), timesteps, strict=True):
            ab = TABLE[t]
            assert abs(x.mean() - np.sqrt(ab) * image) < 4 * np.sqrt((1 - ab) / n)
            assert abs(x.var() / (1 - ab) - 1) < 4 * np.sqrt(2 / n)


# --------------------------------------------------------------------------------- Gaussian data

MEAN = np.array([0.3, -0.5])
COV = np.array([[0.5, 0.2], [0.2, 0.3]])


def gaussian_eps(schedule, x, t):
    ab = schedule.alpha_bar(t)
    precision = jnp.linalg.inv(ab * COV + (1 - ab) * jnp.eye(2))
    return jnp.sqrt(1 - ab) * (x - jnp.sqrt(ab) * MEAN) @ precision


def test_ddim_on_gaussian_data_has_the_exact_mean_and_covariance():
    """In float64: the output is M x_T + b, so its mean is b and its covariance M M^T."""
    lists = [dj.ddim_timesteps(1000, S, spacing) for S in (1, 4, 25, 100) for spacing in SPACINGS]
    with jax.enable_x64(True):
        schedule = dj.Schedule(jnp.asarray(TABLE))
        eps_fn = functools.partial(gaussian_eps, schedule)

        @jax.jit
        @jax.vmap
        def affine(timesteps):
            run = functools.partial(dj.sample, None, eps_fn, schedule, timesteps=timesteps)
            zero = jnp.zeros(2)
            return run(x_T=zero), jax.jacfwd(lambda x_T: run(x_T=x_T))(zero)

        b, M = (np.asarray(array) for array in affine(padded(lists, 100)))
    for i, timesteps in enumerate(lists):
        mean, cov = reference.gaussian_output(MEAN, COV, TABLE, timesteps, 0.0)
        np.testing.assert_allclose(b[i], mean, rtol=1e-9)
        np.testing.assert_allclose(M[i] @ M[i].T, cov, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("S", [3, 10])
def test_every_eta_on_gaussian_data_has_the_closed_forms_mean_and_covariance(S):
    n = 100_000
    timesteps = dj.ddim_timesteps(1000, S)
    x_T = jax.random.normal(KEY, (n, 2))
    eps_fn = functools.partial(gaussian_eps, SCHEDULE)
    run = jax.jit(
        lambda eta: dj.sample(jax.random.key(1), eps_fn, SCHEDULE, x_T, timesteps, dj.ddim(eta))
    )
    spread = []
    for eta in (0.0, 0.5, 1.0):
        x_0 = np.float64(run(eta))
        mean, cov = reference.gaussian_output(MEAN, COV, TABLE, timesteps, eta)
        variances = np.diag(cov)
        assert np.all(np.abs(x_0.mean(0) - mean) < 4 * np.sqrt(variances / n)), eta
        tolerance = 4 * np.sqrt((np.outer(variances, variances) + cov**2) / n)
        assert np.all(np.abs(np.cov(x_0.T) - cov) < tolerance), eta
        spread.append(cov[0, 0])
    # Few steps lose variance, and noise makes them lose more: the etas can be told apart.
    assert COV[0, 0] > spread[0] > spread[1] + 0.0005 > spread[2] + 0.0005


@pytest.fixture(scope="module")
def gaussian_errors():
    """Largest errors at S = 10, 20, .., 320, in float64: to the exact flow, and of a round trip."""
    steps = [10, 20, 40, 80, 160, 320]
    lists = padded([dj.ddim_timesteps(1000, S, "linspace") for S in steps], steps[-1])
    x_T = np.random.default_rng(0).normal(size=(6, 2))
    x_0 = MEAN + x_T @ np.linalg.cholesky(COV).T
    with jax.enable_x64(True):
        schedule = dj.Schedule(jnp.asarray(TABLE))
        eps_fn = functools.partial(gaussian_eps, schedule)

        @jax.jit
        @jax.vmap
        def run(timesteps):
            latent = dj.encode(eps_fn, schedule, jnp.asarray(x_0), timesteps)
            return (
                dj.sample(None, eps_fn, schedule, jnp.asarray(x_T), timesteps),
                dj.sample(None, eps_fn, schedule, latent, timesteps),
                latent,
            )

        drawn, decoded, latents = (np.asarray(array) for array in run(lists))
    exact = reference.gaussian_flow(x_T, TABLE[999], MEAN, COV)
    flowed_back = reference.gaussian_flow(latents[-1], TABLE[999], MEAN, COV)
    return {
        "steps": steps,
        "flow": np.abs(drawn - exact).max((1, 2)),
        "round trip": np.abs(decoded - x_0).max((1, 2)),
        "encoding": np.abs(flowed_back - x_0).max(),
    }


@pytest.mark.parametrize("which", ["flow", "round trip"])
def test_the_error_is_first_order_in_the_step(gaussian_errors, which):
    errors = gaussian_errors[which]
    slope, _ = np.polyfit(np.log(gaussian_errors["steps"]), np.log(errors), 1)
    assert -1.1 < slope < -0.9, (slope, errors)
    assert np.all(errors[1:] < 0.6 * errors[:-1])  # halved each time S doubles
    assert errors[-1] < 0.02


def test_encoding_finds_the_latent_of_the_exact_flow(gaussian_errors):
    assert gaussian_errors["encoding"] < 0.02


def test_latents_of_gaussian_data_are_standard_normal():
    """The exact flow maps N(mean, cov) to N(0, I); 100 encoding steps come close."""
    n = 20_000
    x_0 = MEAN + jax.random.normal(KEY, (n, 2)) @ np.linalg.cholesky(COV).T
    timesteps = dj.ddim_timesteps(1000, 100, "trailing")
    eps_fn = functools.partial(gaussian_eps, SCHEDULE)
    x_T = jax.jit(lambda x: dj.encode(eps_fn, SCHEDULE, x, timesteps))(jnp.float32(x_0))
    np.testing.assert_allclose(np.mean(x_T, 0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(x_T.T), np.eye(2), atol=0.05)


# ------------------------------------------------------------------------------ a finite data set

DATA = np.array([[-0.9, 0.1, 0.6], [0.8, 0.7, -0.2], [0.1, -0.8, 0.3], [0.5, 0.5, 0.9]])


def finite_eps(schedule, x, t):
    ab = schedule.alpha_bar(t)
    distance = jnp.sum(jnp.square(x[..., None, :] - jnp.sqrt(ab) * DATA), -1)
    x0 = jax.nn.softmax(-distance / (2 * (1 - ab)), -1) @ DATA
    return (x - jnp.sqrt(ab) * x0) / jnp.sqrt(1 - ab)


def float64_eps(x, t):
    return reference.finite_eps(x, TABLE[t], DATA)


@pytest.fixture(scope="module")
def finite_run():
    """x_T, and the states of DDIM over 20 steps, in float64."""
    timesteps = dj.ddim_timesteps(1000, 20)
    x_T = np.random.default_rng(1).normal(size=(50, 3))
    with jax.enable_x64(True):
        schedule = dj.Schedule(jnp.asarray(TABLE))
        eps_fn = functools.partial(finite_eps, schedule)
        states, _ = dj.sample_trajectory(None, eps_fn, schedule, jnp.asarray(x_T), timesteps)
    return x_T, timesteps, np.asarray(states)


def test_the_trajectory_on_a_finite_data_set(finite_run):
    x_T, timesteps, states = finite_run
    want = reference.trajectory(
        float64_eps, TABLE, x_T, timesteps, lambda i, *args: reference.ddim_step(*args)
    )
    np.testing.assert_allclose(states, want, atol=1e-9)


def test_ddim_is_eulers_method_in_the_papers_ode(finite_run):
    """Eq. 13 and 14, another formula from another part of the paper."""
    x_T, timesteps, states = finite_run
    want = reference.euler_in_s(float64_eps, TABLE, x_T, timesteps)
    np.testing.assert_allclose(states[-1], want, atol=1e-8)


@functools.partial(jax.jit, static_argnums=0)
def draw_from_data(S, eta):
    """500 images from the same x_T, and the data each is nearest to."""
    x_T = jax.random.normal(KEY, (500, 3))
    eps_fn = functools.partial(finite_eps, SCHEDULE)
    timesteps = dj.ddim_timesteps(1000, S, "linspace")
    x_0 = dj.sample(jax.random.key(S), eps_fn, SCHEDULE, x_T, timesteps, dj.ddim(eta))
    distance = jnp.linalg.norm(x_0[:, None] - DATA, axis=-1)
    return distance.min(-1), distance.argmin(-1)


def test_samples_are_the_data_each_as_often():
    for eta in (0.0, 1.0):
        distance, nearest = draw_from_data(200, eta)
        assert np.quantile(distance, 0.98) < 0.02
        counts = np.bincount(nearest, minlength=4)
        assert np.all(np.abs(counts - 125) < 4 * math.sqrt(500 * 0.25 * 0.75)), counts


def test_the_same_latent_means_the_same_image_whatever_the_number_of_steps():
    """Figure 5: DDIM is consistent in S, DDPM is not."""
    agree = {
        eta: np.mean(draw_from_data(40, eta)[1] == draw_from_data(200, eta)[1])
        for eta in (0.0, 1.0)
    }
    assert agree[0.0] > 0.95 and agree[1.0] < 0.6
