"""DDIM's equation solved in four ways, on data whose exact flow is known (section 4.3).

The data are a one-dimensional mixture of Gaussians. Its ideal eps_fn is a closed form, and its flow
too: in one dimension a flow keeps every quantile, so x_0 is where the data's distribution function
is what the noise's is at x_T.

python experiments/compare_solvers.py
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import cli
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import panels
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from ddim_jax.ode import to_ode_coordinates
from ddim_jax.samplers import Sampler, Timesteps, ddim, sample
from ddim_jax.schedule import Schedule, Spacing, ddim_timesteps, linear_schedule
from ddim_jax.solvers import dpm_solver_pp_2m, heun, probability_flow_euler

WEIGHTS, MEANS, STD = (0.3, 0.5, 0.2), (-0.8, 0.1, 0.9), 0.15
"""The data."""

SOLVERS: dict[str, tuple[Sampler, int]] = {
    "DDIM": (ddim(), 1),
    "probability-flow Euler": (probability_flow_euler(), 1),
    "Heun": (heun(), 2),
    "DPM-Solver++(2M)": (dpm_solver_pp_2m(), 2),
}
"""Name -> method and its order in theory."""

FINE = 2**11
FEW_STEPS = 10


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Error of each solver against its network calls."""

    out: str = "out/solvers"
    """Where solvers.png and results.json go."""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Numbers of steps S on the paper's schedule."""
    spacing: Spacing = "quadratic"
    """Sub-sequence of time indices on the paper's schedule."""
    num_points: int = 400
    """Quantiles of x_T that are followed to x_0."""


def main(config: CompareConfig) -> None:
    """Solve, measure, plot."""
    cli.check_at_least(config, num_points=2)
    if len(config.steps) < 2:
        raise ValueError(f"steps must name at least two numbers of steps; got {config.steps}.")
    grids = {s: ddim_timesteps(1000, s, config.spacing) for s in sorted({*config.steps, FEW_STEPS})}
    with jax.enable_x64(True):  # errors of many steps are below float32's rounding
        x_T = jax.scipy.stats.norm.ppf((np.arange(config.num_points) + 0.5) / config.num_points)
        convergence = _convergence(x_T)
        schedule = Schedule(linear_schedule(1000).alphas_cumprod.astype(jnp.float64))
        ends = {
            s: {name: solve(sampler, schedule, x_T, grid) for name, (sampler, _) in SOLVERS.items()}
            for s, grid in grids.items()
        }
        exact = {s: exact_flow(x_T, schedule.alpha_bar(grid[0])) for s, grid in grids.items()}
        few = {
            name: [float(mean_error(ends[s][name], exact[s])) for s in sorted(set(config.steps))]
            for name in SOLVERS
        }
    for name, (_, theory) in SOLVERS.items():
        print(f"{name:24s} order {measured_order(*convergence[name]):.2f}, in theory {theory}")
    print(f"\n{_table(sorted(set(config.steps)), few)}")
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps(
            dataclasses.asdict(config) | {"convergence": convergence, "paper_schedule": few},
            indent=2,
        )
        + "\n"
    )
    _draw(out / "solvers.png", config, convergence, few, ends[FEW_STEPS])
    print(f"see {out / 'solvers.png'}")


def mixture_eps(x: Float[Array, "N"], alpha_bar: Float[Array, ""]) -> Float[Array, "N"]:
    """E[eps | x_t = x]: what a perfect network predicts."""
    var = alpha_bar * STD**2 + 1 - alpha_bar
    distance = x[:, None] - jnp.sqrt(alpha_bar) * jnp.array(MEANS)
    responsible = jax.nn.softmax(jnp.log(jnp.array(WEIGHTS)) - distance**2 / (2 * var))
    return jnp.sqrt(1 - alpha_bar) * (responsible * distance).sum(axis=-1) / var


def exact_flow(x_T: Float[Array, "N"], alpha_bar: Float[Array, ""]) -> Float[Array, "N"]:
    """x_0 of the exact solution of eq. 14 from x_T at this level, by bisection."""

    def distribution(x_bar, s):
        width = jnp.sqrt(STD**2 + s**2)
        return ndtr((x_bar[:, None] - jnp.array(MEANS)) / width) @ jnp.array(WEIGHTS)

    target = distribution(*to_ode_coordinates(x_T, alpha_bar))
    low, high = jnp.full_like(x_T, -3.0), jnp.full_like(x_T, 3.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(middle, 0.0) < target
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    return (low + high) / 2


def solve(
    sampler: Sampler, schedule: Schedule, x_T: Float[Array, "N"], timesteps: Timesteps
) -> Float[Array, "N"]:
    """x_0 of one solver."""

    def eps_fn(x, t):
        return mixture_eps(x, schedule.alpha_bar(t))

    return jax.jit(lambda x: sample(None, eps_fn, schedule, x, timesteps, sampler))(x_T)


def network_calls(name: str, num_steps: int) -> int:
    """Network calls of so many steps: Heun's method takes two in each but the last."""
    return 2 * num_steps - 1 if name == "Heun" else num_steps


def mean_error(x: Float[Array, "N"], exact: Float[Array, "N"]) -> Float[Array, ""]:
    """Mean absolute difference."""
    return jnp.abs(x - exact).mean()


def measured_order(calls: list[int], errors: list[float]) -> float:
    """Minus the slope of log error against log calls, over the second half of the points."""
    half = len(calls) // 2
    return float(-np.polyfit(np.log(calls[half:]), np.log(errors[half:]), 1)[0])


def _convergence(x_T: Float[Array, "N"]) -> dict[str, tuple[list[int], list[float]]]:
    """Solver -> network calls and errors, on levels evenly spaced in log s, where orders show."""
    s = np.geomspace(1e-5, 60, FINE + 1)
    schedule = Schedule(jnp.asarray(1 / (1 + s**2)))
    exact = exact_flow(x_T, schedule.alpha_bar(FINE))
    curves = {}
    for name, (sampler, _) in SOLVERS.items():
        calls, errors = [], []
        for num_steps in (8, 16, 32, 64, 128, 256):
            timesteps = np.arange(FINE, -1, -(FINE // num_steps))
            x_0 = solve(sampler, schedule, x_T, timesteps)
            calls.append(network_calls(name, len(timesteps)))
            errors.append(float(mean_error(x_0, exact)))
        curves[name] = (calls, errors)
    return curves


def _table(steps: list[int], errors: dict[str, list[float]]) -> str:
    """Markdown: mean errors on the paper's schedule."""
    lines = ["| S | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
    for name, values in errors.items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    return "\n".join(lines)


def _draw(path: pathlib.Path, config: CompareConfig, convergence, few, ends) -> None:
    """Convergence; the same methods in few steps of the paper's schedule; where samples end."""
    steps = sorted(set(config.steps))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for name, (calls, errors) in convergence.items():
        left.plot(calls, errors, marker="o", markersize=4, label=name)
        calls = [network_calls(name, s) for s in steps]
        middle.plot(calls, few[name], marker="o", markersize=4, label=name)
    for order, anchor in [(1, 0.9), (2, 3.0)]:
        calls = np.array([30.0, 300.0])
        left.plot(calls, anchor * calls ** float(-order), color="grey", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="network calls", ylabel="mean error of x_0")
    left.set_title("convergence (dotted: orders 1 and 2)", fontsize=10)
    left.legend(fontsize=8)
    middle.set(yscale="log", ylabel="mean error of x_0")
    middle.set_title(f"the paper's schedule, {config.spacing}", fontsize=10)
    panels.count_axis(middle, steps, "network calls")

    bins = np.linspace(-2.0, 2.0, 56)
    x = np.linspace(bins[0], bins[-1], 300)
    density = sum(
        w * np.exp(-((x - m) ** 2) / (2 * STD**2)) / (STD * np.sqrt(2 * np.pi))
        for w, m in zip(WEIGHTS, MEANS, strict=True)
    )
    right.fill_between(x, density, color="lightgrey", label="the data")
    for name in ("DDIM", "probability-flow Euler"):
        inside = np.clip(ends[name], bins[0], bins[-1])
        right.hist(inside, bins, density=True, histtype="step", linewidth=1.5, label=name)
    right.set_title(f"samples of S = {FEW_STEPS}", fontsize=10)
    right.set(xlabel="x_0", ylabel="density")
    right.legend(fontsize=8)
    panels.save(figure, path)


if __name__ == "__main__":
    cli.run(main, CompareConfig)
