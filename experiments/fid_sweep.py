"""Fill the paper's tables: the distance of one model's samples over S and eta.

python experiments/fid_sweep.py --workdir W --stats stats.npz --out DIR --num-samples 50000 \
    --steps 10 20 50 100 1000 --etas 0 0.2 0.5 1 sigma_hat --spacing quadratic
python experiments/fid_sweep.py table1-cifar10 --workdir W --stats stats.npz --out DIR

One network compilation for each S serves all etas. Image i depends on (seed, i) alone. Every
finished cell is a line in DIR/results.jsonl; the cell under way is in DIR/partial.npz every few
batches, so that a killed sweep, called again, goes on from there to the same numbers. DIR/report.md
and DIR/report.html show them, beside the paper's for its own tables.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import pathlib
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import cli
import generate
import jax
import jax.numpy as jnp
import numpy as np
import pictures
import sweep_report
import tyro
from measures import Measure, on_all_devices, open_measures
from presets import ROUNDING
from sweep_report import Eta, PaperTable
from workdir import Trained, Weights, load_trained, only_one_process, write_whole

from ddim_jax.metrics.frechet import FeatureMoments, init_moments, update_moments
from ddim_jax.samplers import ddim
from ddim_jax.schedule import Spacing, ddim_timesteps

GRID_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """One sweep of one model; every field is a command-line option."""

    workdir: str = tyro.MISSING
    """The model: a folder that train.py or convert.py wrote."""
    stats: tuple[str, ...] = tyro.MISSING
    """What statistics.py wrote; several files of different features measure the same samples."""
    out: str = tyro.MISSING
    """Where results, sample grids and the report go. A sweep found there is continued."""
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000)
    """Numbers of sampling steps S, the columns of the table."""
    etas: tuple[float | Literal["sigma_hat"], ...] = (0.0, 0.2, 0.5, 1.0, "sigma_hat")
    """Its rows: 0 is DDIM, 1 is DDPM, sigma_hat DDPM's larger variance (appendix D.3)."""
    spacing: Spacing | None = None
    """Sub-sequence of time indices; the model's own if not given."""
    num_samples: int = 50_000
    """N, images behind each number: exactly as many."""
    seed: int = 0
    """Image i depends on (seed, i) alone."""
    weights: Weights = "ema"
    """The averaged weights, or the raw ones."""
    feature_weights: str | None = None
    """Weights of the feature network; if not given classifier.safetensors beside the statistics, or
    Inception's published ones."""
    batch_size: int | None = None
    """Images drawn at once; if not given, what fits into the devices' memory."""
    save_every: int = 10
    """Batches between two saves of a cell under way."""
    save_images: bool = False
    """Also write every image as a PNG."""
    max_seconds: float | None = None
    """Stop cleanly after this long; the next call goes on from there."""
    paper: PaperTable | None = None
    """Show these numbers of the paper in the report."""


_TABLE1 = SweepConfig(steps=(10, 20, 50, 100, 1000), etas=(0.0, 0.2, 0.5, 1.0, "sigma_hat"))
_TABLE3 = SweepConfig(steps=(10, 20, 50, 100), etas=(0.0, 1.0), spacing="uniform")

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


class Cell(NamedTuple):
    """One number of the table."""

    num_steps: int
    eta: Eta

    @property
    def name(self) -> str:
        """For file names."""
        return sweep_report.cell_name(self.num_steps, self.eta)


class Progress(NamedTuple):
    """A cell under way: images measured so far, and the moments of their features."""

    count: int
    seconds: float
    moments: dict[str, FeatureMoments]  # by the measure's name


class Batch(NamedTuple):
    """Images on the devices, and their features for each measure."""

    pixels: generate.Pixels
    features: dict[str, jax.Array]


Draw = Callable[[Cell, int], Batch]
"""(cell, index of the first image) -> one batch, computing."""


def main(config: SweepConfig) -> None:
    """Measure the cells that are missing, then write the report."""
    started = time.monotonic()
    _check(config)
    trained = load_trained(config.workdir, config.weights)
    network = trained.network
    spacing = config.spacing or network.spacing
    timesteps = {s: ddim_timesteps(network.schedule.num_steps, s, spacing) for s in config.steps}
    measures = open_measures(config.stats, config.feature_weights, network.image_shape)
    out = pathlib.Path(config.out)
    settings = _settings(config, spacing, trained, measures)
    deadline = started + (float("inf") if config.max_seconds is None else config.max_seconds)

    def drawer(batch_size: int) -> Draw:
        return _drawer(trained, measures, timesteps, config.seed, batch_size)

    with only_one_process(out):
        _measure_missing(drawer, measures, config, settings, deadline)
        sweep_report.write_report(out, config.paper)
    print(f"{time.monotonic() - started:.0f} s in this call; see {out / 'report.html'}")


def _measure_missing(
    drawer: Callable[[int], Draw],
    measures: list[Measure],
    config: SweepConfig,
    settings: dict[str, Any],
    deadline: float,
) -> None:
    """Measure the cells of which there are no results, until time is up."""
    out = pathlib.Path(config.out)
    there = _read_settings(out, settings, config.batch_size)
    done = {Cell(line["S"], line["eta"]) for line in sweep_report.read_results(out)}
    cells = [Cell(s, eta) for s in config.steps for eta in config.etas]
    missing = [cell for cell in cells if cell not in done]
    if not missing:
        return
    batch_size = there or config.batch_size or _fitting_batch_size(drawer, missing[0], config)
    _check_batch_size(batch_size)  # a continued sweep's may not suit the devices of today
    settings = settings | {"batch_size": batch_size}
    write_whole(out / "sweep.json", (json.dumps(settings, indent=2) + "\n").encode())
    draw = drawer(batch_size)
    _print_estimate(draw, missing, config, batch_size)
    compiled = None
    for cell in missing:
        if cell.num_steps != compiled:  # so that its seconds are sampling alone
            jax.block_until_ready(draw(cell, 0))
            compiled = cell.num_steps
        progress = _measure(cell, draw, measures, config, batch_size, deadline)
        if progress.count == config.num_samples:
            line = _line(cell, progress, measures, settings)
            _append(out / "results.jsonl", line)
            (out / "partial.npz").unlink(missing_ok=True)
            print(sweep_report.describe(line), flush=True)
        if time.monotonic() > deadline:
            print("stopped, time is up; call again for what is missing")
            break


def _check(config: SweepConfig) -> None:
    cli.check_at_least(config, num_samples=2, save_every=1)  # a covariance needs 2
    if config.batch_size is not None:
        _check_batch_size(config.batch_size)
    for name in ("steps", "etas", "stats"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be one or more different values; got {values}.")
    for eta in config.etas:
        if eta != "sigma_hat":
            ddim(eta)  # refuses a negative eta


def _check_batch_size(batch_size: int) -> None:
    devices = jax.local_device_count()
    if batch_size < 1 or batch_size % devices:
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices; got {batch_size}."
        )


def _settings(
    config: SweepConfig, spacing: Spacing, trained: Trained, measures: list[Measure]
) -> dict[str, Any]:
    """What every cell of a sweep has in common, and decides its numbers."""
    return {
        "num_samples": config.num_samples,
        "spacing": spacing,
        "seed": config.seed,
        "rounding": ROUNDING,
        "weights": {
            "kind": config.weights,
            "step": trained.step,
            "hash": trained.weights_hash(),
        },
        "measures": {
            measure.name: {
                "features": measure.network.name,
                "dim": len(measure.statistics.mean),
                "network_hash": measure.network.content_hash[:16],
                "statistics_hash": measure.statistics.content_hash[:16],
                "statistics_of": dict(measure.statistics.data),
                "statistics_num_samples": measure.statistics.num_samples,
            }
            for measure in measures
        },
    }


def _read_settings(out: pathlib.Path, wanted: dict[str, Any], batch_size: int | None) -> int | None:
    """The batch size of the sweep in `out`; ValueError if that is another sweep."""
    path = out / "sweep.json"
    if not path.exists():
        return None
    there = sweep_report.read_json(path, path.read_text())
    wanted = wanted | {"batch_size": batch_size or there["batch_size"]}
    differ = [
        f"{key} is {there.get(key)!r} there and {wanted.get(key)!r} now"
        for key in sorted(there.keys() | wanted.keys())
        if there.get(key) != wanted.get(key)
    ]
    if differ:
        raise ValueError(
            f"out {out} holds another sweep: {'; '.join(differ)}. Give the same settings to "
            "continue it, or another folder."
        )
    return there["batch_size"]


def _fitting_batch_size(drawer: Callable[[int], Draw], cell: Cell, config: SweepConfig) -> int:
    """A batch size at which the devices' memory suffices for the cell."""
    devices = jax.local_device_count()
    share = min(256, -(-config.num_samples // devices))
    while True:
        try:
            jax.block_until_ready(drawer(share * devices)(cell, 0))
            return share * devices
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or share == 1:
                raise
        print(f"batches of {share * devices} do not fit into memory; trying half", flush=True)
        share //= 2


def _drawer(
    trained: Trained,
    measures: list[Measure],
    timesteps: dict[int, np.ndarray],
    seed: int,
    batch_size: int,
) -> Draw:
    """Draws and measures a batch on all devices; one program for each S, whatever eta is."""
    programs = {
        num_steps: generate.image_program(
            trained.network, grid, lambda eta, sigma_hat: ddim(eta, sigma_hat=sigma_hat)
        )
        for num_steps, grid in timesteps.items()
    }
    networks = {measure.name: on_all_devices(measure.network) for measure in measures}

    def draw(cell: Cell, start: int) -> Batch:
        sigma_hat = cell.eta == "sigma_hat"
        eta = 0.0 if cell.eta == "sigma_hat" else float(cell.eta)
        indices = jnp.arange(start, start + batch_size)
        pixels = programs[cell.num_steps](trained.params, indices, seed, eta, sigma_hat)
        features = {
            name: network.apply_fn(network.params, pixels.images)
            for name, network in networks.items()
        }
        return Batch(pixels, features)

    return draw


def _print_estimate(draw: Draw, missing: list[Cell], config: SweepConfig, batch_size: int) -> None:
    """Say how long the cells will take, from one batch of the shortest of them."""
    shortest = min(missing, key=lambda cell: cell.num_steps)
    jax.block_until_ready(draw(shortest, 0))
    started = time.monotonic()
    jax.block_until_ready(draw(shortest, 0))
    seconds = time.monotonic() - started
    steps = sum(cell.num_steps for cell in missing)
    total = seconds * steps / shortest.num_steps * -(-config.num_samples // batch_size)
    print(
        f"{len(missing)} cells of {config.num_samples} images to measure: about "
        f"{sweep_report.duration(total)} on {jax.local_device_count()} "
        f"{jax.devices()[0].device_kind}, from {seconds:.2f} s for a batch of {batch_size} at "
        f"S = {shortest.num_steps}",
        flush=True,
    )


def _measure(
    cell: Cell,
    draw: Draw,
    measures: list[Measure],
    config: SweepConfig,
    batch_size: int,
    deadline: float,
) -> Progress:
    """Draw and measure the cell from where it stands, until it is done or time is up."""
    out = pathlib.Path(config.out)
    count, before, moments = _load_progress(out, cell, measures)
    started = time.monotonic()
    progress = Progress(count, before, moments)
    starts = range(count, config.num_samples, batch_size)
    for number, batch in enumerate(_one_ahead(lambda start: draw(cell, start), starts), 1):
        size = min(batch_size, config.num_samples - count)
        images = generate.on_host(batch.pixels)[:size]
        if count == 0:
            pictures.save_grid(out / "samples" / f"{cell.name}.png", images[:GRID_IMAGES])
        if config.save_images:
            for i, image in enumerate(images, count):
                pictures.save_png(out / "images" / cell.name / f"{i:06d}.png", image)
        moments = {
            name: update_moments(moments[name], np.asarray(features)[:size])
            for name, features in batch.features.items()
        }
        count += size
        progress = Progress(count, before + time.monotonic() - started, moments)
        out_of_time = time.monotonic() > deadline
        if out_of_time or number % config.save_every == 0:
            _save_progress(out, cell, progress)
        if out_of_time:
            break
    return progress


def _one_ahead(draw: Callable[[int], Batch], starts: range) -> Iterator[Batch]:
    """The batches, each handed out while the devices compute the next."""
    before = None
    for start in starts:
        now = draw(start)
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before


def _save_progress(out: pathlib.Path, cell: Cell, progress: Progress) -> None:
    arrays: dict[str, Any] = {
        f"{name}.{field}": array
        for name, moments in progress.moments.items()
        for field, array in moments._asdict().items()
    }
    file = io.BytesIO()
    np.savez(file, cell=cell.name, count=progress.count, seconds=progress.seconds, **arrays)
    write_whole(out / "partial.npz", file.getvalue())


def _load_progress(out: pathlib.Path, cell: Cell, measures: list[Measure]) -> Progress:
    path = out / "partial.npz"
    if path.exists():
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it to draw this cell again."
            ) from error
        if str(arrays["cell"]) == cell.name:
            moments = {
                m.name: FeatureMoments(*(arrays[f"{m.name}.{f}"] for f in FeatureMoments._fields))
                for m in measures
            }
            return Progress(int(arrays["count"]), float(arrays["seconds"]), moments)
    return Progress(0, 0.0, {m.name: init_moments(len(m.statistics.mean)) for m in measures})


def _line(
    cell: Cell, progress: Progress, measures: list[Measure], settings: dict[str, Any]
) -> dict[str, Any]:
    """A finished cell with its whole protocol; only seconds differ from call to call."""
    return {
        "S": cell.num_steps,
        "eta": cell.eta,
        "distances": {
            measure.name: measure.distance(progress.moments[measure.name]) for measure in measures
        },
        "seconds": round(progress.seconds, 3),
        **settings,
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("ddim_jax", "jax", "numpy")},
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a source tree on PYTHONPATH


def _append(path: pathlib.Path, line: dict[str, Any]) -> None:
    """Add one line; a kill leaves the old file or the new one, never half a line."""
    before = path.read_bytes() if path.exists() else b""
    write_whole(path, before + (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    cli.run(main, SweepConfig, TABLES if named else None)
