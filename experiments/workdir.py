"""A workdir: config.json beside checkpoints/, written by train.py or convert.py, read by the rest.

config.json holds what a network is sampled with ("model", "schedule", "spacing", "image_shape",
"rounding") and how it came about: a run's settings, or "converted_from". Sampling options are
arguments of the scripts and never stored with weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from presets import ModelConfig, ScheduleConfig

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.denoisers import guided
from ddim_jax.parallel import everywhere
from ddim_jax.schedule import Schedule, Spacing
from ddim_jax.types import EpsFn
from ddim_jax.unet import UNet

Weights = Literal["ema", "raw"]

MAY_CHANGE = frozenset(
    {
        "workdir",
        "data_dir",
        "num_workers",
        "max_steps",
        "num_microbatches",
        "max_seconds",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "keep_checkpoints",
        "distributed",
        "coordinator",
        "num_processes",
        "process_id",
        "rounding",
    }
)
"""Settings that a resumed run may give anew; all others decide its result."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What a workdir's config.json describes: a network without its weights."""

    model: UNet
    schedule: Schedule
    image_shape: tuple[int, int, int]
    spacing: Spacing

    def eps_fn(
        self, params: Any, label: jax.Array | None = None, guidance_scale: float = 1.0
    ) -> EpsFn:
        """The network as an `EpsFn`; `params` is an argument so that jit need not bake it in.

        A network that was trained without labels does not see `label`.
        A guidance scale other than 1 takes two network evaluations where others take one.
        """
        classes = self.model.num_classes

        def given(*label: jax.Array) -> EpsFn:
            return lambda x, t: cast(jax.Array, self.model.apply({"params": params}, x, t, *label))

        if label is None or classes is None:
            return given()
        if guidance_scale == 1:
            return given(label)
        return guided(given(label), given(jnp.full_like(label, classes)), guidance_scale)

    def check_label(self, label: int) -> None:
        """Raise ValueError unless the network has this class; one without labels has only 0."""
        classes = self.model.num_classes or 1
        if not 0 <= label < classes:
            raise ValueError(
                f"label must be in [0, {classes - 1}], the classes of this network; got {label}."
            )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network with weights, and where they come from."""

    network: Network
    params: Any
    """On every device of this host."""
    step: int
    weights: Weights

    def weights_hash(self) -> str:
        """See `weights_hash`."""
        return weights_hash(self.params)


def weights_hash(params: Any) -> str:
    """SHA-256 of the weights, its first 16 digits: the same weights have the same one."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def write_config(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Write config.json, or raise ValueError if the one there is of another run."""
    path = workdir / "config.json"
    wanted = json.loads(json.dumps(config))  # tuples become lists, as they do in the file
    # A run that saved nothing binds nobody. Not asked of orbax, which waits for the other hosts.
    saved = any(folder.name.isdecimal() for folder in (workdir / "checkpoints").glob("*"))
    if saved and path.exists():
        there = read_config(workdir)
        if "converted_from" in there and "converted_from" not in wanted:
            raise ValueError(
                f"workdir {workdir} holds converted weights, which cannot be trained on; give "
                "another workdir."
            )
        differ = [
            f"{key} is {there.get(key)!r} there and {wanted.get(key)!r} now"
            for key in sorted(there.keys() | wanted.keys())
            if key not in MAY_CHANGE and there.get(key) != wanted.get(key)
        ]
        if differ:
            raise ValueError(
                f"workdir {workdir} holds a run of another configuration: {'; '.join(differ)}. "
                "Give the same settings to resume it, or another workdir."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(wanted, indent=2) + "\n").encode())


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that a kill, or a full disk, leaves the old content or the new."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    os.replace(new, path)


@contextlib.contextmanager
def only_one_process(folder: pathlib.Path) -> Iterator[None]:
    """Hold the folder; ValueError if another process does. A killed process lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another process of this command; wait for it, or give "
                "another folder."
            ) from error
        yield


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The content of config.json."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"workdir {workdir} has no config.json, so it is not a trained or converted model; "
            "make one with experiments/train.py or experiments/convert.py."
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it or train anew.") from error


def checkpoints(workdir: pathlib.Path, keep: int = 3) -> Checkpointer:
    """The checkpoints of a workdir."""
    return Checkpointer(workdir / "checkpoints", keep=keep)


def load_network(workdir: str | pathlib.Path) -> Network:
    """The network that a workdir's config.json describes."""
    config = read_config(pathlib.Path(workdir))
    try:
        image_shape = tuple(config["image_shape"])
        return Network(
            model=ModelConfig(**_tuples(config["model"])).make(image_shape[-1]),
            schedule=ScheduleConfig(**config["schedule"]).make(),
            image_shape=image_shape,
            spacing=config["spacing"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{workdir}/config.json does not describe a network: {type(error).__name__} {error}. "
            "Restore it from the run's log or train anew."
        ) from error


def load_trained(
    workdir: str | pathlib.Path, weights: Weights = "ema", step: int | None = None
) -> Trained:
    """The network of a workdir with its averaged weights (or the raw ones), newest step first."""
    network = load_network(workdir)
    only = read_config(pathlib.Path(workdir)).get("converted_from", {}).get("weights", weights)
    if weights != only:
        raise ValueError(
            f"weights must be {only!r} for {workdir}, which was converted from a file and holds "
            f"that set alone; got {weights!r}."
        )
    label = None if network.model.num_classes is None else 0
    shapes = jax.eval_shape(
        lambda key: network.model.init(key, jnp.zeros(network.image_shape), 0, label),
        jax.random.key(0),
    )["params"]
    name = "ema_params" if weights == "ema" else "params"
    with checkpoints(pathlib.Path(workdir)) as checkpointer:
        params = checkpointer.restore({name: shapes}, step, partial=True)[name]
        step = checkpointer.latest_step() if step is None else step
    return Trained(network, everywhere(params), step or 0, weights)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
