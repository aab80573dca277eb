"""Drawing a sweep's cells: few compiled programs for many settings, features beside the images."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, UInt8

from common.measures import Features, Measure
from common.sweep_store import Cell
from common.times import timesteps_of
from ddim_jax.keys import seed_key
from ddim_jax.parallel import DeviceProgram, map_batches
from ddim_jax.runs import DrawInputs, Run, RunSpec, image_program
from ddim_jax.samplers import ddim_or_sigma_hat
from ddim_jax.solvers import named_sampler

ProgramKey = tuple[Any, ...]


def program_key(cell: Cell) -> ProgramKey:
    """Cells of one key share a program: all seeds, etas and sigma-hat do."""
    own = None if cell.sampler in ("ddim", "sigma_hat") else cell.sampler
    return cell.num_steps, cell.spacing, cell.guidance_scale, own


def image_programs(spec: RunSpec, cells: Iterable[Cell]) -> dict[ProgramKey, DeviceProgram]:
    """What draws the cells, not yet compiled. Raises ValueError for what the run cannot have."""
    programs = {}
    for cell in cells:
        key = num_steps, spacing, scale, own = program_key(cell)
        if key not in programs:
            timesteps = timesteps_of(spec, num_steps, spacing)
            make = ddim_or_sigma_hat if own is None else lambda name=own: named_sampler(name)
            programs[key] = image_program(spec, timesteps, make, guidance_scale=scale)
    return programs


class Batch(NamedTuple):
    """Images, and their features for each measure."""

    images: UInt8[Array, "B H W C"] | UInt8[np.ndarray, "B H W C"] | None
    """None where nobody looks at them: they stay on the device, which measured them."""
    finite: Bool[Array, "B"] | Bool[np.ndarray, "B"]
    features: dict[str, Features]  # by network

    def first(self, size: int) -> Batch:
        """So many of them."""
        return jax.tree.map(lambda array: array[:size], self)


@dataclasses.dataclass(frozen=True)
class Drawer:
    """Draws and measures the images of any cell on all devices."""

    run: Run
    measures: Sequence[Measure]
    programs: Mapping[ProgramKey, DeviceProgram]
    compiled: set[ProgramKey] = dataclasses.field(default_factory=set)
    """Of which programs `compile` was called."""
    ahead: dict[tuple[Cell, int], tuple[Batch, float]] = dataclasses.field(default_factory=dict)
    """Batches that `draw_ahead` drew and their seconds, by cell and first index."""

    def draw_ahead(self, cell: Cell, indices: np.ndarray) -> Batch:
        """Draw one batch now, which `draw` will hand out; whatever it needs should be compiled."""
        started = time.monotonic()
        (batch,) = self.draw(cell, [indices], lambda indices: True)
        self.ahead[cell, int(indices[0])] = batch, time.monotonic() - started
        return batch

    def seconds(self, cell: Cell, indices: np.ndarray) -> float:
        """What it takes to draw the batch, which nobody gets."""
        dry = dataclasses.replace(self, ahead={})
        started = time.monotonic()
        list(dry.draw(cell, [indices], lambda indices: True))
        return time.monotonic() - started

    def seconds_ahead(self, cell: Cell, index: int) -> float:
        """What the batch that begins there took, if it is drawn already; else 0."""
        return self.ahead[cell, index][1] if (cell, index) in self.ahead else 0.0

    def draw(
        self,
        cell: Cell,
        batches: Iterable[np.ndarray],
        is_shown: Callable[[np.ndarray], bool] = lambda indices: False,
    ) -> Iterator[Batch]:
        """The features of each batch of indices, on the host, one batch ahead.

        The images too of those that `is_shown(indices)`.
        """
        batches = iter(batches)
        for first in itertools.islice(batches, 1):
            if (drawn := self.ahead.pop((cell, int(first[0])), None)) is None:
                batches = itertools.chain([first], batches)
            else:
                yield drawn[0]
        images = self.programs[program_key(cell)]

        def program(inputs: DrawInputs, indices: np.ndarray) -> Batch:
            pixels = images(inputs, indices)
            features = {
                measure.name: measure.program(measure.network.params, pixels.images)
                for measure in self.measures
            }
            return Batch(pixels.images if is_shown(indices) else None, pixels.finite, features)

        yield from map_batches(program, self._inputs(cell), batches)

    def _inputs(self, cell: Cell) -> DrawInputs:
        shares = program_key(cell)[-1] is None
        values = (float(cell.eta or 0.0), cell.sampler == "sigma_hat") if shares else ()
        return DrawInputs(self.run.params, seed_key(cell.seed), values)

    def compile(self, cell: Cell, batch_size: int) -> float:
        """Compile what draws the cell, as no part of the time it takes; the seconds it took."""
        started, devices = time.monotonic(), jax.local_device_count()
        indices = np.arange(-(-batch_size // devices) * devices)  # as map_batches fills them up
        self.programs[program_key(cell)].compile(self._inputs(cell), indices)
        self.compiled.add(program_key(cell))
        return time.monotonic() - started
