"""Solvers against another project's numbers, exact flows, and their own theory's order."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from counting import visited
from scipy.optimize import brentq
from scipy.stats import norm

import ddim_jax as dj
from ddim_jax.solvers import dpm_solver_pp_2m, heun, probability_flow_euler

SCHEDULE = dj.linear_schedule()
SOLVERS = {
    "heun": heun(),
    "dpm_solver_pp_2m": dpm_solver_pp_2m(),
    "probability_flow_euler": probability_flow_euler(),
}
ORDERS = {"ddim": 1, "probability_flow_euler": 1, "heun": 2, "dpm_solver_pp_2m": 2}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def golden_eps(x, t):
    """The network of the golden files."""
    return jnp.sqrt(1 - SCHEDULE.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("num_sample_steps", [10, 20])
@pytest.mark.parametrize(
    "name, sampler", [("euler", dj.ddim()), ("heun", heun()), ("dpmpp_2m", dpm_solver_pp_2m())]
)
def test_same_images_as_k_diffusion(golden, name, sampler, num_sample_steps):
    case = {k.rpartition("/")[2]: v for k, v in golden("solvers.npz").items()
            if k.startswith(f"{name}_{num_sample_steps}/")}  # fmt: skip
    x_T, timesteps = jnp.asarray(case["x_T"], jnp.float32), case["timesteps"]
    got = jax.jit(lambda x: dj.sample(None, golden_eps, SCHEDULE, x, timesteps, sampler))(x_T)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, case["x_0"], atol=1e-4)


@pytest.mark.parametrize("num_sample_steps", [10, 20])
def test_euler_ancestral_is_ddim_with_eta(golden, num_sample_steps):
    arrays, name = golden("solvers.npz"), f"euler_ancestral_eta0.5_{num_sample_steps}"
    x = jnp.asarray(arrays[f"{name}/x_T"], jnp.float32)
    noise = jnp.asarray([*arrays[f"{name}/noise"], np.zeros(x.shape)], jnp.float32)
    transitions = reference.transitions(arrays[f"{name}/timesteps"])
    for (t, t_prev), z in zip(transitions, noise, strict=True):
        ab, ab_prev = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(t_prev)
        x = dj.ddim_step(x, golden_eps(x, t), ab, ab_prev, eta=0.5, noise=z)
    np.testing.assert_allclose(x, arrays[f"{name}/x_0"], atol=1e-4)


# ------------------------------------------------------------------------------- order, in float64

FINE = 2**12


def fine_levels():
    """alpha_bar of log-spaced s from 1e-5 to 60: smooth, so that every 2^k-th is a smooth grid."""
    s = np.geomspace(1e-5, 60, FINE + 1)
    return 1 / (1 + s**2)


def measured_order(sampler, eps_at_level, exact, x_T):
    """Slope of log error against log step over two halvings, and the errors."""
    with jax.enable_x64(True):
        schedule = dj.Schedule(jnp.asarray(fine_levels()))
        errors = []
        for num_sample_steps in (64, 128, 256):
            timesteps = np.arange(FINE, -1, -(FINE // num_sample_steps))
            x = jax.jit(
                lambda x, ts=timesteps: dj.sample(
                    None,
                    lambda x, t: eps_at_level(x, schedule.alpha_bar(t)),
                    schedule,
                    x,
                    ts,
                    sampler,
                )
            )(jnp.asarray(x_T))
            errors.append(np.abs(np.asarray(x) - exact).max())
    return -np.polyfit(range(len(errors)), np.log2(errors), 1)[0], errors


@pytest.mark.parametrize("name", ORDERS)
def test_order_on_gaussian_data(name):
    mean, cov = np.array([0.3, -0.5]), np.array([[0.5, 0.2], [0.2, 0.3]])
    x_T = np.random.default_rng(0).normal(size=(5, 2))
    exact = reference.gaussian_flow(x_T, fine_levels()[-1], mean, cov)

    def eps(x, ab):
        cov_t = ab * cov + (1 - ab) * jnp.eye(2)
        return jnp.sqrt(1 - ab) * jnp.linalg.solve(cov_t, (x - jnp.sqrt(ab) * mean).T).T

    sampler = {"ddim": dj.ddim(), **SOLVERS}[name]
    order, errors = measured_order(sampler, eps, exact, x_T)
    assert abs(order - ORDERS[name]) < 0.2, errors


WEIGHTS, MEANS, STD = np.array([0.3, 0.5, 0.2]), np.array([-0.8, 0.1, 0.9]), 0.15


def mixture_flow(x_bar_T, s_T):
    """The exact flow of a one-dimensional mixture: in one dimension it keeps every quantile."""

    def cdf(x, s):
        return WEIGHTS @ norm.cdf(x, MEANS, math.hypot(STD, s))

    return np.array([brentq(lambda y, x=x: cdf(y, 0) - cdf(x, s_T), -3, 3) for x in x_bar_T])


def mixture_eps(x, ab):
    """E[eps | x_t] of the mixture."""
    var = ab * STD**2 + 1 - ab
    distance = x[..., None] - jnp.sqrt(ab) * MEANS
    weights = jax.nn.softmax(jnp.log(WEIGHTS) - distance**2 / (2 * var))
    return jnp.sqrt(1 - ab) * (weights * distance).sum(-1) / var


@pytest.mark.parametrize("name", ORDERS)
def test_order_on_a_gaussian_mixture(name):
    x_T = np.linspace(-2.1, 2.2, 12)
    ab = fine_levels()[-1]
    exact = mixture_flow(x_T / math.sqrt(ab), math.sqrt((1 - ab) / ab))
    sampler = {"ddim": dj.ddim(), **SOLVERS}[name]
    order, errors = measured_order(sampler, mixture_eps, exact, x_T)
    assert abs(order - ORDERS[name]) < 0.2, errors


@pytest.mark.parametrize("name, num_steps", [("heun", 20), ("dpm_solver_pp_2m", 39)])
def test_second_order_is_worth_its_calls(name, num_steps):
    """At 39 network calls on the trained schedule, at most a third of DDIM's error."""
    x_T, ab = jnp.linspace(-2.1, 2.2, 12), float(SCHEDULE.alpha_bar(800))
    exact = mixture_flow(np.asarray(x_T) / math.sqrt(ab), math.sqrt((1 - ab) / ab))

    def eps_fn(x, t):
        return mixture_eps(x, SCHEDULE.alpha_bar(t))

    def error(sampler, num_steps):
        timesteps = dj.ddim_timesteps(1000, num_steps, "quadratic")
        assert timesteps[0] == 800
        return np.abs(dj.sample(None, eps_fn, SCHEDULE, x_T, timesteps, sampler) - exact).mean()

    assert error(SOLVERS[name], num_steps) < error(dj.ddim(), 39) / 3


# ------------------------------------------------------------------------------- what a step is


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_dpm_solver_begins_and_ends_with_a_ddim_step(which):
    x_T, timesteps = normal(0, (2, 5)), dj.ddim_timesteps(1000, 7)
    states, _ = dj.sample_trajectory(None, golden_eps, SCHEDULE, x_T, timesteps, dpm_solver_pp_2m())
    t, t_prev = reference.transitions(timesteps)[which]
    x = states[:-1][which]
    levels = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(t_prev)
    want = dj.ddim_step(x, golden_eps(x, t), *levels)
    np.testing.assert_allclose(states[1:][which], want, atol=2e-6)


def test_probability_flow_euler_is_eq_15():
    timesteps = dj.ddim_timesteps(1000, 9)
    x = np.random.default_rng(0).normal(size=(2, 5))
    got = dj.sample(
        None, golden_eps, SCHEDULE, jnp.asarray(x, jnp.float32), timesteps, probability_flow_euler()
    )
    table = np.asarray(SCHEDULE.alphas_cumprod, np.float64)
    for t, t_prev in reference.transitions(timesteps):
        a, a_prev = reference.level(table, t), reference.level(table, t_prev)
        eps = math.sqrt(1 - a) * x + 0.1 * np.sin(3 * x + t / 100)
        change = 0.5 * ((1 - a_prev) / a_prev - (1 - a) / a) * math.sqrt(a / (1 - a)) * eps
        x = math.sqrt(a_prev) * (x / math.sqrt(a) + change)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def test_probability_flow_euler_loses_to_ddim_in_few_steps():
    """Section 4.3's claim, on data with a known flow."""
    mean, cov = np.zeros(1), np.array([[0.25]])
    x_T = normal(0, (50, 1))
    exact = reference.gaussian_flow(x_T, float(SCHEDULE.alpha_bar(990)), mean, cov)

    def eps_fn(x, t):
        ab = SCHEDULE.alpha_bar(t)
        return jnp.sqrt(1 - ab) * x / (ab * 0.25 + 1 - ab)

    def error(sampler, num_steps):
        timesteps = np.linspace(990, 0, num_steps).astype(int)
        return np.abs(dj.sample(None, eps_fn, SCHEDULE, x_T, timesteps, sampler) - exact).mean()

    for num_steps in (5, 10, 20):
        assert error(probability_flow_euler(), num_steps) > 2 * error(dj.ddim(), num_steps)


@pytest.mark.parametrize("name", ["heun", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("timesteps", [[0], [999], [700, 3], dj.ddim_timesteps(1000, 20)])
def test_data_of_one_image_is_found(name, timesteps):
    image = jnp.linspace(-1, 1, 12).reshape(3, 4)
    eps_fn = dj.from_x0(lambda x, t: image, SCHEDULE)
    x = dj.sample(None, eps_fn, SCHEDULE, normal(0, (3, 4)), timesteps, SOLVERS[name])
    # From index 999 in one step, float32 knows x0 = (x - noise eps) / 0.006 no better.
    np.testing.assert_allclose(x, image, atol=1e-4 if timesteps[-1] == 999 else 1e-5)


def test_probability_flow_euler_leaves_noise_on_data_of_one_image():
    """Each step takes x_bar - image times (s_prev^2 + s^2) / (2 s^2), by eq. 15; the last, 1/2."""
    image, timesteps = jnp.linspace(-1, 1, 5), dj.ddim_timesteps(1000, 20)
    eps_fn = dj.from_x0(lambda x, t: image, SCHEDULE)
    x_T = normal(0, (5,))
    x = dj.sample(None, eps_fn, SCHEDULE, x_T, timesteps, probability_flow_euler())
    ab = np.array([*np.asarray(SCHEDULE.alphas_cumprod, np.float64)[timesteps], 1.0])
    s_squared = (1 - ab) / ab
    left = np.prod((s_squared[1:] + s_squared[:-1]) / (2 * s_squared[:-1]))
    np.testing.assert_allclose(x, image + left * (x_T / np.sqrt(ab[0]) - image), atol=1e-4)


@pytest.mark.parametrize(
    "name, calls", [("heun", 15), ("dpm_solver_pp_2m", 8), ("probability_flow_euler", 8)]
)
def test_network_calls(name, calls):
    timesteps, x_T = dj.ddim_timesteps(1000, 8), normal(0, (2,))
    count = visited(
        lambda f: dj.sample(None, f, SCHEDULE, x_T, timesteps, SOLVERS[name]), golden_eps
    )
    assert len(count) == calls == SOLVERS[name].network_calls(8)
    assert set(count) == set(timesteps.tolist())  # never asked at clean data's index


@each_solver
def test_repeated_indices_change_nothing(name):
    repeated = dj.ddim_timesteps(1000, 600, "quadratic")
    once = np.unique(repeated)[::-1]
    assert len(once) < len(repeated)

    def run(timesteps):
        x_T = normal(0, (3, 4))
        return dj.sample(None, golden_eps, SCHEDULE, x_T, timesteps, SOLVERS[name])

    np.testing.assert_allclose(run(repeated), run(once), rtol=1e-5, atol=1e-5)


@each_solver
@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_shape_and_dtype(name, shape, dtype):
    x_T = normal(0, shape).astype(dtype)
    x = dj.sample(None, golden_eps, SCHEDULE, x_T, dj.ddim_timesteps(1000, 5), SOLVERS[name])
    assert x.shape == shape and x.dtype == dtype
    assert np.isfinite(np.asarray(x, np.float32)).all()


@each_solver
def test_vmap_over_images_is_the_batch(name):
    x_T, timesteps = normal(0, (3, 4)), dj.ddim_timesteps(1000, 6)

    def run(x):
        return dj.sample(None, golden_eps, SCHEDULE, x, timesteps, SOLVERS[name])

    np.testing.assert_allclose(jax.vmap(run)(x_T), run(x_T), atol=1e-5)


@each_solver
def test_gradient_is_the_difference_quotient(name):
    timesteps = dj.ddim_timesteps(1000, 6, "quadratic")

    def run(x):
        return dj.sample(None, golden_eps, SCHEDULE, x, timesteps, SOLVERS[name])

    got = jax.grad(run)(jnp.asarray(0.7))
    want = (run(jnp.asarray(0.71)) - run(jnp.asarray(0.69))) / 0.02
    np.testing.assert_allclose(got, want, rtol=2e-2)


@each_solver
def test_x0_is_the_prediction_seen_from_each_state(name):
    x_T, timesteps = normal(0, (2, 3)), dj.ddim_timesteps(1000, 4)
    states, x0s = dj.sample_trajectory(None, golden_eps, SCHEDULE, x_T, timesteps, SOLVERS[name])
    for x, x0, t in zip(states[:-1], x0s, timesteps, strict=True):
        want = dj.epsilon_to_x0(golden_eps(x, t), x, SCHEDULE.alpha_bar(t))
        np.testing.assert_allclose(x0, want, rtol=1e-4, atol=1e-4)
