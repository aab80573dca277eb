"""A schedule over real time, written here: what the library takes from `NoiseSchedule` is enough.

alpha_bar(t) = cos^2(pi t / 2) for t in [0, 1]: clean data at 0, pure noise (but for rounding) at 1.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from refusals import refused
from scipy.stats import norm

import ddim_jax as dj

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class CosineTime:
    """The cosine schedule without steps. Times that training draws lie in [lowest, 1]."""

    lowest: float = 1e-3

    num_steps = 10_000  # the most that a list may have
    clean = 0.0

    def alpha_bar(self, t, /):
        return jnp.where(self._is_time(t), jnp.cos(self._angle(t)) ** 2, jnp.nan)

    def noise_variance(self, t, /):
        return jnp.where(self._is_time(t), jnp.sin(self._angle(t)) ** 2, jnp.nan)

    def log_snr(self, t, /):
        return jnp.log(self.alpha_bar(t)) - jnp.log(self.noise_variance(t))

    def is_clean(self, t, /):
        return jnp.asarray(t) <= 0

    def nearest(self, log_snr, /):
        t = jnp.arctan(jnp.exp(-jnp.asarray(log_snr) / 2)) * 2 / jnp.pi
        return jnp.clip(t, self.lowest, 1.0)

    def timesteps(self, num_sample_steps, spacing="uniform"):
        del spacing
        return np.linspace(1, 0, num_sample_steps, endpoint=False, dtype=np.float32)

    def check_timesteps(self, timesteps):
        times = jnp.asarray(timesteps, jnp.float32)
        known = not isinstance(times, jax.core.Tracer)
        if times.ndim != 1 or (known and np.any(np.diff(times) > 0)):
            raise ValueError("timesteps must descend.")
        return times

    def draw(self, key, /, shape=()):
        return jax.random.uniform(key, shape, minval=self.lowest, maxval=1.0)

    def mirror(self, t, /):
        return 1 + self.lowest - t

    def _is_time(self, t):
        return (jnp.asarray(t) >= 0) & (jnp.asarray(t) <= 1)

    def _angle(self, t):
        return jnp.asarray(t) * (jnp.pi / 2)


SCHEDULE = CosineTime()
TIMES = SCHEDULE.timesteps(20)
IMAGE = jnp.linspace(-0.9, 0.9, 6).reshape(2, 3)


def level(t):
    """alpha_bar in float64."""
    return math.cos(math.pi / 2 * float(t)) ** 2


def transitions(times):
    """(t, t_prev) of each step; the last goes to clean data."""
    return list(zip(times, [*times[1:], 0.0], strict=True))


def test_it_is_a_noise_schedule():
    assert isinstance(SCHEDULE, dj.NoiseSchedule)
    assert not isinstance(level, dj.NoiseSchedule)


# ------------------------------------------------------------------------------------ one image


def knows_the_image(x, t):
    return jnp.broadcast_to(IMAGE, x.shape)


@pytest.mark.parametrize("name", dj.SAMPLERS)
def test_every_sampler_finds_the_one_image(name):
    x_T, seen = jax.random.normal(KEY, (4, 2, 3)), []

    def network(x, t):
        seen.append(t)
        return knows_the_image(x, t)

    @jax.jit
    def run(times):
        denoiser = dj.from_x0(network, SCHEDULE)
        return dj.sample_trajectory(KEY, denoiser, SCHEDULE, x_T, times, dj.SAMPLERS[name]())

    # Euler's method in s^2 starts where s^2 is finite: t = 1 is noise but for float32's rounding.
    states, x0s = run(TIMES[1:] if name == "probability_flow_euler" else TIMES)
    assert np.isfinite(states).all() and {t.dtype for t in seen} == {jnp.dtype(jnp.float32)}
    if name == "probability_flow_euler":  # no exact solution for one image: see test_solvers.py
        t = np.array([*map(level, TIMES[1:]), 1.0])
        s_squared = (1 - t) / t
        left = np.prod((s_squared[1:] + s_squared[:-1]) / (2 * s_squared[:-1]))
        want = IMAGE + left * (np.float64(x_T) / math.sqrt(t[0]) - IMAGE)
        np.testing.assert_allclose(states[-1], want, atol=1e-4)
    else:
        np.testing.assert_allclose(states[-1], np.broadcast_to(IMAGE, x_T.shape), atol=1e-5)
    np.testing.assert_allclose(x0s, np.broadcast_to(IMAGE, x0s.shape), atol=1e-6)


@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_encoding_and_back_finds_the_image(predicts):
    kind = dj.PARAMETRIZATIONS[predicts]

    def network(x, t):
        ab, image = SCHEDULE.alpha_bar(t), knows_the_image(x, t)
        return kind.target(image, dj.x0_to_epsilon(image, x, ab), ab)

    denoiser = kind.denoiser(network, SCHEDULE)
    for encode in (dj.encode, dj.encode_fixed_point):
        x_T = encode(denoiser, SCHEDULE, IMAGE, TIMES)
        assert np.isfinite(x_T).all()
        x_0 = dj.sample(None, denoiser, SCHEDULE, x_T, TIMES)
        np.testing.assert_allclose(x_0, IMAGE, atol=1e-5)


# --------------------------------------------------------------------------------- Gaussian data

MEAN, STD = 0.3, 0.5


def optimal(predicts):
    """The denoiser of the optimal network for data N(MEAN, STD^2)."""

    def network(x, t):
        ab = SCHEDULE.alpha_bar(t)
        whitened = (x - jnp.sqrt(ab) * MEAN) / (ab * STD**2 + 1 - ab)
        x0, eps = MEAN + jnp.sqrt(ab) * STD**2 * whitened, jnp.sqrt(1 - ab) * whitened
        return dj.PARAMETRIZATIONS[predicts].target(x0, eps, ab)

    return dj.PARAMETRIZATIONS[predicts].denoiser(network, SCHEDULE)


def test_ddim_on_gaussian_data_is_its_closed_form():
    """Each step takes x - sqrt(ab) MEAN along by one factor, from eq. 12 and the two regressions;
    the network asked with eps alone starts where there is signal."""
    x_T = jax.random.normal(KEY, (20,))
    for predicts, times in [("v", TIMES), ("x0", TIMES), ("eps", TIMES[1:])]:
        got = dj.sample(None, optimal(predicts), SCHEDULE, x_T, times)
        x = np.float64(x_T)
        for t, t_prev in transitions(times):
            ab, ab_prev = level(t), level(t_prev)
            var = ab * STD**2 + 1 - ab
            gain = math.sqrt(ab_prev * ab) * STD**2 + math.sqrt((1 - ab_prev) * (1 - ab))
            x = math.sqrt(ab_prev) * MEAN + gain / var * (x - math.sqrt(ab) * MEAN)
        np.testing.assert_allclose(got, x, atol=2e-5, err_msg=predicts)


@functools.cache
def errors(name):
    """Largest distances from the exact flow for 80, 160 and 320 steps from t = 0.96.

    From t = 1, where s is 2e7, Heun's mean of two slopes would be no slope at all.
    """
    x_T = jax.random.normal(KEY, (50, 1))
    exact = reference.gaussian_flow(x_T, level(0.96), np.array([MEAN]), np.array([[STD**2]]))
    sampler = dj.SAMPLERS[name]()
    run = jax.jit(lambda times: dj.sample(None, optimal("v"), SCHEDULE, x_T, times, sampler))
    lists = [0.96 * SCHEDULE.timesteps(S) for S in (80, 160, 320)]
    return np.array([np.abs(run(times) - exact).max() for times in lists])


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpm_solver_pp_2m", 1.6)])
def test_solvers_have_their_order(name, order):
    """DPM-Solver++'s is 2 in the log SNR, of which the last steps of these lists keep their length:
    it comes near 2 slowly."""
    slope, _ = np.polyfit(range(3), np.log2(errors(name)), 1)
    assert abs(-slope - order) < 0.15, errors(name)
    if name != "ddim":
        assert errors(name)[-1] < errors("ddim")[-1] / 10


def test_encoding_gaussian_data_and_back():
    x_0 = MEAN + STD * jax.random.normal(KEY, (50, 1))
    times = SCHEDULE.timesteps(50)
    for predicts in ("v", "x0"):
        found = dj.encode_fixed_point(optimal(predicts), SCHEDULE, x_0, times)
        decoded = dj.sample(None, optimal(predicts), SCHEDULE, found, times)
        np.testing.assert_allclose(decoded, x_0, atol=1e-5)
        plain = dj.encode(optimal(predicts), SCHEDULE, x_0, times)
        np.testing.assert_allclose(plain, (x_0 - MEAN) / STD, atol=0.1)


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_bound_of_gaussian_data_is_its_closed_form(eta):
    std, times = 0.4, np.float32([0.95, 0.6, 0.25])
    x0 = std * jax.random.normal(KEY, (4, 100, 100))

    def eps_fn(x, t):
        ab = SCHEDULE.alpha_bar(t)
        return jnp.sqrt(1 - ab) * x / (ab * std**2 + 1 - ab)

    sigma = dj.process_sigmas(SCHEDULE, times, eta)
    pairs = [(level(t), level(t_prev)) for t, t_prev in transitions(times)]
    want = [reference.ddim_sigma(ab, ab_prev, eta) for ab, ab_prev in pairs[:-1]]
    np.testing.assert_allclose(sigma, [*want, want[-1]], rtol=1e-5)

    terms = dj.variational_bound(jax.random.key(1), eps_fn, SCHEDULE, x0, times, sigma)
    want = []
    for ab, ab_prev in pairs[:-1]:
        var = reference.ddim_sigma(ab, ab_prev, eta) ** 2
        c = math.sqrt(ab_prev) - math.sqrt((1 - ab_prev - var) * ab / (1 - ab))
        mean_var = std**2 * (1 - ab) / (ab * std**2 + 1 - ab)
        want.append(c**2 * mean_var / var / 2 / math.log(2))
    # 40 000 pixels: a mean of squares to 0.7 % (one standard deviation).
    np.testing.assert_allclose(terms.steps.mean(1), want, rtol=0.03)
    ab = level(times[0])
    nats = (ab * np.float64(x0) ** 2 - ab - math.log1p(-ab)) / 2
    np.testing.assert_allclose(terms.prior, nats.mean((1, 2)) / math.log(2), rtol=1e-3)


def test_the_last_term_of_the_bound_is_the_decoders():
    """The network knows the image: each grey level has the share of N(0, std^2) in its own bin."""
    x0 = jnp.float32(np.random.default_rng(0).integers(1, 255, (2, 3)) / 127.5 - 1)
    times, std = np.float32([0.9, 0.1]), 0.004
    denoiser = dj.from_x0(lambda x, t: x0, SCHEDULE)
    sigma = dj.process_sigmas(SCHEDULE, times).at[-1].set(std)
    terms = dj.variational_bound(KEY, denoiser, SCHEDULE, x0, times, sigma)
    want = -math.log2(2 * norm.cdf(1 / 255 / std) - 1)
    np.testing.assert_allclose(terms.decoder, want, rtol=2e-3)  # its tanh is near the normal's
    np.testing.assert_allclose(terms.steps, 0, atol=1e-6)


def test_the_noise_of_the_bound_is_another_one_at_each_time():
    """However near: else two steps of a long list would share theirs."""
    x0, times = jnp.zeros((2, 3)), np.float32([0.5004, 0.5003, 0.5002, 0.5001])
    seen = []

    def spy(x, t):
        seen.append(np.asarray(x) / math.sqrt(1 - level(t)))
        return x

    with jax.disable_jit():
        sigma = dj.process_sigmas(SCHEDULE, times)
        dj.variational_bound(KEY, spy, SCHEDULE, x0, times, sigma)
    assert len(np.unique(np.round(seen, 4))) == 4 * 6


# -------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_the_loss_is_its_distance_by_hand(predicts):
    x0 = jax.random.uniform(jax.random.key(1), (5, 200), minval=-1.0)
    seen = []

    def network(x, t):
        seen.append((x, t))
        return 0.3 * x

    weight = dj.min_snr(predicts)
    loss = dj.prediction_loss(KEY, network, SCHEDULE, x0, predicts=predicts, weight=weight)
    x_t, t = (np.float64(array) for array in seen[0])
    assert t.shape == (5,) and len(np.unique(t)) == 5 and np.all((t > 0) & (t < 1))
    ab = np.array([level(time) for time in t])[:, None]
    eps = (x_t - np.sqrt(ab) * np.float64(x0)) / np.sqrt(1 - ab)
    right = {"eps": eps, "x0": np.float64(x0), "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0}
    snr = (ab / (1 - ab))[:, 0]
    share = np.minimum(snr, 5) / {"eps": snr, "v": snr + 1, "x0": 1}[predicts]
    want = share * ((right[predicts] - 0.3 * x_t) ** 2).mean(1)
    np.testing.assert_allclose(loss, want, rtol=1e-3)


def test_times_are_drawn_over_the_whole_range_and_in_pairs():
    n = 4000
    t = np.asarray(dj.antithetic_timesteps(KEY, jnp.arange(n), n, SCHEDULE))
    assert t.dtype == np.float32
    drawn = n // 2 + 1
    np.testing.assert_allclose(t[drawn:] + t[: n - drawn], 1.001, rtol=1e-6)
    assert np.all((t >= 1e-3) & (t <= 1))
    counts, _ = np.histogram(t, bins=10, range=(1e-3, 1))
    assert np.all(np.abs(counts - n / 10) < 4 * 2 * np.sqrt(n / 2 * 0.1 * 0.9))
    keys = jax.random.split(KEY, 3)  # one for each example
    alone = dj.prediction_loss(keys[1:2], lambda x, t: x * t[:, None], SCHEDULE, jnp.ones((1, 2)))
    loss = dj.prediction_loss(keys, lambda x, t: x * t[:, None], SCHEDULE, jnp.ones((3, 2)))
    np.testing.assert_allclose(alone[0], loss[1], rtol=1e-5)


# --------------------------------------------------------------------------------- its neighbours


def test_the_ode_asks_at_the_exact_time():
    """No whole index is nearest: Euler's method in s is DDIM, whichever the grid."""
    field = dj.ode_field(optimal("v"), SCHEDULE)
    times, x_T = TIMES[1:], jax.random.normal(KEY, (2, 5))
    states, _ = dj.sample_trajectory(None, optimal("v"), SCHEDULE, x_T, times)
    x_bar, s = dj.to_ode_coordinates(x_T, SCHEDULE.alpha_bar(times[0]))
    for i, t_prev in enumerate(times[1:]):
        _, s_prev = dj.to_ode_coordinates(x_T, SCHEDULE.alpha_bar(t_prev))
        x_bar, s = x_bar + (s_prev - s) * field(x_bar, s), s_prev
        np.testing.assert_allclose(dj.from_ode_coordinates(x_bar, s), states[i + 1], atol=2e-5)


def test_wrappers_take_it():
    cond, uncond = optimal("v"), dj.from_x0(lambda x, t: jnp.tanh(x), SCHEDULE)
    x, t = jax.random.normal(KEY, (50,)), jnp.float32(0.7)
    pair = dj.clip_x0(dj.guided(cond, uncond, 2.0), SCHEDULE, -0.1, 0.1)(x, t)
    assert np.abs(pair.x0).max() <= 0.1 + 1e-7
    np.testing.assert_allclose(reference.add_noise(*pair, level(0.7)), x, atol=2e-6)


def test_its_own_checks_are_the_ones_that_speak():
    for run in (dj.sample, dj.sample_trajectory):
        with refused("timesteps must descend."):
            run(None, optimal("v"), SCHEDULE, jnp.ones(3), [0.2, 0.5])
    with refused("timesteps must descend strictly for a variational bound"):
        dj.process_sigmas(SCHEDULE, np.float32([0.5, 0.5]))
    outside = dj.sample(None, optimal("v"), SCHEDULE, jnp.ones(3), [1.5, 0.5])
    assert np.isnan(outside).all()
