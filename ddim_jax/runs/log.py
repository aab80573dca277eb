"""What a training run says while it runs, and who listens."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ddim_jax.files import differences, parsed, read_json, write_json, write_whole
from ddim_jax.parallel import unreplicate
from ddim_jax.runs.draw import Pixels, marked_images
from ddim_jax.runs.measure import PROTOCOL, Measured

WINDOWS = "log_window.json"
"""The losses since the last line of metrics.jsonl, at each of the newest checkpoints: so that the
next line is the same whether the run was stopped inside its window or not."""
WINDOWS_FORMAT = 1


class Watcher:
    """Listens to `fit`: override what you want to hear. Called on every host."""

    def start(self, step: int, max_steps: int) -> None:
        """Training goes on from `step`."""

    def update(self, step: int) -> None:
        """One more update is done, and its loss was finite."""

    def line(self, line: dict[str, int | float]) -> None:
        """A line of metrics.jsonl: step, loss, grad_norm, images_per_second."""

    def images(self, step: int, images: np.ndarray) -> None:
        """Samples of the averaged weights, uint8 (N, H, W, C)."""

    def measured(self, step: int, numbers: Mapping[str, int | float | None]) -> None:
        """What `fid_every` measured after a step: another line of metrics.jsonl."""

    def close(self) -> None:
        """Training ended, well or not."""


class Log:
    """Reads each update's metrics, writes metrics.jsonl on the first host, tells the watchers."""

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        max_steps: int,
        every: int,
        batch_size: int,
        watchers: Sequence[Watcher],
        may_skip: int = 0,
    ):
        """`every` updates make a line of metrics.jsonl; `may_skip` in all may be left out."""
        self._may_skip = may_skip
        self._workdir, self._every, self._batch_size = workdir, every, batch_size
        self._start, self._max_steps, self._watchers = start, max_steps, watchers
        self._time, self._step = time.monotonic(), start
        self._windows = _windows_up_to(workdir / WINDOWS, start)
        self._losses = list(self._windows.get(start, []))
        before = [parsed(line) for line in _lines_up_to(workdir / "metrics.jsonl", start)]
        self._skipped = sum("skipped" in line for line in before)
        protocols = [line[PROTOCOL] for line in before if PROTOCOL in line]
        self._measured_with = protocols[-1] if protocols else None
        self._lines: Any = None
        self._grad_norm: float | None = None  # of the last update that counts, since the last line

    def __enter__(self) -> Log:  # noqa: D105
        if jax.process_index() == 0:
            path = self._workdir / "metrics.jsonl"
            _forget_after(path, self._step)
            self._lines = path.open("a", buffering=1)
        for watcher in self._watchers:
            watcher.start(self._start, self._max_steps)
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        for watcher in self._watchers:
            watcher.close()
        if self._lines is not None:
            self._lines.close()

    def read(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """The metrics of a step; raises FloatingPointError if its update spoilt the state."""
        values = {name: float(value) for name, value in unreplicate(metrics).items()}
        bad = [f"the {name} of step {step} is {x}" for name, x in values.items() if x - x != 0]
        if bad and self._skipped >= self._may_skip:
            after = f" after {self._skipped} that were left out" if self._may_skip else ""
            raise FloatingPointError(
                f"{bad[0]}{after}; checkpoints from before, if any, are kept in {self._workdir}. "
                "Lower the learning rate or lengthen the warm-up, in another workdir; or leave "
                "such updates out, by skip_updates."
            )
        if bad:
            self._skipped += 1
            self._append({"step": step, "skipped": bad[0]})
            _warn(f"{bad[0]}; this update is left out")
        return values

    def write(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Record one step; every `every` steps write the mean since the last line."""
        values = self.read(step, metrics)
        if all(map(np.isfinite, values.values())):
            self._losses.append(values["loss"])
            self._grad_norm = values["grad_norm"]
        for watcher in self._watchers:
            watcher.update(step)
        if step % self._every or self._grad_norm is None:
            return
        now = time.monotonic()
        line = {
            "step": step,
            "loss": float(np.mean(self._losses)),
            "grad_norm": self._grad_norm,
            "images_per_second": (step - self._step) * self._batch_size / (now - self._time),
        }
        self._losses, self._grad_norm, self._time, self._step = [], None, now, step
        self._append(line)
        for watcher in self._watchers:
            watcher.line(line)

    def measured(
        self,
        step: int,
        measure: Callable[[], Measured],
        protocol: Mapping[str, Any],
    ) -> None:
        """Measure after a step, and write a line of it; its time is none of training's."""
        if self._measured_with not in (None, protocol):
            differ = "; ".join(differences(self._measured_with, protocol))
            _warn(
                f"numbers are measured otherwise from step {step} on ({differ}): their curves "
                "begin anew."
            )
        self._measured_with = protocol
        started = time.monotonic()
        numbers = measure()
        self._time += time.monotonic() - started
        for name in (name for name, number in numbers.items() if number is None):
            _warn(
                f"{name} of step {step} is unknown: samples are not finite, so the averaged "
                "weights diverge when sampled, though the loss is finite."
            )
        self._append({"step": step, **numbers, PROTOCOL: protocol})
        for watcher in self._watchers:
            watcher.measured(step, numbers)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._lines is None:
            return
        try:
            self._lines.write(json.dumps(line) + "\n")
        except OSError as error:  # which does not say of which file
            raise type(error)(error.errno, error.strerror, self._lines.name) from error

    def keep_window(self, step: int, num_checkpoints: int) -> None:
        """Write down the losses since the last line, for who goes on from the checkpoint of `step`.

        Called before that is saved. Those of so many checkpoints stay, and one more.
        """
        kept = sorted(self._windows)[-num_checkpoints:]
        self._windows = {old: self._windows[old] for old in kept} | {step: self._losses.copy()}
        if self._lines is not None:
            os.fsync(self._lines.fileno())
            content = {"format": WINDOWS_FORMAT, "losses": self._windows}
            write_json(self._workdir / WINDOWS, content, indent=None)

    def images(self, step: int, pixels: Pixels) -> None:
        """Samples drawn after a step; says so where some are not finite, and marks them."""
        finite = np.asarray(pixels.finite)
        if not finite.all():
            _warn(
                f"{np.sum(~finite)} of the {len(finite)} samples of step {step} are not finite, "
                "and are shown as a cross: the averaged weights diverge when sampled, though the "
                "loss is finite."
            )
        images = marked_images(pixels)
        for watcher in self._watchers:
            watcher.images(step, images)


def _windows_up_to(path: pathlib.Path, step: int) -> dict[int, list[float]]:
    """The losses since the last line at each checkpoint up to `step`; none of an older run."""
    if not path.is_file():
        return {}
    way_out = "Delete it: the mean of the next line is then of the updates of this call alone."
    content = read_json(path, way_out=way_out)
    if (found := content.get("format")) != WINDOWS_FORMAT:
        raise ValueError(f"{path} must be of format {WINDOWS_FORMAT}; got {found!r}. {way_out}")
    try:
        windows = {int(key): [float(x) for x in xs] for key, xs in content["losses"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold losses by step ({type(error).__name__}: {error}). {way_out}"
        ) from error
    return {key: losses for key, losses in windows.items() if key <= step}


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _forget_after(path: pathlib.Path, step: int) -> None:
    """Drop the lines of steps that a resumed run takes again, and one that a kill cut short."""
    if path.exists():
        write_whole(path, "".join(_lines_up_to(path, step)).encode())


def _lines_up_to(path: pathlib.Path, step: int) -> list[str]:
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n") and parsed(line)["step"] <= step]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} has a damaged line ({type(error).__name__}: {error}); delete that line, or "
            "the file."
        ) from error
