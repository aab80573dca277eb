"""Going on after a failure, and running a tree's scripts."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping

import layout

FAILED: list[str] = []
TIMEOUT = 600


@contextlib.contextmanager
def part(what: str) -> Iterator[None]:
    """Note and print what fails inside, and go on."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        _note(what, f"{' '.join(map(str, error.cmd))}\n{error.stdout}\n{error.stderr}")
    except Exception:
        _note(what, traceback.format_exc())


def _note(what: str, text: str) -> None:
    FAILED.append(what)
    lines = [line for line in text.splitlines() if line.strip()]
    print(f"FAILED {what}", *lines[:1], *lines[1:][-14:], sep="\n  ", flush=True)


def script(name: str, *options: object, environment: Mapping[str, str] | None = None) -> str:
    """What a script of the tree prints, given options as words, strings of them, or paths.

    Raises CalledProcessError if it fails.
    """
    done = subprocess.run(
        _command(name, options),
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    return done.stdout


def on_two_processes(name: str, *options: object) -> None:
    """A script as the two processes of one run, over loopback; raises CalledProcessError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = f"--distributed --coordinator 127.0.0.1:{port} --num-processes 2"
    runs = [
        subprocess.Popen(
            _command(name, [*options, together, "--process-id", process]),
            env=os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for run in runs:
            output, _ = run.communicate(timeout=TIMEOUT)
            if run.returncode:
                raise subprocess.CalledProcessError(run.returncode, run.args, output, "")
    finally:
        for run in runs:
            run.kill()  # where one failed, the other waits for it


def _command(name: str, options: Iterable[object]) -> list[str]:
    words = (o.split() if isinstance(o, str) else [str(o)] for o in options)
    return [sys.executable, str(layout.script(name)), *itertools.chain.from_iterable(words)]
