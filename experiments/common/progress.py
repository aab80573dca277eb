"""How far a long command is, on stderr: a bar in a terminal, elsewhere a line of text a minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

import jax
import tqdm

T = TypeVar("T")

BAR_SECONDS = 1.0
"""A bar in a terminal is drawn anew as often, so that its clock goes on in a long batch."""
LINE_SECONDS = 60.0
"""Without a terminal a line is written as often."""


class Progress:
    """What is done of a known amount of work, and the time left; the first host shows it.

    with Progress("sample.py", 50_000, "images") as progress:
        for images in progress.each(batches):
            ...
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        """`what` begins the line; of `total` `unit`, `done` were done before this call."""
        self._what, self._total, self._unit = what, total, unit
        self._before, self._done, self._first, self._note = done, 0, 0, ""
        self._started = self._since = time.monotonic()
        self._bar: tqdm.tqdm | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        """Begin to show."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show no more."""
        self.close()

    def start(self) -> None:
        """Begin to show; `with` does it."""
        if jax.process_index() == 0:
            if sys.stderr.isatty():
                self._bar = tqdm.tqdm(
                    total=self._total,
                    initial=self._before,
                    desc=self._what,
                    unit=f" {self._unit}",
                    smoothing=0.1,
                    dynamic_ncols=True,
                )
            threading.Thread(target=self._tick, daemon=True).start()

    def close(self) -> None:
        """Show no more; `with` does it."""
        self._stop.set()
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """So much more is done."""
        if self._done == 0:  # it took compiling too, which what is left will not
            self._first, self._since = count, time.monotonic()
        self._done += count
        if self._bar is not None:
            self._bar.update(count)

    def skip(self, count: int) -> None:
        """So much more turns out to have been done before this call."""
        self._before += count
        if self._bar is not None:
            self._bar.update(count)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, one counted as each is asked for after it."""
        for item in items:
            yield item
            self.add(1)

    def note(self, text: str) -> None:
        """What else the line says, such as a loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """Print a line to stdout; a bar goes on below it."""
        tqdm.tqdm.write(text)
        sys.stdout.flush()

    def line(self) -> str:
        """What is written without a terminal: "x: 4 of 8 images in 00:30, about 00:30 left"."""
        taken = tqdm.tqdm.format_interval(time.monotonic() - self._started)
        left = self.seconds_left()
        said = f"about {tqdm.tqdm.format_interval(left)} left" if left is not None else "begun"
        note = f", {self._note}" if self._note else ""
        share = f"{self._before + self._done} of {self._total} {self._unit}"
        return f"{self._what}: {share} in {taken}, {said}{note}"

    def seconds_left(self) -> float | None:
        """At the pace since the first piece, which compiled; at that piece's before; None at 0."""
        if self._done == 0:
            return None
        now, counted, since = time.monotonic(), self._done - self._first, self._since
        if counted == 0:
            counted, since, now = self._done, self._started, self._since
        left = self._total - self._before - self._done
        return left * (now - since) / counted

    def _tick(self) -> None:
        while not self._stop.wait(BAR_SECONDS if self._bar is not None else LINE_SECONDS):
            if self._bar is not None:
                self._bar.refresh()
            else:
                print(self.line(), file=sys.stderr, flush=True)
