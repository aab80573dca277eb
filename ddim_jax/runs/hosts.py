"""A run on several hosts: they join, agree on what is trained, and see one workdir, or all stop."""

from __future__ import annotations

import hashlib
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import traverse_util

from ddim_jax import parallel
from ddim_jax.hashing import content_hash
from ddim_jax.runs.config import TrainConfig
from ddim_jax.runs.folder import as_begun, saved_steps
from ddim_jax.runs.options import with_local_paths
from ddim_jax.train import TrainState

Config = TypeVar("Config", bound=TrainConfig)
MAY_DIFFER = frozenset({"workdir", "data", "data_dir", "num_workers", "coordinator", "process_id"})
"""Settings that a host may have of its own: where a thing stands there, and who it is."""


def join(config: Config) -> Config:
    """The settings, with every path expanded, once all hosts have joined, if there are several.

    Raises ValueError for settings that no run could use: on every host, once they have joined.
    """
    config.check_hosts()
    if config.distributed:
        parallel.initialize_distributed(config.coordinator, config.num_processes, config.process_id)
    return parallel.together(lambda: _usable(config))


def _usable(config: Config) -> Config:
    config.check()
    parallel.check_batch_size(config.batch_size, config.num_microbatches)
    return as_begun(with_local_paths(config))


def agree_on_run(description: Mapping[str, Any], resumed: bool) -> None:
    """Raise ValueError on every host unless all are to train the same: settings, data, versions.

    And start alike, for what they do next is done by all: resumed or not, or from init_from.
    """

    def facts() -> dict[str, Any]:
        shared = {key: value for key, value in description.items() if key not in MAY_DIFFER}
        software = {"jax": jax.__version__, "jax_enable_x64": jax.config.read("jax_enable_x64")}
        begin: dict[str, Any] = {"the workdir's having a run to resume": resumed}
        if (given := description["init_from"]) is not None:
            begin["init_from's list of steps"] = saved_steps(given)
        return traverse_util.flatten_dict(shared, sep=".") | software | begin

    parallel.agree(facts, "Start every host with the same settings, on the same files.")


def agree_on_workdir(workdir: pathlib.Path) -> None:
    """Raise ValueError on every host unless the folder, which is made, is one that all share."""
    if jax.process_count() == 1:
        return
    new = workdir / parallel.gather(f".shared.{secrets.token_hex(8)}")[0]
    try:
        parallel.together(lambda: _make(new))
        parallel.together(lambda: _see(new))
    finally:
        if jax.process_index() == 0:
            new.unlink(missing_ok=True)
    # One folder, and yet a network's file system may show a host what was there a minute ago.
    parallel.agree(lambda: _content(workdir), "Call again once all hosts see the same files.")


def _make(file: pathlib.Path) -> None:
    # Its folder is made by all: a host that looked for it too early may not see it otherwise (NFS).
    file.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        file.touch()


def _see(file: pathlib.Path) -> None:
    if not file.exists():
        raise ValueError(
            f"workdir must be one folder that all hosts share; {file.parent} on this host is not "
            "the one that process 0 writes to. Give a folder on a shared file system."
        )


def _content(workdir: pathlib.Path) -> dict[str, Any]:
    config = workdir / "config.json"
    config_hash = hashlib.sha256(config.read_bytes()).hexdigest()[:8] if config.is_file() else None
    return {"workdir's list of steps": saved_steps(workdir), "config.json's hash": config_hash}


def agree_on_state(state: TrainState) -> None:
    """Raise ValueError on every host unless all go on from the same step and the same weights."""

    def facts() -> dict[str, Any]:
        weights = {"params": state.params, "ema_params": state.ema_params}
        return {"step": int(state.step), "the hash of the weights": content_hash(weights)[:8]}

    parallel.agree(facts, "Start every host on the same kind of device, init_from the same files.")
