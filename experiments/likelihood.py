"""The variational bound on -log2 p(image), in bits per dimension, term by term (eq. 11).

python experiments/likelihood.py --workdir runs/digits
python experiments/likelihood.py --workdir runs/cifar10 --data cifar10 --num-images 10000
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TypeAlias

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import cli, figures, real
from common.exact import exact
from common.options import DrawOptions, ModelOptions, RealImageOptions
from common.progress import Progress
from common.results import write_results

from ddim_jax.bound import BoundTerms, fixed_large_sigmas, process_sigmas, variational_bound
from ddim_jax.checks import NUM_SEEDS
from ddim_jax.keys import image_keys, seed_key
from ddim_jax.parallel import DeviceProgram, Devices, map_rows, over_devices
from ddim_jax.paths import Folder
from ddim_jax.runs import RunParams, RunSpec
from ddim_jax.runs.options import MAX_BATCH, check_limits, option
from ddim_jax.schedule import Spacing
from ddim_jax.types import Timesteps

Stds: TypeAlias = tuple[jax.Array, jax.Array]
"""Of each step, those of the process q and of the model p."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(DrawOptions, RealImageOptions, ModelOptions):
    """The bound J_sigma of a split, for DDPM's two variances and for other eta."""

    out: Folder = "out/likelihood"
    """Where likelihood.png and results.json go."""
    num_images: int | None = option(None, at_least=1)
    """The first so many images of the split, 64 if not given."""
    etas: tuple[float, ...] = (0.8, 0.5)
    """Processes beside fixed_small (eta = 1) and fixed_large; each must be above 0."""
    num_sample_steps: int | None = option(None, at_least=1)
    """S, the number of steps; all of the trained schedule if not given."""
    spacing: Spacing = "uniform"
    """Sub-sequence of time indices; must not repeat one."""
    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Of the noise: image i's depends on (seed, i) alone."""
    batch_size: int = option(250, at_least=1, below=MAX_BATCH)
    """Images measured at once."""


def main(config: LikelihoodConfig) -> None:
    """Measure, print, plot."""
    check_limits(config)
    run = config.load()
    spec = run.spec
    if not spec.codec.is_identity:
        raise ValueError(
            "codec must be the identity, since the bound counts bits of 8-bit pixels and a codec "
            f"stands between those and what the network sees; {config.workdir} has "
            f"{type(spec.codec).__name__}. Give a model of pixels."
        )
    timesteps = spec.timesteps(config.num_sample_steps or spec.schedule.num_steps, config.spacing)
    processes = _processes(spec, timesteps, config.etas)
    data = real.open_source(config.workdir, spec, config)
    images = real.first(data.source, config.num_images, 64)

    program = bound_program(spec, timesteps, list(processes.values()), config.seed)
    indices = np.arange(len(images.image))
    with Progress("likelihood.py", len(indices), "images") as progress:
        terms = map_rows(
            program, run.params, config.batch_size, *images, indices, on_rows=progress.add
        )
    rows = [_row(name, jax.tree.map(lambda a, i=i: a[:, i], terms)) for i, name in
            enumerate(processes)]  # fmt: skip
    if not all(np.isfinite(row["total"]) for row in rows):
        raise FloatingPointError(
            "a bound is not finite: an eta adds more noise than a step has room for "
            f"(sigma^2 > 1 - alpha_bar_prev), or the weights diverged. {_table(rows)}"
        )
    print(_table(rows))
    print(
        f"\nBits per dimension, mean over {len(indices)} images of {data.source.name}, "
        f"{data}, and standard error over images; S = {len(timesteps)} {config.spacing}, "
        f"{'x0 clipped, ' if config.clip_x0 else ''}"
        f"{run.weights_called}, seed {config.seed}, run {run.fingerprint_id}."
    )
    out = pathlib.Path(config.out)
    write_results(
        out, config, {"split": data.split, "timesteps": timesteps.tolist(), "rows": rows}, run
    )
    _draw(out / "likelihood.png", rows, timesteps, len(indices))
    print(f"see {out / 'likelihood.png'}")


def _processes(spec: RunSpec, timesteps: Timesteps, etas: tuple[float, ...]) -> dict[str, Stds]:
    """Name -> stds."""
    small = process_sigmas(spec.schedule, timesteps)
    processes = {
        "fixed_small (eta = 1)": (small, small),
        "fixed_large": (small, fixed_large_sigmas(spec.schedule, timesteps)),
    }
    for eta in etas:
        sigma = process_sigmas(spec.schedule, timesteps, eta)
        processes[f"eta = {exact(eta)}"] = (sigma, sigma)
    return processes


def bound_program(
    spec: RunSpec,
    timesteps: Timesteps,
    sigmas: list[Stds],
    seed: int,
    devices: Devices | None = None,
) -> DeviceProgram:
    """(params, uint8 images, labels, indices) -> BoundTerms with leading axes image, process."""
    of_process, of_model = (jnp.stack(stds) for stds in zip(*sigmas, strict=True))

    def bound(params: RunParams, image, label, index):
        eps_fn, x_0 = spec.denoiser(params, label), spec.encode(params, image)
        keys = image_keys(seed_key(seed), index)
        # x_t does not depend on sigma, so under vmap the network is evaluated once for all.
        terms = jax.vmap(
            lambda sigma, model_sigma: variational_bound(
                keys, eps_fn, spec.schedule, x_0, timesteps, sigma, model_sigma
            )
        )(of_process, of_model)
        return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), terms)

    return over_devices(bound, devices)


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
        "each_step_error": (terms.steps.std(axis=0) / np.sqrt(len(total))).tolist(),
    }


def _table(rows: list[dict]) -> str:
    lines = ["| process | prior | steps | decoder | total |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['process']} | {r['prior']:.5f} | {r['steps']:.4f} | {r['decoder']:.4f} | "
        f"{r['total']:.4f} ± {r['standard_error']:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _draw(path: pathlib.Path, rows: list[dict], timesteps: np.ndarray, num_images: int) -> None:
    """Left the sums of the terms, right each step's KL."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(1, 1.3), layout="constrained"
    )
    names = [row["process"] for row in rows]
    bottom = np.zeros(len(rows))
    for term in ("decoder", "steps", "prior"):
        values = np.array([row[term] for row in rows])
        label = f"prior ({values.max():.1e})" if term == "prior" else term
        left.barh(names, values, left=bottom, label=label)
        bottom += values
    for i, total in enumerate(bottom):
        left.text(total, i, f" {total:.2f}", va="center", fontsize=9)
    left.invert_yaxis()
    left.set(xlabel="bits per dimension", xlim=(0, 1.25 * bottom.max()))
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    for i, row in enumerate(rows):
        mean, error = np.array(row["each_step"]), np.array(row["each_step_error"])
        # One may lie below another: the later ones are dashed, and let it through.
        right.plot(timesteps[:-1], mean, label=row["process"], dashes=(6, 2 * i) if i else ())
        right.fill_between(timesteps[:-1], np.maximum(mean - error, mean / 10), mean + error,
                           alpha=0.25, linewidth=0)  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="index t the step starts from")
    right.set_ylabel("KL of one step, bits per dimension")
    right.set_title(f"mean over {num_images} images; shaded: ± its standard error", fontsize=10)
    right.legend(fontsize=8)
    figures.save(figure, path)


if __name__ == "__main__":
    cli.run(main, LikelihoodConfig)
