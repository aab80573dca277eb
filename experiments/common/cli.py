"""What every script does at its edge: parse, run, and fail with one line."""

from __future__ import annotations

import os
import pathlib
import sys
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
    diverged with exit code 1. DDIM_JAX_TRACEBACK=1 shows where it came from.
    """
    if presets is None:
        config = tyro.cli(config_type)
    else:
        config = tyro.extras.overridable_config_cli(presets)
    _keep_compiled_programs()
    warnings.showwarning = _warn
    try:
        main(prepare(config))
    except (ValueError, OverflowError, ImportError, OSError) as error:
        _stop(error, 2)
    except FloatingPointError as error:
        _stop(error, 1)


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
