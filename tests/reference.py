"""The papers' formulas in numpy float64, for the tests to compare with. Imports nothing of ours.

Written from Song, Meng, Ermon 2021 (arXiv:2010.02502) unless another source is named. `ab` is a
level alpha_bar, `table` the levels of t = 0..T-1, `timesteps` a descending list.
"""

from __future__ import annotations

import math

import numpy as np

# ---------------------------------------------------------------------------- schedules and grids


def linear_betas(num_steps=1000, start=1e-4, end=0.02):
    """beta_t on the line from start to end (Ho et al. 2020, section 4)."""
    return [start + (end - start) * t / max(num_steps - 1, 1) for t in range(num_steps)]


def scaled_linear_betas(num_steps=1000, start=0.00085, end=0.012):
    """sqrt(beta_t) on a line (latent diffusion)."""
    low, high = math.sqrt(start), math.sqrt(end)
    return [(low + (high - low) * t / max(num_steps - 1, 1)) ** 2 for t in range(num_steps)]


def cumulative_levels(betas):
    """alpha_bar_t = prod_{i <= t} (1 - beta_i), as exp of an exactly rounded sum of logarithms."""
    logs = [math.log1p(-beta) for beta in betas]
    return np.array([math.exp(math.fsum(logs[: t + 1])) for t in range(len(logs))])


def cosine_level(u, offset=0.008):
    """alpha_bar at the fraction u of the way (Nichol & Dhariwal 2021, eq. 17), unclipped."""

    def f(u):
        return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2

    return f(u) / f(0)


def level(table, t):
    """alpha_bar(t), with alpha_bar(-1) = 1."""
    assert -1 <= t < len(table)
    return 1.0 if t == -1 else float(table[t])


def timesteps(num_steps, num_sample_steps, spacing):
    """The sub-sequences of appendix D.2 and of other tools: exact (numerators, denominator).

    The tools round `linspace` and `trailing` to whole indices; the paper's two are whole already.
    """
    T, S, i = num_steps, num_sample_steps, np.arange(num_sample_steps)
    if spacing == "uniform":
        ascending, denominator = i * (T // S), 1
    elif spacing == "quadratic":
        squares = np.linspace(0, math.sqrt(0.8 * T), S) ** 2
        ascending, denominator = np.array([int(s) for s in squares]), 1
    elif spacing == "linspace":
        ascending, denominator = i * (T - 1), max(S - 1, 1)
    elif spacing == "trailing":
        ascending, denominator = ((T - 1) * S - i * T)[::-1], S
    else:
        raise AssertionError(spacing)
    return ascending[::-1], denominator


def transitions(timesteps):
    """(t, t_prev) for each step; the last goes to clean data."""
    timesteps = [int(t) for t in timesteps]
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


# ------------------------------------------------------------------ the algebra of one noisy state

PREDICTIONS = ("epsilon", "x0", "v", "score")


def convert(source, target, value, x_t, ab):
    """One prediction from another: solve a 2x2 system for (x0, eps), then read the target off it.

    The rows say what each prediction is in terms of (x0, eps): v from Salimans & Ho 2022.
    """
    signal, noise = math.sqrt(ab), math.sqrt(1 - ab)
    rows = {
        "epsilon": (0.0, 1.0),
        "x0": (1.0, 0.0),
        "v": (-noise, signal),
        "score": (0.0, -1.0 / noise),
    }
    system = np.array([(signal, noise), rows[source]])
    given = np.stack([np.ravel(x_t), np.ravel(value)]).astype(np.float64)
    x0_and_eps = np.linalg.solve(system, given)
    return (np.array(rows[target]) @ x0_and_eps).reshape(np.shape(x_t))


def add_noise(x0, eps, ab):
    """Eq. 4."""
    return math.sqrt(ab) * np.asarray(x0, np.float64) + math.sqrt(1 - ab) * eps


def gaussian_product(mean_1, var_1, mean_2, var_2):
    """Mean and variance of the normalised product of two Gaussian densities."""
    precision = 1 / var_1 + 1 / var_2
    return (mean_1 / var_1 + mean_2 / var_2) / precision, 1 / precision


def ddpm_posterior(x0, x_t, ab, ab_prev):
    """q(x_prev | x_t, x0) by Bayes' rule from q(x_t | x_prev) and q(x_prev | x0)."""
    alpha = ab / ab_prev
    return gaussian_product(
        np.asarray(x_t, np.float64) / math.sqrt(alpha),
        (1 - alpha) / alpha,
        math.sqrt(ab_prev) * np.asarray(x0, np.float64),
        1 - ab_prev,
    )


# --------------------------------------------------------------------------------------- the steps


def ddim_sigma(ab, ab_prev, eta):
    """Eq. 16."""
    return eta * math.sqrt((1 - ab_prev) / (1 - ab)) * math.sqrt(1 - ab / ab_prev)


def ddim_step(x, eps, ab, ab_prev, eta=0.0, noise=0.0):
    """Eq. 12."""
    x, sigma = np.asarray(x, np.float64), ddim_sigma(ab, ab_prev, eta)
    x0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
    direction = math.sqrt(max(1 - ab_prev - sigma**2, 0.0)) * eps
    return math.sqrt(ab_prev) * x0 + direction + sigma * noise


def sigma_hat_step(x, eps, ab, ab_prev, noise):
    """Appendix D.3 with the published code's clamp: the posterior of the clamped x0_hat."""
    x = np.asarray(x, np.float64)
    x0 = np.clip((x - math.sqrt(1 - ab) * eps) / math.sqrt(ab), -1, 1)
    if ab_prev == 1:
        return x0
    return ddpm_posterior(x0, x, ab, ab_prev)[0] + math.sqrt(1 - ab / ab_prev) * noise


def clip_data_step(x, eps, ab, ab_prev, eta=0.0, noise=0.0):
    """diffusers' clip_sample: x0_hat clipped, eps kept."""
    x, sigma = np.asarray(x, np.float64), ddim_sigma(ab, ab_prev, eta)
    x0 = np.clip((x - math.sqrt(1 - ab) * eps) / math.sqrt(ab), -1, 1)
    return math.sqrt(ab_prev) * x0 + math.sqrt(1 - ab_prev - sigma**2) * eps + sigma * noise


def trajectory(eps_fn, table, x_T, timesteps, step):
    """All states, where step(i, x, eps, ab, ab_prev) is one of the steps above."""
    states = [np.asarray(x_T, np.float64)]
    for i, (t, t_prev) in enumerate(transitions(timesteps)):
        x = states[-1]
        states.append(step(i, x, eps_fn(x, t), level(table, t), level(table, t_prev)))
    return np.stack(states)


# --------------------------------------------------------- data with a known optimal network


def gaussian_eps(x, ab, mean, cov):
    """E[eps | x_t] for data N(mean, cov); x is (N, d)."""
    cov_t = ab * np.asarray(cov) + (1 - ab) * np.eye(len(mean))
    return math.sqrt(1 - ab) * np.linalg.solve(cov_t, (x - math.sqrt(ab) * mean).T).T


def gaussian_x0(x, ab, mean, cov):
    """E[x_0 | x_t] for data N(mean, cov), whose conditional mean is that of a linear regression."""
    cov_t = ab * np.asarray(cov) + (1 - ab) * np.eye(len(mean))
    gain = np.linalg.solve(cov_t, math.sqrt(ab) * np.asarray(cov)).T
    return mean + (x - math.sqrt(ab) * mean) @ gain.T


def gaussian_output(mean, cov, table, timesteps, eta):
    """Mean and covariance of x_0 when x_T ~ N(0, I) goes down `timesteps` for data N(mean, cov).

    The optimal network is affine in x, so each step is x_prev = A x + b + sigma z. Of eq. 12 both
    predictions are taken, so that the first level may be 0.
    """
    identity = np.eye(len(mean))
    m, C = np.zeros(len(mean)), identity
    for t, t_prev in transitions(timesteps):
        ab, ab_prev = level(table, t), level(table, t_prev)

        sigma = ddim_sigma(ab, ab_prev, eta)

        def step(x, ab=ab, ab_prev=ab_prev, sigma=sigma):
            room = max(1 - ab_prev - sigma**2, 0.0)
            direction = math.sqrt(room) * gaussian_eps(x, ab, mean, cov)
            return math.sqrt(ab_prev) * gaussian_x0(x, ab, mean, cov) + direction

        b = step(np.zeros((1, len(mean))))[0]
        A = (step(identity) - b).T
        m, C = A @ m + b, A @ C @ A.T + sigma**2 * identity
    return m, C


def gaussian_flow(x, ab, mean, cov):
    """Where the exact ODE (eq. 14) takes x from level ab to clean data, for data N(mean, cov).

    With x_bar = x / sqrt(ab) and s^2 = (1 - ab) / ab each eigendirection solves
    dx_bar / ds = s (x_bar - mean) / (lambda + s^2), whose solution is
    x_bar - mean proportional to sqrt(lambda + s^2).
    """
    values, vectors = np.linalg.eigh(cov)
    s_squared = (1 - ab) / ab
    scale = (vectors * np.sqrt(values / (values + s_squared))) @ vectors.T
    return mean + (np.asarray(x, np.float64) / math.sqrt(ab) - mean) @ scale


def gaussian_flow_from_noise(x, mean, cov):
    """`gaussian_flow` from level 0, its limit: there x_bar and s are infinite, their ratio is x."""
    values, vectors = np.linalg.eigh(cov)
    return mean + np.asarray(x, np.float64) @ ((vectors * np.sqrt(values)) @ vectors.T)


def finite_eps(x, ab, data):
    """E[eps | x_t] for data drawn uniformly from the rows of `data` (n, d); x is (N, d)."""
    distance = np.sum((x[:, None] - math.sqrt(ab) * data) ** 2, -1)
    weights = np.exp(-(distance - distance.min(-1, keepdims=True)) / (2 * (1 - ab)))
    x0 = (weights / weights.sum(-1, keepdims=True)) @ data
    return (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)


def euler_in_s(eps_fn, table, x_T, timesteps):
    """Eq. 13 and 14: Euler's method for dx_bar = eps ds, in x_bar = x / sqrt(ab)."""

    def s(ab):
        return math.sqrt((1 - ab) / ab)

    x_bar = np.asarray(x_T, np.float64) / math.sqrt(level(table, int(timesteps[0])))
    for t, t_prev in transitions(timesteps):
        ab, ab_prev = level(table, t), level(table, t_prev)
        x_bar = x_bar + (s(ab_prev) - s(ab)) * eps_fn(x_bar / math.sqrt(s(ab) ** 2 + 1), t)
    return x_bar


# ----------------------------------------------------------------------------------------- latents


def slerp(a, b, fraction):
    """Eq. 67, for two vectors neither parallel nor opposite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    theta = math.acos(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    weight_a = math.sin((1 - fraction) * theta) / math.sin(theta)
    return weight_a * a + math.sin(fraction * theta) / math.sin(theta) * b
