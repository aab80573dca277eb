"""Samplers on data whose exact flow is known: how fast each nears DDIM's equation (section 4.3).

The data are a one-dimensional mixture of Gaussians. Its ideal eps_fn is a closed form, and its flow
too: in one dimension a flow keeps every quantile, so x_0 is where the data's distribution function
is what the noise's is at x_T. A sampler that adds noise draws from the same data, but not along
this flow; its error does not fall.

python experiments/compare_solvers.py
python experiments/compare_solvers.py --samplers ddim heun ddpm
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import cli, figures
from common.progress import Progress
from common.results import write_results
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from ddim_jax.ode import to_ode_coordinates
from ddim_jax.paths import Folder
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import Sampler, sample
from ddim_jax.schedule import Schedule, Spacing, ddim_timesteps, linear_schedule
from ddim_jax.solvers import SAMPLERS, named_sampler
from ddim_jax.types import Timesteps

WEIGHTS, MEANS, STD = (0.3, 0.5, 0.2), (-0.8, 0.1, 0.9), 0.15
"""The data."""

LABELS = {
    "ddim": "DDIM",
    "probability_flow_euler": "probability-flow Euler",
    "heun": "Heun",
    "dpm_solver_pp_2m": "DPM-Solver++(2M)",
}
"""Sampler -> its name in figures and tables, if not the sampler's own."""

ORDERS = {"ddim": 1, "probability_flow_euler": 1, "heun": 2, "dpm_solver_pp_2m": 2}
"""Sampler -> its order in theory, where it has one."""

CONVERGENCE_STEPS = (8, 16, 32, 64, 128, 256)
FINE = 2**11
FEW_STEPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Error of each sampler against its network calls."""

    out: Folder = "out/solvers"
    """Where solvers.png and results.json go."""
    samplers: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"The methods, from {', '.join(SAMPLERS)}.")
    ] = tuple(LABELS)
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Numbers of steps S on the paper's schedule."""
    spacing: Spacing = "quadratic"
    """Sub-sequence of time indices on the paper's schedule."""
    num_points: int = option(400, at_least=2, below=10_001)
    """Quantiles of x_T that are followed to x_0."""


def main(config: CompareConfig) -> None:
    """Solve, measure, plot."""
    check_limits(config)
    if len(config.steps) < 2:
        raise ValueError(f"steps must name at least two numbers of steps; got {config.steps}.")
    if not config.samplers:
        raise ValueError("samplers must name at least one sampler; got none.")
    names = list(dict.fromkeys(config.samplers))
    samplers = {LABELS.get(name, name): named_sampler(name) for name in names}
    steps = sorted(set(config.steps))
    solves = len(samplers) * (len(CONVERGENCE_STEPS) + len({*steps, FEW_STEPS}))
    # Errors of many steps are below float32's rounding.
    with jax.enable_x64(True), Progress("compare_solvers.py", solves, "solutions") as progress:
        x_T = jax.scipy.stats.norm.ppf((np.arange(config.num_points) + 0.5) / config.num_points)
        convergence = _convergence(samplers, x_T, progress)
        few, ends = _on_the_papers_schedule(samplers, x_T, steps, config.spacing, progress)
    for name, label in zip(names, samplers, strict=True):
        order, theory = measured_order(*convergence[label]), ORDERS.get(name, "none known")
        print(f"{label:24s} order {order:.2f}, in theory {theory}")
    print(f"\n{_table(steps, few)}")
    out = pathlib.Path(config.out)
    write_results(out, config, {"convergence": convergence, "paper_schedule": few})
    calls = {name: [s.network_calls(n) for n in steps] for name, s in samplers.items()}
    _draw(out / "solvers.png", config, convergence, calls, few, ends)
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
    """x_0 of one sampler; the key is for those that add noise."""

    def eps_fn(x, t):
        return mixture_eps(x, schedule.alpha_bar(t))

    key = jax.random.key(0)
    return jax.jit(lambda x: sample(key, eps_fn, schedule, x, timesteps, sampler))(x_T)


def mean_error(x: Float[Array, "N"], exact: Float[Array, "N"]) -> Float[Array, ""]:
    """Mean absolute difference."""
    return jnp.abs(x - exact).mean()


def measured_order(calls: list[int], errors: list[float]) -> float:
    """Minus the slope of log error against log calls, over the second half of the points."""
    half = len(calls) // 2
    return float(-np.polyfit(np.log(calls[half:]), np.log(errors[half:]), 1)[0])


def _convergence(
    samplers: dict[str, Sampler], x_T: Float[Array, "N"], progress: Progress
) -> dict[str, tuple[list[int], list[float]]]:
    """Sampler -> network calls and errors, on levels evenly spaced in log s, where orders show."""
    s = np.geomspace(1e-5, 60, FINE + 1)
    schedule = Schedule(jnp.asarray(1 / (1 + s**2)))
    exact = exact_flow(x_T, schedule.alpha_bar(FINE))
    curves = {}
    for name, sampler in samplers.items():
        calls, errors = [], []
        for num_steps in CONVERGENCE_STEPS:
            timesteps = np.arange(FINE, -1, -(FINE // num_steps))
            x_0 = solve(sampler, schedule, x_T, timesteps)
            calls.append(sampler.network_calls(len(timesteps)))
            errors.append(float(mean_error(x_0, exact)))
            progress.add(1)
        curves[name] = (calls, errors)
    return curves


def _on_the_papers_schedule(
    samplers: dict[str, Sampler],
    x_T: Float[Array, "N"],
    steps: list[int],
    spacing: Spacing,
    progress: Progress,
) -> tuple[dict[str, list[float]], dict[str, Float[Array, "N"]]]:
    """Sampler -> its error for each S; sampler -> x_0 of FEW_STEPS."""
    schedule = Schedule(linear_schedule(1000).alphas_cumprod.astype(jnp.float64))
    grids = {s: ddim_timesteps(1000, s, spacing) for s in sorted({*steps, FEW_STEPS})}
    ends: dict[int, dict[str, Float[Array, "N"]]] = {s: {} for s in grids}
    for s, grid in grids.items():
        for name, sampler in samplers.items():
            ends[s][name] = solve(sampler, schedule, x_T, grid)
            progress.add(1)
    exact = {s: exact_flow(x_T, schedule.alpha_bar(grid[0])) for s, grid in grids.items()}
    errors = {
        name: [float(mean_error(ends[s][name], exact[s])) for s in steps] for name in samplers
    }
    return errors, ends[FEW_STEPS]


def _table(steps: list[int], errors: dict[str, list[float]]) -> str:
    """Markdown: mean errors on the paper's schedule."""
    lines = ["| S | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
    for name, values in errors.items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    return "\n".join(lines)


def _draw(path: pathlib.Path, config: CompareConfig, convergence, calls, few, ends) -> None:
    """Convergence; the same methods in few steps of the paper's schedule; where samples end."""
    steps = sorted(set(config.steps))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for name, (num_calls, errors) in convergence.items():
        left.plot(num_calls, errors, marker="o", markersize=4, label=name)
        middle.plot(calls[name], few[name], marker="o", markersize=4, label=name)
    for order, anchor in [(1, 0.9), (2, 3.0)]:
        ends_of_line = np.array([30.0, 300.0])
        left.plot(ends_of_line, anchor * ends_of_line ** float(-order), color="grey", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="network calls", ylabel="mean error of x_0")
    left.set_title("convergence (dotted: orders 1 and 2)", fontsize=10)
    left.legend(fontsize=8)
    middle.set(yscale="log", ylabel="mean error of x_0")
    middle.set_title(f"the paper's schedule, {config.spacing}", fontsize=10)
    figures.count_axis(middle, steps, "network calls")

    bins = np.linspace(-2.0, 2.0, 56)
    x = np.linspace(bins[0], bins[-1], 300)
    density = sum(
        w * np.exp(-((x - m) ** 2) / (2 * STD**2)) / (STD * np.sqrt(2 * np.pi))
        for w, m in zip(WEIGHTS, MEANS, strict=True)
    )
    right.fill_between(x, density, color="lightgrey", label="the data")
    for name in list(ends)[:2]:
        x_0 = np.asarray(ends[name])
        outside = (np.abs(x_0) > bins[-1]).mean()
        label = f"{name}, {outside:.0%} of it outside" if outside else name
        share = np.full(len(x_0), 1 / (len(x_0) * (bins[1] - bins[0])))  # of all, outside too
        right.hist(x_0, bins, weights=share, histtype="step", linewidth=1.5, label=label)
    right.set_title(f"density of the samples of S = {FEW_STEPS}", fontsize=10)
    right.set(xlabel="x_0", ylabel="density", ylim=(0, 1.35 * float(np.max(density))))
    right.legend(fontsize=8, loc="upper right")
    figures.save(figure, path)


if __name__ == "__main__":
    cli.run(main, CompareConfig)
