"""A sweep's estimate and its stop, by a clock that the test moves."""

import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

pytest.importorskip("tyro")

from common import sweep_draw, sweep_measure, sweep_time
from common.sweep_draw import Batch, Drawer, program_key
from common.sweep_measure import Sweep, measure_cells
from common.sweep_store import Cell
from common.sweep_time import Clock, Costs

ROOT = pathlib.Path(__file__).resolve().parents[1]
CELLS = [Cell(s, "ddim", eta, 1.0, "uniform") for s in (10, 20) for eta in (0.0, 1.0)]
HEUN = Cell(10, "heun", None, 1.0, "uniform")
SETTINGS = {"spacing": "uniform", "seed": 0, "batch_size": 10}


def costs() -> Costs:
    """3 s for a program, 0.1 for a network call, 0.5 beside the calls, 2 for the numbers."""
    return Costs(compiling=3.0, call=0.1, rest=0.5, numbers=2.0, report=1.0)


def test_an_estimate_is_the_sum_of_its_parts_each_as_often_as_it_comes(monkeypatch):
    """By hand: two programs, five batches to a cell with the features once each, four numbers."""
    monkeypatch.setattr(sweep_time.jax, "default_backend", lambda: "cpu")
    drawing = 5 * (2 * (10 * 0.1 + 0.5) + 2 * (20 * 0.1 + 0.5))
    assert costs().all_of(CELLS, set(), 5) == pytest.approx(2 * 3 + drawing + 4 * 2 + 1)
    compiled = {program_key(CELLS[0])}
    assert costs().all_of(CELLS, compiled, 5) == pytest.approx(3 + drawing + 4 * 2 + 1)
    # Heun has 19 calls, and the network in its program about twice.
    assert costs().all_of([HEUN], set(), 1) == pytest.approx(3 * 1.9 + 1.9 + 0.5 + 2 + 1)
    # Beside an accelerator the host's part is hidden, but for the last cell's numbers.
    monkeypatch.setattr(sweep_time.jax, "default_backend", lambda: "gpu")
    assert costs().all_of(CELLS, set(), 5) == pytest.approx(2 * 3 + drawing + 2 + 1)


class Time:
    """A machine on which all takes what the test says, and a clock of it."""

    def __init__(self, monkeypatch):
        self.now, self.batches, self.lines = 0.0, 0, []
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        for module in (sweep_measure, sweep_time, sweep_draw):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(Drawer, "compile", lambda *given: self.compile(*given))
        monkeypatch.setattr(Drawer, "draw", lambda *given: self.draw(*given))
        monkeypatch.setattr(sweep_measure, "describe", lambda line, plain: str(line))
        monkeypatch.setattr(sweep_measure, "append_result", self.append)

    def compile(self, drawer, cell, batch_size):
        self.now += 3.0
        return 3.0

    def draw(self, drawer, cell, batches, is_shown):
        for indices in batches:
            self.now += 0.1 * cell.num_steps + 0.5
            self.batches += 1
            yield Batch(None, np.ones(len(indices), bool), {})

    def append(self, out, cell, *arguments):
        self.now += 2.0
        self.lines.append(cell)
        return {"cell": cell}


def sweep(tmp_path, max_seconds: float | None) -> Sweep:
    drawer = Drawer(None, [], {})  # pyright: ignore
    return Sweep(tmp_path, drawer, CELLS, 50, 10, False, Clock(0.0, max_seconds))


@pytest.mark.parametrize("max_seconds", [20.0, 35.0, 50.0])
def test_a_stop_is_within_a_tenth_whatever_is_under_way(tmp_path, monkeypatch, max_seconds):
    machine = Time(monkeypatch)
    given = sweep(tmp_path, max_seconds)
    measure_cells(given, CELLS, costs(), SETTINGS, lambda: None)
    ended = machine.now + 1.0  # the report
    assert 0.7 * max_seconds < ended <= 1.1 * max_seconds, machine.batches
    assert machine.batches < 20


def test_a_cells_numbers_are_computed_while_the_next_is_drawn(tmp_path, monkeypatch):
    """The first cell's end only after the second has begun; one after the other would hang."""
    machine, begun = Time(monkeypatch), threading.Event()

    def draw(drawer, cell, *rest):
        if cell == CELLS[1]:
            begun.set()
        yield from machine.draw(drawer, cell, *rest)

    def append(out, cell, *arguments):
        assert begun.wait(timeout=20), "the next cell is drawn after the numbers only"
        return machine.append(out, cell, *arguments)

    monkeypatch.setattr(Drawer, "draw", draw)
    monkeypatch.setattr(sweep_measure, "append_result", append)
    measure_cells(sweep(tmp_path, None), CELLS[:2], costs(), SETTINGS, lambda: None)
    assert machine.lines == CELLS[:2]


def test_the_batch_that_measures_the_costs_is_the_first_of_its_cell(tmp_path, monkeypatch):
    """It is handed out once, to its own cell alone, and the other batches are drawn as ever."""
    drawn = []

    def map_batches(program, inputs, batches):
        for indices in batches:
            drawn.append((inputs, indices.tolist()))
            yield Batch(None, np.ones(len(indices), bool), {"index": indices})

    monkeypatch.setattr(sweep_draw, "map_batches", map_batches)
    monkeypatch.setattr(Drawer, "_inputs", lambda drawer, cell: cell.name("uniform", 0))
    drawer = Drawer(None, [], dict.fromkeys(map(program_key, CELLS)))  # pyright: ignore
    first, second = CELLS[:2]
    batches = [np.arange(i, i + 10) for i in (20, 30, 40)]
    drawer.draw_ahead(first, batches[0])
    assert drawer.seconds_ahead(first, 20) > 0
    assert drawer.seconds_ahead(first, 30) == drawer.seconds_ahead(second, 20) == 0
    for cell in (second, first, first):
        got = [batch.features["index"].tolist() for batch in drawer.draw(cell, batches)]
        assert got == [b.tolist() for b in batches]
    assert [i for name, (i, *_) in drawn if name == first.name("uniform", 0)] == [
        20,  # ahead
        30, 40,  # the first time without it
        20, 30, 40,
    ]  # fmt: skip


@pytest.mark.parametrize(("max_seconds", "count"), [(18.0, 1), (20.0, 2), (30.0, 3)])
def test_a_stop_counts_the_batch_that_is_drawn_already(tmp_path, monkeypatch, max_seconds, count):
    """Batches of 8 s, one drawn before, and 3 s for numbers and report: 8 + 8 + 3 fit into 20."""
    machine = Time(monkeypatch)
    slow = Cell(75, "ddim", 0.0, 1.0, "uniform")
    given = sweep(tmp_path, max_seconds)
    given.drawer.compiled.add(program_key(slow))
    given.drawer.ahead[slow, 0] = Batch(None, np.ones(10, bool), {}), 8.0
    machine.now = 8.0

    def draw(drawer, cell, batches, is_shown):
        """Like `map_batches`: one is begun while the one before is waited for."""
        under_way = 0
        for number, indices in enumerate(batches):
            machine.now += 8.0 * under_way
            if number < 1 or under_way:
                yield Batch(None, np.ones(len(indices), bool), {})
            under_way = int(number > 0)
        machine.now += 8.0 * under_way
        yield from [Batch(None, np.ones(10, bool), {})] * under_way

    monkeypatch.setattr(Drawer, "draw", draw)
    measure_cells(given, [slow], costs(), SETTINGS, lambda: None)
    assert machine.now == 8.0 * count
    assert machine.now + 3.0 <= max_seconds


@pytest.mark.parametrize("num_steps", [1, 3, 10, 40])
@pytest.mark.parametrize("call", [0.03, 4.0])
def test_a_batchs_costs_are_those_of_the_machine_whatever_s_is_measured(
    tmp_path, monkeypatch, num_steps, call
):
    """A machine where a program's first run takes 0.15 s more, and each 1.5 calls beside."""
    machine, ran = Time(monkeypatch), set()

    def draw(drawer, cell, batches, is_shown):
        for indices in batches:
            machine.now += call * (cell.num_steps + 1.5) + 0.15 * (program_key(cell) not in ran)
            machine.batches += 1
            ran.add(program_key(cell))
            yield Batch(None, np.ones(len(indices), bool), {})

    monkeypatch.setattr(Drawer, "draw", draw)
    monkeypatch.setattr(sweep_time, "image_programs", lambda spec, cells: {})
    schedule = types.SimpleNamespace(num_steps=1000)
    spec = types.SimpleNamespace(schedule=schedule, image_shape=(8, 8, 1))
    drawer = Drawer(types.SimpleNamespace(spec=spec), [], {})  # pyright: ignore
    cell = Cell(num_steps, "ddim", 0.0, 1.0, "uniform")
    many = Cell(1000, "ddim", 0.0, 1.0, "uniform")
    found = sweep_time.measured_costs(drawer, [cell, many], np.arange(10), 50)
    assert found.compiling == pytest.approx(3.0)
    assert found.batch(cell) == pytest.approx(call * (num_steps + 1.5), rel=0.05)
    by_few = num_steps < 10 and call < 1
    assert found.batch(many) == pytest.approx(call * 1001.5, rel=0.01 if by_few else 2 / num_steps)
    assert machine.batches == (1 if call > 1 else 4 if by_few else 2), "what is long is drawn once"


def test_the_clock_of_a_call_begins_with_its_process():
    code = "import time; time.sleep(0.6); from common.sweep_time import process_seconds as s; "
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code + "print(s())"], cwd=ROOT / "experiments",
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert 0.6 <= float(done.stdout) <= time.monotonic() - started + 0.1, done.stderr
