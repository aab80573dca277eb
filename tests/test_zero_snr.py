"""Schedules that end in pure noise, alpha_bar = 0: networks that predict v or x0 work there."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import ddim_jax as dj

SCHEDULE = dj.zero_terminal_snr(dj.linear_schedule())
TABLE = np.float64(SCHEDULE.alphas_cumprod)
KEY = jax.random.key(0)
DEFINED = [name for name in dj.SAMPLERS if name != "probability_flow_euler"]
SPACINGS = ["trailing", "linspace"]  # those whose first index is the last of the schedule
every_sampler = pytest.mark.parametrize("name", DEFINED)
by_spacing = pytest.mark.parametrize("spacing", SPACINGS)
by_prediction = pytest.mark.parametrize("predicts", ["v", "x0"])

IMAGE = jnp.linspace(-0.9, 0.9, 6).reshape(2, 3)


def knows_one_image(predicts):
    """The denoiser of a network that has learned one image by heart."""

    def network(x, t):
        ab, image = SCHEDULE.alpha_bar(t), jnp.broadcast_to(IMAGE, x.shape)
        right = dj.PARAMETRIZATIONS[predicts].target
        return right(image, dj.x0_to_epsilon(image, x, ab), ab)

    return dj.PARAMETRIZATIONS[predicts].denoiser(network, SCHEDULE)


ONE_IMAGE = {predicts: knows_one_image(predicts) for predicts in ("v", "x0")}


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(name, denoiser, x_T, timesteps):
    return dj.sample_trajectory(KEY, denoiser, SCHEDULE, x_T, timesteps, dj.SAMPLERS[name]())


@every_sampler
@by_prediction
def test_every_sampler_finds_the_one_image_from_pure_noise(name, predicts):
    x_T = jax.random.normal(KEY, (4, 2, 3))
    for S in (1, 2, 12):
        for spacing in SPACINGS:
            timesteps = SCHEDULE.timesteps(S, spacing)
            if S > 1 or spacing == "trailing":
                assert SCHEDULE.alpha_bar(int(timesteps[0])) == 0
            states, x0s = draw(name, ONE_IMAGE[predicts], x_T, timesteps)
            assert np.isfinite(states).all() and np.isfinite(x0s).all()
            np.testing.assert_allclose(states[-1], np.broadcast_to(IMAGE, x_T.shape), atol=1e-5)
            np.testing.assert_allclose(x0s, np.broadcast_to(IMAGE, x0s.shape), atol=1e-5)


@every_sampler
def test_repeats_of_the_first_index_leave_pure_noise_alone(name):
    x_T, denoiser = jax.random.normal(KEY, (2, 3)), ONE_IMAGE["v"]
    states, _ = draw(name, denoiser, x_T, jnp.array([999, 999, 999, 500]))
    np.testing.assert_allclose(states[2], x_T, atol=1e-6)
    np.testing.assert_allclose(states[-1], IMAGE, atol=1e-5)


def test_eulers_method_in_s_squared_has_no_first_step_from_pure_noise():
    """It starts at s^2 = (1 - ab) / ab, which is infinite: the samples are NaN. One index later
    they are defined; DDIM's s has the same pole, but its step to x_prev has not."""
    x_T, denoiser = jax.random.normal(KEY, (4, 2, 3)), ONE_IMAGE["v"]
    for spacing in SPACINGS:
        timesteps = SCHEDULE.timesteps(12, spacing)
        states, _ = draw("probability_flow_euler", denoiser, x_T, timesteps)
        assert np.isnan(states[1:]).all()
        states, _ = draw("probability_flow_euler", denoiser, x_T, timesteps[1:])
        assert np.isfinite(states).all()


def test_an_eps_network_has_nothing_to_say_of_the_data_there():
    def draw(schedule, x_T):
        return dj.sample(None, lambda x, t: 0.5 * x, schedule, x_T, [999, 500])

    known = functools.partial(draw, SCHEDULE)
    for call in (known, jax.jit(known), jax.vmap(known)):
        with pytest.raises(ValueError, match="eps_fn must tell the data too where alpha_bar is 0"):
            call(jnp.ones(3))
    assert not np.isfinite(jax.jit(draw)(SCHEDULE, jnp.ones(3))).any()  # a level only jit knows
    from_below = dj.sample(None, lambda x, t: 0.5 * x, SCHEDULE, jnp.ones(3), [998, 500])
    assert np.isfinite(from_below).all()


@every_sampler
@by_prediction
def test_gradients_through_the_sampler_are_finite(name, predicts):
    """Nothing that is not used, infinite or not, may reach the gradient."""
    kind = dj.PARAMETRIZATIONS[predicts]
    x_T, timesteps = jax.random.normal(KEY, (5,)), SCHEDULE.timesteps(4, "trailing")

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(weight, x_T):
        denoiser = kind.denoiser(lambda x, t: weight * jnp.tanh(x), SCHEDULE)
        return dj.sample(KEY, denoiser, SCHEDULE, x_T, timesteps, dj.SAMPLERS[name]()).sum()

    value, grads = total(0.7, x_T)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    assert all(np.any(g != 0) for g in grads)


# --------------------------------------------------------------------------------- Gaussian data

MEAN = np.array([0.3, -0.5])
COV = np.array([[0.5, 0.2], [0.2, 0.3]])


def gaussian(predicts, schedule=SCHEDULE):
    """The denoiser of the optimal network for data N(MEAN, COV): regression on x_t."""

    def network(x, t):
        ab = schedule.alpha_bar(t)
        precision = jnp.linalg.inv(ab * COV + (1 - ab) * jnp.eye(2))
        whitened = (x - jnp.sqrt(ab) * MEAN) @ precision
        x0, eps = MEAN + jnp.sqrt(ab) * whitened @ COV, jnp.sqrt(1 - ab) * whitened
        return x0 if predicts == "x0" else dj.velocity(x0, eps, ab)

    return dj.PARAMETRIZATIONS[predicts].denoiser(network, schedule)


GAUSSIAN = {predicts: gaussian(predicts) for predicts in ("v", "x0")}


@by_spacing
@by_prediction
def test_ddim_on_gaussian_data_has_the_exact_mean_and_covariance(predicts, spacing):
    """In float64: the output is M x_T + b, so its mean is b and its covariance M M^T."""
    timesteps = SCHEDULE.timesteps(9, spacing)
    with jax.enable_x64(True):
        schedule = dj.Schedule(jnp.asarray(TABLE))
        run = functools.partial(
            dj.sample, None, gaussian(predicts, schedule), schedule, timesteps=timesteps
        )
        b, zero = run(x_T=jnp.zeros(2)), jnp.zeros(2)
        M = np.asarray(jax.jacfwd(lambda x_T: run(x_T=x_T))(zero))
    mean, cov = reference.gaussian_output(MEAN, COV, TABLE, timesteps, 0.0)
    np.testing.assert_allclose(b, mean, rtol=1e-9)
    np.testing.assert_allclose(M @ M.T, cov, rtol=1e-9, atol=1e-12)


@by_prediction
def test_ddpm_on_gaussian_data_has_the_closed_forms_mean_and_covariance(predicts):
    n, timesteps = 100_000, SCHEDULE.timesteps(4, "trailing")
    x_T = jax.random.normal(jax.random.key(1), (n, 2))
    states, _ = draw("ddpm", GAUSSIAN[predicts], x_T, timesteps)
    x_0 = np.float64(states[-1])
    mean, cov = reference.gaussian_output(MEAN, COV, TABLE, timesteps, 1.0)
    variances = np.diag(cov)
    assert np.all(np.abs(x_0.mean(0) - mean) < 4 * np.sqrt(variances / n))
    tolerance = 4 * np.sqrt((np.outer(variances, variances) + cov**2) / n)
    assert np.all(np.abs(np.cov(x_0.T) - cov) < tolerance)


@by_spacing
@pytest.mark.parametrize("name, factor", [("ddim", 0.6), ("heun", 0.4), ("dpm_solver_pp_2m", 0.7)])
def test_solvers_near_the_exact_flow_from_pure_noise(name, factor, spacing):
    """Each halving of the step takes the error down; x_0 = mean + COV^(1/2) x_T is the limit."""
    x_T = jax.random.normal(KEY, (50, 2))
    exact = reference.gaussian_flow_from_noise(x_T, MEAN, COV)
    errors = [
        np.abs(draw(name, GAUSSIAN["v"], x_T, SCHEDULE.timesteps(S, spacing))[0][-1] - exact).max()
        for S in (25, 50, 100)
    ]
    assert np.all(np.divide(errors[1:], errors[:-1]) < factor), errors
    assert errors[-1] < 0.06, errors


# ---------------------------------------------------------------------------- encoding, the bound


@by_spacing
@by_prediction
def test_encoding_to_pure_noise_and_back_finds_the_image(predicts, spacing):
    for S in (1, 2, 12):
        timesteps, x_0 = SCHEDULE.timesteps(S, spacing), IMAGE
        for encode in (dj.encode, dj.encode_fixed_point):
            x_T = encode(ONE_IMAGE[predicts], SCHEDULE, x_0, timesteps)
            assert np.isfinite(x_T).all()
            states, _ = draw("ddim", ONE_IMAGE[predicts], x_T, timesteps)
            np.testing.assert_allclose(states[-1], IMAGE, atol=1e-5)


@by_spacing
@by_prediction
def test_encoding_gaussian_data_to_pure_noise_and_back(predicts, spacing):
    """First order for `encode`; `encode_fixed_point` inverts each step."""
    z = jax.random.normal(KEY, (50, 2))
    x_0 = jnp.float32(reference.gaussian_flow_from_noise(z, MEAN, COV))
    errors = {dj.encode: [], dj.encode_fixed_point: []}
    for S in (20, 40, 80):
        timesteps = SCHEDULE.timesteps(S, spacing)
        for encode, found in errors.items():
            x_T = encode(GAUSSIAN[predicts], SCHEDULE, x_0, timesteps)
            states, _ = draw("ddim", GAUSSIAN[predicts], x_T, timesteps)
            found.append(np.abs(states[-1] - x_0).max())
    plain = np.array(errors[dj.encode])
    assert np.all(plain[1:] < 0.7 * plain[:-1]) and plain[-1] < 0.2, plain
    assert max(errors[dj.encode_fixed_point]) < 1e-5, errors


def test_the_fixed_point_finds_the_latent_that_was_decoded():
    """Also its last step, where the network's eps is x_T itself, whatever x_T is."""
    x_T, timesteps = jax.random.normal(KEY, (50, 2)), SCHEDULE.timesteps(6, "trailing")
    for denoiser in GAUSSIAN.values():
        states, _ = draw("ddim", denoiser, x_T, timesteps)
        found = dj.encode_fixed_point(denoiser, SCHEDULE, states[-1], timesteps, 12)
        np.testing.assert_allclose(found, x_T, atol=1e-5)


@by_prediction
def test_the_bound_of_gaussian_data_from_pure_noise(predicts):
    """The prior costs nothing; each KL is its closed form, in test_bound.py's notation."""
    std, timesteps = 0.4, np.array([999, 600, 200])
    x0 = std * jax.random.normal(KEY, (4, 100, 100))

    def network(x, t):
        ab = SCHEDULE.alpha_bar(t)
        share = x / (ab * std**2 + 1 - ab)
        x0, eps = jnp.sqrt(ab) * std**2 * share, jnp.sqrt(1 - ab) * share
        return x0 if predicts == "x0" else dj.velocity(x0, eps, ab)

    denoiser = dj.PARAMETRIZATIONS[predicts].denoiser(network, SCHEDULE)
    sigma = dj.process_sigmas(SCHEDULE, timesteps)
    terms = dj.variational_bound(jax.random.key(1), denoiser, SCHEDULE, x0, timesteps, sigma)
    np.testing.assert_array_equal(terms.prior, 0)
    assert np.isfinite(terms.decoder).all()
    want = []
    for t, t_prev in reference.transitions(timesteps)[:-1]:
        ab, ab_prev = TABLE[t], TABLE[t_prev]
        var = reference.ddim_sigma(ab, ab_prev, 1.0) ** 2
        c = math.sqrt(ab_prev) - math.sqrt(max(1 - ab_prev - var, 0) * ab / (1 - ab))
        mean_var = std**2 * (1 - ab) / (ab * std**2 + 1 - ab)
        want.append(c**2 * mean_var / var / 2 / math.log(2))
    # 40 000 pixels: a mean of squares to 0.7 % (one standard deviation).
    np.testing.assert_allclose(terms.steps.mean(1), want, rtol=0.03)
