"""A signal asks a long run to end: it finishes what it is at, saves, and ends well."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class Stop:
    """Whether SIGTERM or SIGINT came, and which."""

    def __init__(self) -> None:  # noqa: D107
        self.name: str | None = None

    @property
    def asked(self) -> bool:
        """Whether to end soon."""
        return self.name is not None


@contextlib.contextmanager
def stop_signals(what: str) -> Iterator[Stop]:
    """Within it the first SIGTERM or SIGINT is noted alone; the second ends at once.

    what: what is finished first, in words. The handlers of before are put back at the end. Outside
    the main thread, which alone may handle signals, nothing is noted.
    """
    stop = Stop()

    def note(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name
        print(f"{stop.name}: {what}; once more ends at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
