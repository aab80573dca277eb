"""The ODE view: DDIM is Euler's method in s, and the field is the closed form where one exists."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import ddim_jax as dj
from ddim_jax.ode import from_ode_coordinates, noise_to_signal, ode_field, to_ode_coordinates

SCHEDULE = dj.linear_schedule()
MEAN, STD = 0.3, 0.5


def gaussian_eps(x, t):
    """E[eps | x_t] for data N(MEAN, STD^2)."""
    ab = SCHEDULE.alpha_bar(t)
    return jnp.sqrt(1 - ab) * (x - jnp.sqrt(ab) * MEAN) / (ab * STD**2 + 1 - ab)


def wavy_eps(x, t):
    return jnp.sqrt(1 - SCHEDULE.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


def normal(shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_coordinates_are_eq_13s(t):
    x, ab = normal((2, 3)), float(SCHEDULE.alpha_bar(t))
    x_bar, s = to_ode_coordinates(x, SCHEDULE.alpha_bar(t))
    np.testing.assert_allclose(x_bar, np.asarray(x) / math.sqrt(ab), rtol=1e-6)
    np.testing.assert_allclose(s, math.sqrt((1 - ab) / ab), rtol=1e-6)
    np.testing.assert_allclose(from_ode_coordinates(x_bar, s), x, rtol=1e-6)


def test_clean_data_stays_where_it_is():
    x_bar, s = to_ode_coordinates(normal((3,)), SCHEDULE.alpha_bar(-1))
    assert s == 0
    np.testing.assert_array_equal(x_bar, normal((3,)))


def test_one_level_for_each_image():
    t = jnp.asarray([3, 700])
    x_bar, s = to_ode_coordinates(normal((2, 4, 4, 1)), SCHEDULE.alpha_bar(t))
    assert s.shape == (2,)
    for i in range(2):
        alone = to_ode_coordinates(normal((2, 4, 4, 1))[i], SCHEDULE.alpha_bar(t[i]))
        np.testing.assert_allclose(x_bar[i], alone[0], rtol=1e-6)
    np.testing.assert_allclose(from_ode_coordinates(x_bar, s), normal((2, 4, 4, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    "timesteps", [dj.ddim_timesteps(1000, 50), np.array([999, 400, 399, 7]), np.array([0])]
)
def test_euler_in_s_is_ddim(timesteps):
    x_T, field = normal((2, 5)), ode_field(wavy_eps, SCHEDULE)
    states, _ = dj.sample_trajectory(None, wavy_eps, SCHEDULE, x_T, timesteps)
    x_bar, s = to_ode_coordinates(x_T, SCHEDULE.alpha_bar(timesteps[0]))
    for i, (_, t_prev) in enumerate(reference.transitions(timesteps)):
        s_prev = noise_to_signal(SCHEDULE.alpha_bar(t_prev))
        x_bar, s = x_bar + (s_prev - s) * field(x_bar, s), s_prev
        np.testing.assert_allclose(from_ode_coordinates(x_bar, s), states[i + 1], atol=2e-5)


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, dj.scaled_linear_schedule(), dj.cosine_schedule(), dj.linear_schedule(7)]
)
def test_network_is_asked_at_every_levels_own_index(schedule):
    field = ode_field(lambda x, t: jnp.full_like(x, t), schedule)
    s = noise_to_signal(schedule.alphas_cumprod)
    asked = jax.vmap(lambda s: field(jnp.zeros(()), s))(s)
    np.testing.assert_array_equal(asked, np.arange(schedule.num_steps))


def test_between_levels_the_nearest_is_asked_and_beyond_them_the_end():
    field = ode_field(lambda x, t: jnp.full_like(x, t), SCHEDULE)
    low, high = np.asarray(noise_to_signal(SCHEDULE.alpha_bar(np.array([400, 401]))))
    for s, t in [
        (low ** (2 / 3) * high ** (1 / 3), 400),
        (low ** (1 / 3) * high ** (2 / 3), 401),
        (0.0, 0),
        (1e-3, 0),
        (1e4, 999),
    ]:
        assert field(jnp.zeros(()), jnp.asarray(s)) == t


@pytest.mark.parametrize("t", [0, 10, 300, 999])
def test_field_is_minus_s_times_the_score_of_x_bar(t):
    """The NCSN view (section 4.3): x_bar ~ N(MEAN, STD^2 + s^2) has score (MEAN - x_bar) / var."""
    s = noise_to_signal(SCHEDULE.alpha_bar(t))
    x_bar = MEAN + 2 * jnp.sqrt(STD**2 + s**2) * normal((7,))
    score = (MEAN - x_bar) / (STD**2 + s**2)
    got = ode_field(gaussian_eps, SCHEDULE)(x_bar, s)
    np.testing.assert_allclose(got, -s * score, rtol=1e-3, atol=1e-5)
    x_t = from_ode_coordinates(x_bar, s)
    want = dj.epsilon_to_score(gaussian_eps(x_t, t), x_t, SCHEDULE.alpha_bar(t))
    np.testing.assert_allclose(got, -s * want / jnp.sqrt(1 + s**2), rtol=1e-3, atol=1e-5)


def test_another_solver_follows_the_exact_flow():
    """The classical Runge-Kutta method, whose steps ask the field between the schedule's levels."""
    field = ode_field(gaussian_eps, SCHEDULE)
    x_T, ab = normal((20,)), SCHEDULE.alpha_bar(999)
    x_bar, s_start = to_ode_coordinates(x_T, ab)
    s = jnp.append(jnp.geomspace(s_start, 0.01, 60), 0.0)

    def step(x, ends):
        s, s_next = ends
        h, middle = s_next - s, (s + s_next) / 2
        k1 = field(x, s)
        k2 = field(x + h / 2 * k1, middle)
        k3 = field(x + h / 2 * k2, middle)
        k4 = field(x + h * k3, s_next)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    x_0, _ = jax.lax.scan(step, x_bar, (s[:-1], s[1:]))
    exact = reference.gaussian_flow(
        np.asarray(x_T)[:, None], float(ab), np.array([MEAN]), np.array([[STD**2]])
    )
    # Not the method's order: what is left comes from asking the network at whole indices only.
    np.testing.assert_allclose(x_0, exact[:, 0], atol=5e-3)


def test_a_network_that_changes_shapes_is_refused():
    field = ode_field(lambda x, t: jnp.concatenate([x, x], -1), SCHEDULE)
    with pytest.raises(ValueError, match="eps_fn must return an array of x's shape"):
        field(jnp.zeros((2, 3)), jnp.asarray(1.0))
