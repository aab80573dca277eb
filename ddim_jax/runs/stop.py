"""A signal asks a long run to end: it finishes what it is at, saves, and ends well."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether to end soon, and why: SIGTERM or SIGINT came, or time is up."""

    def __init__(self) -> None:  # noqa: D107
        self.name: str | None = None

    @property
    def asked(self) -> bool:
        """Whether this process is to end soon."""
        return self.name is not None

    def ask(self, why: str) -> None:
        """End soon, for the first such reason."""
        self.name = self.name or why

    def at(self, step: int) -> bool:
        """Whether the run ends with this step; asked after each."""
        del step
        return self.asked


class SharedStop(Stop):
    """The same for several hosts: one that is asked tells the others, and all end with one step."""

    def ask(self, why: str) -> None:  # noqa: D102
        if not self.asked:
            super().ask(why)
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX's coordination hears, and passes on

    def at(self, step: int) -> bool:  # noqa: D102
        ends = multihost_utils.reached_preemption_sync_point(step)
        if ends:
            self.name = self.name or "a host is to stop"
        return ends


@contextlib.contextmanager
def stop_signals(what: str) -> Iterator[Stop]:
    """Within it the first SIGTERM or SIGINT is noted alone; the second SIGINT, and where there is
    one host the second SIGTERM, ends at once.

    what: what is finished first, in words. The handlers of before are put back at the end. Outside
    the main thread, which alone may handle signals, nothing is noted.
    """
    shared = jax.process_count() > 1
    stop = SharedStop() if shared else Stop()

    def note(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        print(f"{name}: {what}; once more ends at once", file=sys.stderr, flush=True)
        stop.ask(name)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # On several hosts SIGTERM is JAX's own, which tells the others.
    numbers = (signal.SIGINT,) if shared else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
