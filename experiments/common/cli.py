"""What every script does at its edge: parse, run, and fail with one line."""

from __future__ import annotations

import errno
import logging
import os
import pathlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import tyro

from ddim_jax.runs.options import with_local_paths

Config = TypeVar("Config")


def run(
    main: Callable[[Config], None],
    config_type: type[Config],
    presets: dict[str, tuple[str, Config]] | None = None,
    prepare: Callable[[Config], Config] = with_local_paths,
) -> None:
    """Parse the command line into `config_type`, or a preset of it, and call `main` with it.

    Every path has its `~` expanded; a script whose settings need more gives its own `prepare`.
    Wrong settings, a missing extra or file end with one line on stderr and exit code 2, a run that
    diverged, a full disk or memory that does not suffice with exit code 1, a signal with 128 and
    its number. DDIM_JAX_TRACEBACK=1 shows where it came from.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        _run(main, config_type, presets, prepare)
    except _Interrupted as interrupted:
        name = signal.Signals(interrupted.number).name
        print(f"stopped by {name}; call again, all files are whole", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(128 + interrupted.number)  # threads at work, and atexit's, would hold it up


def _run(main, config_type, presets, prepare) -> None:
    if presets is None:
        config = tyro.cli(config_type)
    else:
        config = tyro.extras.overridable_config_cli(presets)
    _keep_compiled_programs()
    warnings.showwarning = _warn
    for library in ("asyncio", "absl"):  # what fails in orbax's threads is raised here too
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        main(prepare(config))
    except OSError as error:
        _stop(error, 1 if error.errno in _OF_THE_MACHINE else 2)
    except (ValueError, OverflowError, ImportError) as error:
        _stop(error, 2)
    except FloatingPointError as error:
        _stop(error, 1)
    except (MemoryError, RecursionError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = str(error) or type(error).__name__
        _stop(MemoryError(f"memory does not suffice for what was asked ({words[:300]})"), 1)


_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Errors that no other command line would mend."""


class _Interrupted(KeyboardInterrupt):
    def __init__(self, number: int):
        self.number = number


def _interrupt(number: int, frame: object) -> None:
    """End with one line, also where a library swallows what is raised here."""

    def end() -> None:
        time.sleep(5)
        os._exit(128 + number)

    threading.Thread(target=end, daemon=True).start()
    raise _Interrupted(number)


def _unraisable(ignored: "sys.UnraisableHookArgs") -> None:
    """As Python says it, but for what orbax leaves behind where saving or reading failed."""
    if str(ignored.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(ignored)


def _keep_compiled_programs() -> None:
    """Compile each program once per machine, unless JAX_COMPILATION_CACHE_DIR says where else."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "ddim_jax" / "programs"))


def _warn(message: Warning | str, category: type[Warning], *place: object) -> None:
    """A warning as users read it: a line, without the place in the code."""
    kind = "warning" if category is UserWarning else category.__name__
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _stop(error: Exception, code: int) -> NoReturn:
    if os.environ.get("DDIM_JAX_TRACEBACK"):
        raise error
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and not getattr(error, "on_all_hosts", False):
        os._exit(code)  # a regular end would wait minutes for hosts that wait for this one
    raise SystemExit(code)
