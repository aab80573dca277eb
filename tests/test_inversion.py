"""Encoding: plain DDIM inversion against its closed form, the implicit one against exactness."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from counting import visited
from refusals import refused

import ddim_jax as dj
from ddim_jax.inversion import encode_fixed_point

SCHEDULE = dj.linear_schedule()
TABLE = np.asarray(SCHEDULE.alphas_cumprod, np.float64)
SPACINGS = pytest.mark.parametrize("spacing", ["uniform", "quadratic"])


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def golden_eps(x, t):
    """The network of the golden files."""
    return jnp.sqrt(1 - SCHEDULE.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


def mixture_eps(means, std):
    """E[eps | x_t] for data from equally likely N(means[k], std^2 I), means (K, ...)."""

    def eps_fn(x, t):
        ab = SCHEDULE.alpha_bar(t)
        var = ab * std**2 + 1 - ab
        difference = x[:, None] - jnp.sqrt(ab) * means
        distance = jnp.sum(difference**2, axis=range(2, difference.ndim))
        weights = jax.nn.softmax(-distance / (2 * var), axis=1)
        x0 = jnp.einsum("bk,k...->b...", weights, means)
        return jnp.sqrt(1 - ab) * (x - jnp.sqrt(ab) * x0) / var

    return eps_fn


RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(-1, 1, (20, 6, 6, 1)), jnp.float32)
NETWORKS = {
    # network, data it believes in
    "golden": (golden_eps, IMAGES[:4]),
    "gaussian": (mixture_eps(jnp.zeros((1, 5)), 0.5), 0.5 * normal(1, (20, 5))),
    "mixture": (mixture_eps(IMAGES, 0.1), IMAGES[:4] + 0.1 * normal(2, (4, 6, 6, 1))),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def reconstruction_error(name, timesteps, encoder):
    eps_fn, x_0 = NETWORKS[name]

    def reconstruct(x_0):
        x_T = encoder(eps_fn, SCHEDULE, x_0, timesteps)
        return dj.sample(None, eps_fn, SCHEDULE, x_T, timesteps)

    return float(jnp.abs(jax.jit(reconstruct)(x_0) - x_0).max())


@each_network
@SPACINGS
def test_reconstruction_is_exact_at_50_steps(name, spacing):
    timesteps = dj.ddim_timesteps(1000, 50, spacing)
    assert reconstruction_error(name, timesteps, encode_fixed_point) < 1e-5


@SPACINGS
@pytest.mark.parametrize("target", ["v", "x0"])
def test_reconstruction_is_exact_whatever_the_network_predicts(target, spacing):
    eps_fn, x_0 = NETWORKS["mixture"]
    convert, wrap = getattr(dj, f"epsilon_to_{target}"), getattr(dj, f"from_{target}")
    denoiser = wrap(lambda x, t: convert(eps_fn(x, t), x, SCHEDULE.alpha_bar(t)), SCHEDULE)
    timesteps = dj.ddim_timesteps(1000, 50, spacing)

    @jax.jit
    def reconstruct(x_0):
        x_T = encode_fixed_point(denoiser, SCHEDULE, x_0, timesteps)
        return dj.sample(None, denoiser, SCHEDULE, x_T, timesteps)

    np.testing.assert_allclose(reconstruct(x_0), x_0, atol=1e-5)


@pytest.mark.parametrize("target", ["v", "x0"])
def test_plain_encoding_asks_a_pair_for_its_noise_alone(target):
    """Its first state is clean data, asked at the lowest index: the pair's x0 is not of it."""
    convert, wrap = getattr(dj, f"epsilon_to_{target}"), getattr(dj, f"from_{target}")
    denoiser = wrap(lambda x, t: convert(golden_eps(x, t), x, SCHEDULE.alpha_bar(t)), SCHEDULE)
    timesteps = dj.ddim_timesteps(1000, 20, "trailing")
    want = dj.encode(golden_eps, SCHEDULE, IMAGES[:4], timesteps)
    np.testing.assert_allclose(
        dj.encode(denoiser, SCHEDULE, IMAGES[:4], timesteps), want, atol=2e-5
    )


@each_network
@SPACINGS
def test_beats_plain_inversion_at_equal_network_calls(name, spacing):
    """6 x 50 calls to encode and 50 to decode, against 175 and 175."""
    implicit = reconstruction_error(name, dj.ddim_timesteps(1000, 50, spacing), encode_fixed_point)
    plain = reconstruction_error(name, dj.ddim_timesteps(1000, 175, spacing), dj.encode)
    assert implicit < plain / 500


@SPACINGS
def test_two_iterations_solve_a_linear_network(spacing):
    """Where the plain fixed-point iteration only shrinks the error by the step's slope, below 1."""
    timesteps = dj.ddim_timesteps(1000, 50, spacing)

    def encoder(*args):
        return encode_fixed_point(*args, num_iterations=2)

    assert reconstruction_error("gaussian", timesteps, encoder) < 1e-5


def test_finds_the_latent_that_was_decoded():
    eps_fn, x_0 = NETWORKS["mixture"]
    x_T = normal(3, x_0.shape)
    timesteps = dj.ddim_timesteps(1000, 50)
    decoded = dj.sample(None, eps_fn, SCHEDULE, x_T, timesteps)
    # Decoding contracts: x_0 in float32 no longer holds all of x_T.
    np.testing.assert_allclose(
        encode_fixed_point(eps_fn, SCHEDULE, decoded, timesteps), x_T, atol=2e-4
    )


@pytest.mark.parametrize("num_iterations", [1, 2, 6])
def test_network_calls(num_iterations):
    timesteps, x_0 = dj.ddim_timesteps(1000, 8), jnp.zeros((2, 3))
    calls = visited(
        lambda f: encode_fixed_point(f, SCHEDULE, x_0, timesteps, num_iterations), golden_eps
    )
    assert calls == np.repeat(timesteps[::-1], num_iterations).tolist()


@pytest.mark.parametrize("num_iterations", [2, 6, 12])
def test_gradient_where_the_iteration_has_converged(num_iterations):
    """A network that ignores x is solved at once; x_T is then linear in its output a.

    x_bar = x / sqrt(ab) gains a ds with each step, so x_T = sqrt(ab_T) (x_0 + a s_T).
    """
    timesteps, x_0 = dj.ddim_timesteps(1000, 10), jnp.linspace(-1, 1, 12).reshape(2, 6)

    def total(a):
        return encode_fixed_point(
            lambda x, t: a * jnp.ones_like(x), SCHEDULE, x_0, timesteps, num_iterations
        ).sum()

    ab = float(SCHEDULE.alpha_bar(timesteps[0]))
    np.testing.assert_allclose(jax.grad(total)(0.3), 12 * np.sqrt(1 - ab), rtol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    eps_fn, x_0 = NETWORKS["mixture"]
    timesteps = dj.ddim_timesteps(1000, 10)
    together = encode_fixed_point(eps_fn, SCHEDULE, x_0, timesteps, 3)
    alone = [encode_fixed_point(eps_fn, SCHEDULE, x[None], timesteps, 3)[0] for x in x_0]
    np.testing.assert_allclose(together, jnp.stack(alone), atol=1e-4)


def test_repeated_indices_and_bfloat16():
    timesteps = dj.ddim_timesteps(1000, 300, "quadratic")
    assert len(np.unique(timesteps)) < 300
    assert reconstruction_error("golden", timesteps, encode_fixed_point) < 2e-5
    eps_fn, x_0 = NETWORKS["golden"]
    x_T = encode_fixed_point(eps_fn, SCHEDULE, x_0.astype(jnp.bfloat16), [900, 0])
    assert x_T.dtype == jnp.bfloat16 and jnp.isfinite(x_T).all()


# ------------------------------------------------------------------ plain inversion, in closed form


def gaussian_reconstruction(x_0, mean, std, timesteps):
    """`encode` then DDIM for data N(mean, std^2): each step maps x affinely, in float64."""
    ascending = [int(t) for t in timesteps][::-1]

    def eps(x, t):
        return reference.gaussian_eps(x[:, None], TABLE[t], np.array([mean]), [[std**2]])[:, 0]

    x = x_0
    for t, t_next in zip([-1, *ascending[:-1]], ascending, strict=True):
        ab, ab_next = reference.level(TABLE, t), TABLE[t_next]
        slope = eps(x, max(t, ascending[0]))
        x0_hat = (x - math.sqrt(1 - ab) * slope) / math.sqrt(ab)
        x = math.sqrt(ab_next) * x0_hat + math.sqrt(1 - ab_next) * slope
    for t, t_prev in reference.transitions(timesteps):
        x = reference.ddim_step(x, eps(x, t), TABLE[t], reference.level(TABLE, t_prev))
    return x


@pytest.mark.parametrize("num_sample_steps", [10, 50, 200])
@SPACINGS
def test_reconstruction_of_gaussian_data_is_its_closed_form(spacing, num_sample_steps):
    timesteps = dj.ddim_timesteps(1000, num_sample_steps, spacing)
    x_0 = 0.3 + 0.5 * np.random.default_rng(0).normal(size=50)

    def eps_fn(x, t):
        ab = SCHEDULE.alpha_bar(t)
        return jnp.sqrt(1 - ab) * (x - jnp.sqrt(ab) * 0.3) / (ab * 0.25 + 1 - ab)

    x_T = dj.encode(eps_fn, SCHEDULE, jnp.asarray(x_0, jnp.float32), timesteps)
    got = dj.sample(None, eps_fn, SCHEDULE, x_T, timesteps)
    want = gaussian_reconstruction(x_0, 0.3, 0.5, timesteps)
    assert np.abs(want - x_0).max() > 1e-3  # there is an error to predict
    np.testing.assert_allclose(got - x_0, want - x_0, atol=2e-5)


@SPACINGS
def test_plain_reconstruction_error_falls_as_in_table_2(spacing):
    """First order: the mean squared error falls about fourfold when the steps double."""
    x_0 = 0.3 + 0.5 * np.random.default_rng(0).normal(size=200)
    errors = [
        np.mean((gaussian_reconstruction(x_0, 0.3, 0.5, ts) - x_0) ** 2)
        for ts in (dj.ddim_timesteps(1000, n, spacing) for n in (25, 50, 100, 200))
    ]
    ratios = np.divide(errors[:-1], errors[1:])
    assert (ratios > 3).all() and (ratios < 5).all(), errors


def test_refusals():
    x_0 = jnp.zeros((2, 3))
    with refused("num_iterations must be at least 1; got 0"):
        encode_fixed_point(golden_eps, SCHEDULE, x_0, [5, 0], num_iterations=0)
    with refused("x_0 must be floating point"):
        encode_fixed_point(golden_eps, SCHEDULE, x_0.astype(jnp.uint8), [5, 0])
    with refused("timesteps must descend"):
        encode_fixed_point(golden_eps, SCHEDULE, x_0, [0, 5])
    with refused("eps_fn must return an array of x's shape"):
        encode_fixed_point(lambda x, t: x[:1], SCHEDULE, x_0, [5, 0])
