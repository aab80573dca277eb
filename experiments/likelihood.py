"""The variational bound on -log2 p(image), in bits per dimension, term by term (eq. 11).

python experiments/likelihood.py --workdir runs/digits
python experiments/likelihood.py --workdir runs/cifar10 --data cifar10 --num-images 10000
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
import real
from workdir import Network, Weights, load_trained

from ddim_jax.bound import BoundTerms, fixed_large_sigmas, process_sigmas, variational_bound
from ddim_jax.data import to_model_range
from ddim_jax.keys import image_keys
from ddim_jax.parallel import over_devices
from ddim_jax.samplers import Timesteps
from ddim_jax.schedule import Spacing, ddim_timesteps


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
    """The bound J_sigma of a split, for DDPM's two variances and for other eta."""

    workdir: str
    """The model: a folder that train.py or convert.py wrote."""
    out: str = "out/likelihood"
    """Where likelihood.png and results.json go."""
    data: str | None = None
    """digits, a TFDS name, a folder or a .npz file; the model's training data if not given."""
    split: str = "test"
    """Which part of the data to measure on."""
    data_dir: str | None = None
    """Where TFDS sets stand."""
    num_images: int | None = 64
    """The first so many images of the split; None for the whole split."""
    etas: tuple[float, ...] = (0.8, 0.5)
    """Processes beside fixed_small (eta = 1) and fixed_large; each must be above 0."""
    num_sample_steps: int | None = None
    """S, the number of steps; all of the trained schedule if not given."""
    spacing: Spacing = "uniform"
    """Sub-sequence of time indices; must not repeat one."""
    seed: int = 0
    """Of the noise: image i's depends on (seed, i) alone."""
    batch_size: int = 250
    """Images measured at once."""
    weights: Weights = "ema"
    """The averaged weights, or the raw ones."""


def main(config: LikelihoodConfig) -> None:
    """Measure, print, plot."""
    cli.check_at_least(config, batch_size=1)
    trained = load_trained(config.workdir, config.weights)
    network = trained.network
    num_steps = config.num_sample_steps
    if num_steps is None:
        num_steps = network.schedule.num_steps
    timesteps = ddim_timesteps(network.schedule.num_steps, num_steps, config.spacing)
    small = process_sigmas(network.schedule, timesteps)
    # name -> stds of the process q and of the model p
    processes = {
        "fixed_small (eta = 1)": (small, small),
        "fixed_large": (small, fixed_large_sigmas(network.schedule, timesteps)),
    }
    for eta in config.etas:
        sigma = process_sigmas(network.schedule, timesteps, eta)
        processes[f"eta = {eta:g}"] = (sigma, sigma)
    source = real.open_source(config.workdir, network, config.data, config.split, config.data_dir)
    images = real.first(source, config.num_images)

    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    program = bound_program(network, timesteps, list(processes.values()), config.seed)
    indices = np.arange(len(images.image))
    terms = real.over_batches(program, trained.params, config.batch_size, *images, indices)
    rows = [_row(name, jax.tree.map(lambda a, i=i: a[:, i], terms)) for i, name in
            enumerate(processes)]  # fmt: skip
    if not all(np.isfinite(row["total"]) for row in rows):
        raise FloatingPointError(
            "a bound is not finite: an eta adds more noise than a step has room for "
            f"(sigma^2 > 1 - alpha_bar_prev), or the weights diverged. {_table(rows)}"
        )
    print(_table(rows))
    print(
        f"\nBits per dimension, mean over {len(indices)} images of {source.name}, split "
        f"{config.split}, and standard error over images; S = {num_steps} {config.spacing}, "
        f"{config.weights} weights of step {trained.step}, seed {config.seed}."
    )
    (out / "results.json").write_text(
        json.dumps(
            dataclasses.asdict(config) | {"timesteps": timesteps.tolist(), "rows": rows}, indent=2
        )
        + "\n"
    )
    _draw(out / "likelihood.png", rows, timesteps)
    print(f"see {out / 'likelihood.png'}")


def bound_program(
    network: Network, timesteps: Timesteps, sigmas: list[tuple[jax.Array, jax.Array]], seed: int
):
    """(params, uint8 images, labels, indices) -> BoundTerms with leading axes image, process."""
    of_process, of_model = (jnp.stack(stds) for stds in zip(*sigmas, strict=True))

    def bound(params, image, label, index):
        eps_fn = network.eps_fn(params, label)
        keys = image_keys(jax.random.key(seed), index)
        # x_t does not depend on sigma, so under vmap the network is evaluated once for all.
        terms = jax.vmap(
            lambda sigma, model_sigma: variational_bound(
                keys,
                eps_fn,
                network.schedule,
                to_model_range(image),
                timesteps,
                sigma,
                model_sigma,
            )
        )(of_process, of_model)
        return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), terms)

    return over_devices(bound)


def _row(name: str, terms: BoundTerms) -> dict:
    """Means over images of one process's terms, prior (N,), steps (N, S - 1), decoder (N,)."""
    total = terms.prior + terms.steps.sum(axis=1) + terms.decoder
    return {
        "process": name,
        "prior": float(terms.prior.mean()),
        "steps": float(terms.steps.sum(axis=1).mean()),
        "decoder": float(terms.decoder.mean()),
        "total": float(total.mean()),
        "standard_error": float(total.std() / np.sqrt(len(total))),
        "each_step": terms.steps.mean(axis=0).tolist(),
    }


def _table(rows: list[dict]) -> str:
    lines = ["| process | prior | steps | decoder | total |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['process']} | {r['prior']:.5f} | {r['steps']:.4f} | {r['decoder']:.4f} | "
        f"{r['total']:.4f} ± {r['standard_error']:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _draw(path: pathlib.Path, rows: list[dict], timesteps: np.ndarray) -> None:
    """Left the sums of the terms, right each step's KL."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(1, 1.3), layout="constrained"
    )
    names = [row["process"] for row in rows]
    bottom = np.zeros(len(rows))
    for term in ("decoder", "steps", "prior"):
        values = np.array([row[term] for row in rows])
        left.barh(names, values, left=bottom, label=term)
        bottom += values
    for i, total in enumerate(bottom):
        left.text(total, i, f" {total:.2f}", va="center", fontsize=9)
    left.invert_yaxis()
    left.set(xlabel="bits per dimension", xlim=(0, 1.15 * bottom.max()))
    left.legend(fontsize=8)
    for row in rows:
        right.plot(timesteps[:-1], row["each_step"], label=row["process"])
    right.set(xscale="log", yscale="log", xlabel="index t the step starts from")
    right.set_ylabel("KL of one step, bits per dimension")
    right.legend(fontsize=8)
    panels.save(figure, path)


if __name__ == "__main__":
    cli.run(main, LikelihoodConfig)
