"""Fill the paper's tables: the distance of one model's samples over S and eta, and other numbers.

python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --num-samples 50000 \
    --steps 10 20 50 100 1000 --etas 0 0.2 0.5 1 sigma_hat --spacing quadratic
python experiments/fid_sweep.py table1-cifar10 --workdir W --stats stats.npz --out DIR
python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --seeds 0 1 2
python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --samplers heun \
    --guidance-scales 1 3 --spacings uniform quadratic --metrics frechet kid precision_recall
python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --timesteps 999,749,499,249

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
from typing import Annotated, Literal

import tyro
from common import cli, times
from common.measures import MetricOptions, check_different, check_seeds, open_measures
from common.options import ModelOptions, SpacingOptions
from common.sweep_about import about, command_of
from common.sweep_draw import Drawer, image_programs
from common.sweep_measure import Sweep, fitting_costs, measure_cells, print_estimate
from common.sweep_page import write_report
from common.sweep_store import (
    Cell,
    cell_of,
    drop_other_times,
    find_settings,
    load_progress,
    read_results,
    sweep_settings,
    under_way,
    write_settings,
)
from common.sweep_table import PaperTable
from common.sweep_time import Clock, process_seconds

from ddim_jax.checks import NUM_SEEDS
from ddim_jax.files import clear_leftovers, only_one_process
from ddim_jax.metrics.origin import Origin
from ddim_jax.paths import File, Folder
from ddim_jax.runs import read_config
from ddim_jax.runs.measure import crop_of
from ddim_jax.runs.options import MAX_BATCH, check_limits, option
from ddim_jax.runs.stop import stop_signals
from ddim_jax.schedule import Spacing
from ddim_jax.solvers import SAMPLERS, named_sampler

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
    timesteps: tuple[str, ...] = ()
    """Own lists of time indices, from noise to data, such as 900,600,300,0: each row once more for
    each list, in the column of its length."""
    num_samples: int = option(50_000, at_least=2)
    """N, images behind each number: exactly as many."""
    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Image i depends on (seed, i) alone."""
    seeds: tuple[int, ...] = ()
    """Each cell once for each of these, in place of --seed: the table has their mean and spread."""
    batch_size: int | None = option(None, at_least=1, below=MAX_BATCH)
    """Images drawn at once; if not given, what fits into the devices' memory."""
    save_every: int = option(10, at_least=1)
    """Batches between two saves of a cell under way."""
    save_images: bool = False
    """Also write every image as a PNG, in a folder for each cell, which fid.py and other tools
    measure; for all cells of a sweep or for none."""
    max_seconds: float | None = option(None, at_least=0)
    """Stop cleanly after this long, all told: what would not be done in time is not begun, but for
    one batch. The next call goes on from there."""
    paper: PaperTable | None = None
    """Show these numbers of the paper in the report."""


_TABLE1 = SweepConfig(
    workdir=tyro.MISSING,
    stats=tyro.MISSING,
    out=tyro.MISSING,
    steps=(10, 20, 50, 100, 1000),
    etas=(0.0, 0.2, 0.5, 1.0, "sigma_hat"),
)
_TABLE3 = dataclasses.replace(_TABLE1, etas=(0.0, 1.0), spacing="uniform")

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


def main(config: SweepConfig, started: float | None = None) -> None:
    """Measure the cells that are missing, then write the report.

    `started`, by time.monotonic(), is when the call began, if that was before.
    """
    check_limits(config)
    clock = Clock(time.monotonic() if started is None else started, config.max_seconds)
    check_different("stats", config.stats)
    rows = _rows(config)
    config.named_metrics()
    run = config.load()
    cells = [
        Cell(num_steps, sampler, eta, scale, spacing, seed)
        for seed in _seeds(config)  # outermost: a whole table of one seed comes first
        for num_steps, spacing in _grids(config, run.spec.spacing)
        for scale in config.guidance_scales
        for sampler, eta in rows
    ]
    drawn = Origin(lossy=0.0, crop=crop_of(read_config(config.workdir)))
    measures = open_measures(config.stats, config, run.spec.image_shape, drawn)
    sweep = Sweep(
        out=pathlib.Path(config.out),
        drawer=Drawer(run, measures, image_programs(run.spec, cells)),
        cells=cells,
        num_samples=config.num_samples,
        save_every=config.save_every,
        save_images=config.save_images,
        clock=clock,
    )
    with only_one_process(sweep.out), stop_signals("finishing this batch and keeping it") as stop:
        clock.stop = stop
        clear_leftovers(*(sweep.out / "images").glob("*"))
        _measure_missing(sweep, config)
        write_report(sweep.out, config.paper)
    print(f"{clock.seconds():.0f} s in this call; see {sweep.out / 'report.html'}")


def _rows(config: SweepConfig) -> list[tuple[str, float | None]]:
    """The samplers and their etas. Raises ValueError for settings that make no table."""
    if config.steps or not config.timesteps:
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


def _grids(config: SweepConfig, own: Spacing) -> list[tuple[int, str]]:
    """S and spacing, or own list, of each column's rows; `own` is the model's spacing."""
    lists = times.lists_from(config.timesteps)
    if lists:
        check_different("timesteps", lists)
    spacings = config.spacings or (config.spacing or own,)
    named = [(num_steps, spacing) for num_steps in config.steps for spacing in spacings]
    return named + [(times.length(text), text) for text in lists]


def _seeds(config: SweepConfig) -> tuple[int, ...]:
    """The seeds. Raises ValueError for --seeds that are none."""
    if not config.seeds:
        return (config.seed,)
    check_seeds(config.seeds)
    if config.seed != 0:
        raise ValueError(
            f"seed and seeds must not both be given; got {config.seed} and {config.seeds}. Name "
            "them all in seeds."
        )
    return config.seeds


def _measure_missing(sweep: Sweep, config: SweepConfig) -> None:
    """Measure the cells of which there are no results, until time is up."""
    out, drawer = sweep.out, sweep.drawer
    wanted = sweep_settings(
        drawer.run,
        drawer.measures,
        config.num_samples,
        config.kept_features,
        config.save_images,
    )
    there = find_settings(out, wanted, config.batch_size, drawer.run, config.dtype) or {}
    drop_other_times(out, sweep.cells, drawer.run.spec.schedule.num_steps)
    done = {cell_of(line) for line in read_results(out)}
    missing = [cell for cell in sweep.cells if cell not in done]
    if not there and not missing:
        return
    command = command_of("experiments/fid_sweep.py", config)
    settings = wanted | about(there, sweep.cells, config.workdir, command, config.paper)
    settings |= {
        "spacing": there.get("spacing", sweep.cells[0].spacing),
        "seed": there.get("seed", sweep.cells[0].seed),
    }
    if not missing:
        write_settings(out, settings | {"batch_size": there["batch_size"]})
        return
    batch_size = there.get("batch_size") or config.batch_size

    def name(cell: Cell) -> str:
        return cell.name(settings["spacing"], settings["seed"])

    # What is kept is gone on with; guidance needs the most memory, so it decides the batch size.
    kept = under_way(out)
    missing.sort(key=lambda c: (name(c) not in kept, batch_size is None and c.guidance_scale == 1))
    drawn = load_progress(out, name(missing[0]), drawer.measures).count
    start = drawn if drawn < config.num_samples else 0
    costs, batch_size = fitting_costs(sweep, missing, start, batch_size)
    settings["batch_size"] = batch_size
    write_settings(out, settings)
    print_estimate(sweep, missing, costs, batch_size, max(drawn, start + batch_size) // batch_size)
    measure_cells(sweep, missing, costs, settings, lambda: write_report(out, config.paper))


if __name__ == "__main__":
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    began = time.monotonic() - process_seconds()
    cli.run(lambda config: main(config, began), SweepConfig, TABLES if named else None)
