"""How long a sweep takes, and when to stop: compiling, drawing, features, numbers and report."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from common.measures import Measure
from common.sweep_draw import Drawer, ProgramKey, image_programs, program_key
from common.sweep_store import Cell
from ddim_jax.runs.stop import Stop

REPORT_SECONDS = 2.0
"""Of a report, until one was made."""
SHORT = 2.0
"""Seconds of work that is measured twice, since its first run may take longer by as much."""
FEW = 10
"""Network calls that tell what one takes; where there are fewer, the rest of a batch counts."""


@dataclasses.dataclass
class Costs:
    """Seconds of a sweep's parts on this machine, measured as it goes."""

    compiling: float
    """A program whose loop evaluates the network once."""
    call: float
    """One network evaluation of a batch."""
    rest: float
    """What a batch takes beside: feature networks, which see it once, and the metrics' states."""
    numbers: float
    """The numbers of one cell, from its states."""
    report: float = REPORT_SECONDS
    seen: dict[ProgramKey, float] = dataclasses.field(default_factory=dict)
    """A batch, of the programs that have drawn some."""

    def batch(self, cell: Cell) -> float:
        """A batch of the cell."""
        expected = self.call * cell.network_calls() + self.rest
        return self.seen.get(program_key(cell), expected)

    def program(self, cell: Cell) -> float:
        """Compiling what draws the cell: Heun and guidance have the network in it twice."""
        return self.compiling * cell.network_calls() / cell.num_steps

    def all_of(self, cells: Iterable[Cell], compiled: set[ProgramKey], num_batches: int) -> float:
        """Measuring the cells, and the report.

        On a CPU the numbers of a cell take from the drawing of the next what they need; beside an
        accelerator they are hidden behind it, or it behind them.
        """
        cells = list(cells)
        programs = {program_key(cell): cell for cell in cells if program_key(cell) not in compiled}
        drawing = num_batches * sum(map(self.batch, cells))
        numbers = self.numbers * len(cells)
        on_cpu = jax.default_backend() == "cpu"
        together = drawing + numbers if on_cpu else max(drawing, numbers) + self.numbers
        return sum(map(self.program, programs.values())) + together + self.report


def measured_costs(
    drawer: Drawer, cells: Sequence[Cell], indices: np.ndarray, num_samples: int
) -> Costs:
    """Costs by the first cell's batch of these indices, which the drawer keeps, and its program."""
    cell, num_calls = cells[0], cells[0].network_calls()
    compiling = drawer.compile(cell, len(indices))
    features = _feature_seconds(drawer, len(indices))  # and their programs are compiled
    batch = drawer.draw_ahead(cell, indices)
    first = drawer.seconds_ahead(cell, int(indices[0]))
    drawing = first if first > SHORT else min(first, drawer.seconds(cell, indices))
    call = max(drawing - features, 0.0) / num_calls
    if drawing <= SHORT and num_calls < FEW < max(map(Cell.network_calls, cells)):
        call = min(call, _call_seconds(drawer, indices, num_calls, drawing - features))
    updating = sum(
        _seconds(lambda m=m: m.update(m.init(), batch.features[m.name], indices))
        for m in drawer.measures
    )
    return Costs(
        compiling=compiling * cell.num_steps / num_calls,
        call=call,
        rest=max(drawing - call * num_calls, features) + updating,
        numbers=sum(
            _number_seconds(measure, batch.features[measure.name], num_samples)
            for measure in drawer.measures
        ),
    )


def _call_seconds(drawer: Drawer, indices: np.ndarray, num_calls: int, seconds: float) -> float:
    """One network call of a batch, whose `num_calls` take these seconds, by `FEW` calls more.

    Noise and dispatch take as long as one or two.
    """
    spec = drawer.run.spec
    cell = Cell(min(num_calls + FEW, spec.schedule.num_steps), "ddim", 0.0, 1.0, "trailing")
    bare = Drawer(drawer.run, (), image_programs(spec, [cell]))
    bare.compile(cell, len(indices))
    bare.seconds(cell, indices)  # a program's first run takes longer
    more = max(cell.num_steps - num_calls, 1)
    return max(bare.seconds(cell, indices) - seconds, 0.0) / more


def _feature_seconds(drawer: Drawer, batch_size: int) -> float:
    images = np.zeros((batch_size, *drawer.run.spec.image_shape), np.uint8)

    def run(measure: Measure) -> None:
        jax.block_until_ready(measure.program(measure.network.params, images))

    for measure in drawer.measures:
        run(measure)  # compiles
    return sum(_seconds(lambda m=measure: run(m)) for measure in drawer.measures)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _number_seconds(measure: Measure, features: Mapping[str, Any], num_samples: int) -> float:
    """Of as many vectors as a cell keeps, of full rank, near those of a batch.

    Not of the batch alone: the matrices of a few vectors are quicker than those of many.
    """
    kept = max((int(m.init(1).num_kept) for m in measure.metrics if _keeps(m)), default=0)
    size = min(num_samples, max(kept, 2 * max(measure.dims.values())))
    rng, states = np.random.default_rng(0), measure.init()
    rows = rng.integers(0, len(next(iter(features.values()))), size)
    many = {
        name: x[rows] + (1e-3 + x.std()) * rng.standard_normal((size, x.shape[1]), np.float32)
        for name, x in features.items()
    }
    states = measure.update(states, many, np.arange(size))
    measure.prepare()
    first = _seconds(lambda: measure.values(states))
    if first > SHORT:
        return first
    return min(first, _seconds(lambda: measure.values(states)))  # some programs were compiled


def _keeps(metric: Any) -> bool:
    return hasattr(metric.init(1), "num_kept")


def process_seconds() -> float:
    """Since this process began, by the wall: loading the libraries counts, waiting for a busy
    machine too. Where the system does not say, what the process computed."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


class Clock:
    """When to stop. Until then a piece of work is begun if it will be done in time."""

    def __init__(self, started: float, max_seconds: float | None):
        """`started` by time.monotonic()."""
        self.started = started
        self.deadline = started + (float("inf") if max_seconds is None else max_seconds)
        self.stop = Stop()
        """A signal that came; then no time is left."""

    def seconds(self) -> float:
        """Since the call began."""
        return time.monotonic() - self.started

    def has(self, seconds: float) -> bool:
        """Whether so many are left."""
        return not self.stop.asked and time.monotonic() + seconds <= self.deadline
