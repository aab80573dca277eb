"""Fill the paper's tables: the distance of one model's samples over S and eta, and other numbers.

python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --num-samples 50000 \
    --steps 10 20 50 100 1000 --etas 0 0.2 0.5 1 sigma_hat --spacing quadratic
python experiments/fid_sweep.py table1-cifar10 --workdir W --stats stats.npz --out DIR
python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --seeds 0 1 2
python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --samplers heun \
    --guidance-scales 1 3 --spacings uniform quadratic --metrics frechet kid precision_recall

The rows are the product of samplers (and etas), guidance scales and spacings. One network
compilation for each S, spacing and guidance scale serves all etas and seeds. Image i depends on
(seed, i) alone; of several seeds the table has mean and spread. Every finished cell is a line in
DIR/results.jsonl; the cell under way is in DIR/partial.npz every few batches, so that a killed
sweep, called again, goes on from there to the same numbers. DIR/report.md and DIR/report.html show
them, beside the paper's for its own tables.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
import tyro
from common import cli, pictures
from common.measures import MetricOptions, check_different, open_measures
from common.options import ModelOptions, SpacingOptions
from common.sweep_draw import Drawer, image_programs, program_key
from common.sweep_page import write_report
from common.sweep_store import (
    Cell,
    Progress,
    append_result,
    cell_of,
    drop_other_times,
    find_settings,
    load_progress,
    read_results,
    save_progress,
    sweep_settings,
    write_settings,
)
from common.sweep_table import PaperTable, describe, duration

from ddim_jax.checks import NUM_SEEDS
from ddim_jax.files import only_one_process
from ddim_jax.parallel import index_batches
from ddim_jax.paths import File, Folder
from ddim_jax.runs import check_finite
from ddim_jax.runs.options import check_limits, option
from ddim_jax.schedule import Spacing
from ddim_jax.solvers import SAMPLERS, named_sampler

GRID_IMAGES = 64
OTHER_SAMPLERS = [name for name in SAMPLERS if name not in ("ddim", "sigma_hat")]
"""Those that are no etas."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(MetricOptions, SpacingOptions, ModelOptions):
    """One sweep of one model; every field is a command-line option."""

    stats: tuple[File, ...]
    """What make_statistics.py wrote; several files of different features measure the same
    samples."""
    out: Folder
    """Where results, sample grids and the report go. A sweep found there is continued."""
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000)
    """Numbers of sampling steps S, the columns of the table."""
    etas: tuple[float | Literal["sigma_hat"], ...] = (0.0, 0.2, 0.5, 1.0, "sigma_hat")
    """Its rows: 0 is DDIM, 1 is DDPM, sigma_hat DDPM's larger variance (appendix D.3)."""
    samplers: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"More rows, of other methods: {', '.join(OTHER_SAMPLERS)}."),
    ] = ()
    guidance_scales: tuple[float, ...] = (1.0,)
    """Each row once for each of these scales; others than 1 need a model with classes."""
    spacings: tuple[Spacing, ...] = ()
    """Each row once for each of these sub-sequences, in place of --spacing."""
    num_samples: int = option(50_000, at_least=2)
    """N, images behind each number: exactly as many."""
    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Image i depends on (seed, i) alone."""
    seeds: tuple[int, ...] = ()
    """Each cell once for each of these, in place of --seed: the table has their mean and spread."""
    batch_size: int | None = option(None, at_least=1)
    """Images drawn at once; if not given, what fits into the devices' memory."""
    save_every: int = option(10, at_least=1)
    """Batches between two saves of a cell under way."""
    save_images: bool = False
    """Also write every image as a PNG."""
    max_seconds: float | None = option(None, at_least=0)
    """Stop cleanly after this long; the next call goes on from there."""
    paper: PaperTable | None = None
    """Show these numbers of the paper in the report."""


_TABLE1 = SweepConfig(
    workdir=tyro.MISSING,
    stats=tyro.MISSING,
    out=tyro.MISSING,
    steps=(10, 20, 50, 100, 1000),
    etas=(0.0, 0.2, 0.5, 1.0, "sigma_hat"),
)
_TABLE3 = dataclasses.replace(_TABLE1, steps=(10, 20, 50, 100), etas=(0.0, 1.0), spacing="uniform")

TABLES: dict[str, tuple[str, SweepConfig]] = {
    "table1-cifar10": (
        "the paper's Table 1, CIFAR-10",
        dataclasses.replace(_TABLE1, spacing="quadratic", paper="cifar10"),
    ),
    "table1-celeba": (
        "the paper's Table 1, CelebA 64x64",
        dataclasses.replace(_TABLE1, spacing="uniform", paper="celeba64"),
    ),
    "table3-bedroom": (
        "the paper's Table 3, LSUN bedroom 256x256",
        dataclasses.replace(_TABLE3, paper="bedroom"),
    ),
    "table3-church": (
        "the paper's Table 3, LSUN church 256x256",
        dataclasses.replace(_TABLE3, paper="church"),
    ),
}


class Sweep(NamedTuple):
    """All that is known before anything is written."""

    config: SweepConfig
    out: pathlib.Path
    drawer: Drawer
    cells: list[Cell]
    deadline: float


def main(config: SweepConfig) -> None:
    """Measure the cells that are missing, then write the report."""
    check_limits(config)
    started = time.monotonic()
    check_different("stats", config.stats)
    rows = _rows(config)
    config.named_metrics()
    run = config.load()
    cells = [
        Cell(num_steps, sampler, eta, scale, spacing, seed)
        for seed in _seeds(config)  # outermost: a whole table of one seed comes first
        for num_steps in config.steps
        for spacing in config.spacings or (config.spacing or run.spec.spacing,)
        for scale in config.guidance_scales
        for sampler, eta in rows
    ]
    measures = open_measures(config.stats, config, run.spec.image_shape)
    sweep = Sweep(
        config=config,
        out=pathlib.Path(config.out),
        drawer=Drawer(run, measures, image_programs(run.spec, cells)),
        cells=cells,
        deadline=started + (float("inf") if config.max_seconds is None else config.max_seconds),
    )
    with only_one_process(sweep.out):
        _measure_missing(sweep)
        write_report(sweep.out, config.paper)
    print(f"{time.monotonic() - started:.0f} s in this call; see {sweep.out / 'report.html'}")


def _rows(config: SweepConfig) -> list[tuple[str, float | None]]:
    """The samplers and their etas. Raises ValueError for settings that make no table."""
    check_different("steps", config.steps)
    check_different("guidance_scales", config.guidance_scales)
    if config.spacings:
        check_different("spacings", config.spacings)
        if config.spacing is not None:
            raise ValueError(
                f"spacing and spacings must not both be given; got {config.spacing} and "
                f"{config.spacings}. Name them all in spacings."
            )
    if "ddim" in config.samplers:
        raise ValueError("samplers must not name ddim, whose rows are etas; give etas 0 for DDIM.")
    check_different(
        "etas and samplers" if config.samplers else "etas", (*config.etas, *config.samplers)
    )
    rows: list[tuple[str, float | None]] = [
        ("sigma_hat", None) if eta == "sigma_hat" else ("ddim", float(eta)) for eta in config.etas
    ]
    rows += [(name, None) for name in config.samplers]
    for name, eta in rows:
        named_sampler(name, eta or 0.0)  # refuses an unknown name, and an eta below 0
    return rows


def _seeds(config: SweepConfig) -> tuple[int, ...]:
    """The seeds. Raises ValueError for --seeds that are none."""
    if not config.seeds:
        return (config.seed,)
    check_different("seeds", config.seeds)
    if config.seed != 0:
        raise ValueError(
            f"seed and seeds must not both be given; got {config.seed} and {config.seeds}. Name "
            "them all in seeds."
        )
    if wrong := [seed for seed in config.seeds if not 0 <= seed < NUM_SEEDS]:
        raise ValueError(f"seeds must be in [0, {NUM_SEEDS - 1}]; got {wrong[0]}.")
    return config.seeds


def _measure_missing(sweep: Sweep) -> None:
    """Measure the cells of which there are no results, until time is up."""
    config, out, drawer = sweep.config, sweep.out, sweep.drawer
    wanted = sweep_settings(drawer.run, drawer.measures, config.num_samples, config.kept_features)
    there = find_settings(out, wanted, config.batch_size, drawer.run, config.dtype) or {}
    drop_other_times(out, sweep.cells, drawer.run.spec.schedule.num_steps)
    done = {cell_of(line) for line in read_results(out)}
    missing = [cell for cell in sweep.cells if cell not in done]
    if not there and not missing:
        return
    batch_size = there.get("batch_size") or config.batch_size or _fitting_batch_size(sweep, missing)
    settings = wanted | {
        "batch_size": batch_size,
        "spacing": there.get("spacing", sweep.cells[0].spacing),
        "seed": there.get("seed", sweep.cells[0].seed),
    }
    write_settings(out, settings)
    _print_estimate(sweep, missing, batch_size)
    compiled = set()
    for cell in missing:
        if program_key(cell) not in compiled:  # so that its seconds are sampling alone
            drawer.seconds_of_one(cell, batch_size)
            compiled.add(program_key(cell))
        progress = _measure(
            sweep, cell, cell.name(settings["spacing"], settings["seed"]), batch_size
        )
        if progress.count == config.num_samples:
            line = append_result(out, cell, progress, drawer.measures, settings)
            print(describe(line), flush=True)
        if time.monotonic() > sweep.deadline:
            print("stopped, time is up; call again for what is missing")
            break


def _fitting_batch_size(sweep: Sweep, missing: list[Cell]) -> int:
    """A batch size at which the devices' memory suffices for the cells."""
    hungriest = max(missing, key=lambda cell: cell.guidance_scale != 1)
    devices = jax.local_device_count()
    share = min(256, -(-sweep.config.num_samples // devices))
    while True:
        try:
            sweep.drawer.seconds_of_one(hungriest, share * devices)
            return share * devices
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or share == 1:
                raise
        print(f"batches of {share * devices} do not fit into memory; trying half", flush=True)
        share //= 2


def _print_estimate(sweep: Sweep, missing: list[Cell], batch_size: int) -> None:
    """Say how long the cells will take, from one batch of the shortest of them."""
    if not missing:
        return
    shortest = min(missing, key=Cell.network_calls)
    sweep.drawer.seconds_of_one(shortest, batch_size)
    seconds = sweep.drawer.seconds_of_one(shortest, batch_size)
    calls = sum(cell.network_calls() for cell in missing)
    num_samples = sweep.config.num_samples
    total = seconds * calls / shortest.network_calls() * -(-num_samples // batch_size)
    print(
        f"{len(missing)} cells of {num_samples} images to measure: about {duration(total)} on "
        f"{jax.local_device_count()} {jax.devices()[0].device_kind}, from {seconds:.2f} s for a "
        f"batch of {batch_size} at S = {shortest.num_steps}",
        flush=True,
    )


def _measure(sweep: Sweep, cell: Cell, name: str, batch_size: int) -> Progress:
    """Draw and measure the cell from where it stands, until it is done or time is up."""
    config, out, measures = sweep.config, sweep.out, sweep.drawer.measures
    progress = load_progress(out, name, measures)
    before, started = progress.seconds, time.monotonic()
    # Whole batches, the last one too: then every call runs the same program, to the same bits.
    whole = -(-config.num_samples // batch_size) * batch_size
    batches = [
        indices
        for indices in index_batches(whole, batch_size, progress.count)
        if indices[0] < config.num_samples  # none is left of a cell that was killed at its end
    ]
    drawn = sweep.drawer.draw(cell, batches, lambda indices: indices[0] == 0 or config.save_images)
    for number, (indices, batch) in enumerate(zip(batches, drawn, strict=True), 1):
        indices = indices[indices < config.num_samples]
        images, finite, features = batch.first(len(indices))
        check_finite(finite)
        if images is not None:
            _keep_pictures(sweep, name, indices, np.asarray(images))
        states = {
            measure.name: measure.update(
                progress.states[measure.name], features[measure.name], indices
            )
            for measure in measures
        }
        count = progress.count + len(indices)
        progress = Progress(count, before + time.monotonic() - started, states)
        out_of_time = time.monotonic() > sweep.deadline
        if out_of_time or number % config.save_every == 0:
            save_progress(out, name, progress)
        if out_of_time:
            break
    return progress


def _keep_pictures(sweep: Sweep, name: str, indices: np.ndarray, images: np.ndarray) -> None:
    """The grid of the first images; every image if asked for."""
    if indices[0] == 0:
        pictures.save_grid(sweep.out / "samples" / f"{name}.png", images[:GRID_IMAGES])
    if sweep.config.save_images:
        for i, image in zip(indices, images, strict=True):
            pictures.save_png(sweep.out / "images" / name / f"{i:06d}.png", image)


if __name__ == "__main__":
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    cli.run(main, SweepConfig, TABLES if named else None)
