"""Measuring a sweep's cells, until all are done or time is up."""

from __future__ import annotations

import concurrent.futures
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from common import pictures
from common.progress import Progress as Bar
from common.sample_set import RECORD, SampleSet, open_to_draw, settings_of
from common.sweep_draw import Drawer, program_key
from common.sweep_store import (
    Cell,
    Progress,
    append_result,
    keep_drawn,
    load_progress,
    no_progress,
    save_progress,
)
from common.sweep_table import describe, duration
from common.sweep_time import Clock, Costs, measured_costs
from ddim_jax.parallel import index_batches
from ddim_jax.runs import check_finite

GRID_IMAGES = 64
REPORT_EARLY = 60.0
"""A sweep of more seconds than this shows a report after its first cell."""


class Sweep(NamedTuple):
    """All that is known before anything is written."""

    out: pathlib.Path
    drawer: Drawer
    cells: list[Cell]
    num_samples: int
    save_every: int
    save_images: bool
    clock: Clock


def fitting_costs(
    sweep: Sweep, missing: list[Cell], start: int, batch_size: int | None
) -> tuple[Costs, int]:
    """What the parts cost, by the first cell's batch from `start`, and the batch size.

    If none is given it is one at which the devices' memory suffices.
    """
    devices = jax.local_device_count()

    def costs(size: int) -> Costs:
        return measured_costs(sweep.drawer, missing, start + np.arange(size), sweep.num_samples)

    if batch_size is not None:
        return costs(batch_size), batch_size
    share = min(256, -(-sweep.num_samples // devices))
    while True:
        try:
            return costs(share * devices), share * devices
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or share == 1:
                raise
        print(f"batches of {share * devices} do not fit into memory; trying half", flush=True)
        share //= 2


def print_estimate(
    sweep: Sweep, missing: list[Cell], costs: Costs, batch_size: int, num_drawn: int
) -> None:
    """Say how long the whole call will take, and of what that is made.

    num_drawn: batches of the first cell that are drawn.
    """
    num_batches = -(-sweep.num_samples // batch_size)
    remaining = costs.all_of(missing, sweep.drawer.compiled, num_batches)
    remaining -= num_drawn * costs.batch(missing[0])
    seconds = sweep.clock.seconds() + remaining
    shortest = min(missing, key=Cell.network_calls)
    print(
        f"{len(missing)} cells of {sweep.num_samples} images to measure: about "
        f"{duration(seconds)} for this call on {jax.local_device_count()} "
        f"{jax.devices()[0].device_kind}, from {costs.batch(shortest):.2f} s for a batch of "
        f"{batch_size} at S = {shortest.num_steps}, {costs.compiling:.1f} s to compile a program "
        f"and {costs.numbers:.2f} s for the numbers of a cell",
        flush=True,
    )


def measure_cells(
    sweep: Sweep,
    missing: list[Cell],
    costs: Costs,
    settings: Mapping[str, Any],
    write_report: Callable[[], None],
) -> None:
    """Measure the cells until time is up: one batch at least, and the numbers that it completes.

    The numbers of a cell are computed while the next one is drawn. What takes minutes shows a
    report after the first.
    """
    spacings = {cell.spacing for cell in sweep.cells}
    plain = spacings.pop() if len(spacings) == 1 else None  # else each line says its own
    with (
        concurrent.futures.ThreadPoolExecutor(1) as worker,
        Bar("fid_sweep.py", _calls(sweep, missing), "network calls") as bar,
    ):
        numbers = None
        for i, cell in enumerate(missing):
            if i > 0 and not sweep.clock.has(_least(sweep, cell, costs)):
                break
            _compile(sweep, cell, costs, settings["batch_size"])
            name = cell.name(settings["spacing"], settings["seed"])
            progress = _draw(sweep, cell, name, settings["batch_size"], costs, bar)
            if numbers is not None:
                bar.say(describe(numbers.result(), plain))
                numbers = None
                if i == 1 and _remaining(sweep, missing[i:], costs, settings) > REPORT_EARLY:
                    _time_report(costs, write_report)
            if progress.count < sweep.num_samples:
                break
            keep_drawn(sweep.out, name)
            if i > 0 and not sweep.clock.has(costs.numbers + costs.report):
                break  # drawn it is, and the next call begins with its numbers
            numbers = worker.submit(_numbers, sweep, cell, progress, settings, costs)
        else:
            i = len(missing)
        if numbers is not None:
            bar.say(describe(numbers.result(), plain))
    if i < len(missing):
        why = sweep.clock.stop.name or "time is up"
        print(f"stopped, {why}; call again for what is missing")


def _numbers(
    sweep: Sweep, cell: Cell, progress: Progress, settings: Mapping[str, Any], costs: Costs
) -> dict[str, Any]:
    """Write the cell's line, and remember what that takes."""
    started = time.monotonic()
    line = append_result(sweep.out, cell, progress, sweep.drawer.measures, settings)
    costs.numbers = time.monotonic() - started
    return line


def _calls(sweep: Sweep, cells: list[Cell]) -> int:
    return sweep.num_samples * sum(cell.network_calls() for cell in cells)


def _least(sweep: Sweep, cell: Cell, costs: Costs) -> float:
    """Seconds to begin the cell and to end the call: a program, a batch, the numbers under way."""
    program = 0.0 if program_key(cell) in sweep.drawer.compiled else costs.program(cell)
    return program + costs.batch(cell) + costs.numbers + costs.report


def _remaining(sweep: Sweep, cells: list[Cell], costs: Costs, settings: Mapping[str, Any]) -> float:
    num_batches = -(-sweep.num_samples // settings["batch_size"])
    return costs.all_of(cells, sweep.drawer.compiled, num_batches)


def _compile(sweep: Sweep, cell: Cell, costs: Costs, batch_size: int) -> None:
    """Compile what draws the cell, so that its seconds are drawing alone."""
    if program_key(cell) not in sweep.drawer.compiled:
        seconds = sweep.drawer.compile(cell, batch_size)
        costs.compiling = max(costs.compiling, seconds * cell.num_steps / cell.network_calls())


def _time_report(costs: Costs, write_report: Callable[[], None]) -> None:
    started = time.monotonic()
    write_report()
    costs.report = time.monotonic() - started


def _draw(sweep: Sweep, cell: Cell, name: str, batch_size: int, costs: Costs, bar: Bar) -> Progress:
    """Draw the cell from where it stands, until it is done or time is up."""
    measures, total = sweep.drawer.measures, sweep.num_samples
    samples = _samples(sweep, cell, name, batch_size) if sweep.save_images else None
    progress = _kept_progress(sweep, name, samples)
    bar.skip(progress.count * cell.network_calls())
    ahead = sweep.drawer.seconds_ahead(cell, progress.count)
    before, started = progress.seconds, time.monotonic() - ahead
    # Whole batches, the last one too: then every call runs the same program, to the same bits.
    whole = -(-total // batch_size) * batch_size
    batches = [
        indices
        for indices in index_batches(whole, batch_size, progress.count)
        if indices[0] < total  # none is left of a cell that was killed at its end
    ]
    in_time = _in_time(sweep, cell, batches, costs, num_drawn=int(ahead > 0))
    drawn = sweep.drawer.draw(cell, in_time, lambda indices: indices[0] == 0 or sweep.save_images)
    # Fewer are drawn where time is up.
    for number, (indices, batch) in enumerate(zip(batches, drawn, strict=False), 1):
        indices = indices[indices < total]
        images, finite, features = batch.first(len(indices))
        check_finite(finite)
        if images is not None and indices[0] == 0:
            grid = np.asarray(images[:GRID_IMAGES])
            pictures.save_grid(sweep.out / "samples" / f"{name}.png", grid)
        if images is not None and samples is not None:
            samples.save(indices, np.asarray(images))
        states = {
            measure.name: measure.update(
                progress.states[measure.name], features[measure.name], indices
            )
            for measure in measures
        }
        seconds = time.monotonic() - started
        costs.seen[program_key(cell)] = seconds / number
        progress = Progress(progress.count + len(indices), before + seconds, states)
        bar.add(len(indices) * cell.network_calls())
        if number % sweep.save_every == 0:
            save_progress(sweep.out, name, progress)
    if batches:
        save_progress(sweep.out, name, progress)
    if samples is not None and progress.count >= total and not samples.complete:
        samples.finished()
    return progress


def _samples(sweep: Sweep, cell: Cell, name: str, batch_size: int) -> SampleSet:
    """Where the cell's images go, one by one."""
    images = sweep.out / "images" / name
    settings = settings_of(
        sweep.drawer.run,
        seed=cell.seed,
        num_sample_steps=cell.num_steps,
        spacing=cell.spacing,
        sampler=cell.sampler,
        eta=cell.eta,
        label=None,
        guidance_scale=cell.guidance_scale,
        batch_size=batch_size,
    )
    return open_to_draw(images / RECORD, images, settings, sweep.num_samples, digits=6)


def _kept_progress(sweep: Sweep, name: str, samples: SampleSet | None) -> Progress:
    """What was kept of a cell; nothing where images are wanted that it is of, and not there."""
    progress = load_progress(sweep.out, name, sweep.drawer.measures)
    if samples is None or all(i >= progress.count for i in samples.missing()):
        return progress
    print(f"{name} is drawn anew, since images of it are missing in {samples.images}", flush=True)
    return no_progress(sweep.drawer.measures)


def _in_time(
    sweep: Sweep, cell: Cell, batches: list[np.ndarray], costs: Costs, num_drawn: int
) -> Iterator[np.ndarray]:
    """The batches that will be done in time; the first one always, and `num_drawn`, which are.

    Asked for one, the batch before it has just begun, so that is waited for too.
    """
    for number, indices in enumerate(batches):
        begun = 2 if number > num_drawn else 1
        seconds = begun * costs.batch(cell) + costs.report + costs.numbers
        if number > 0 and not sweep.clock.has(seconds):
            return
        yield indices
