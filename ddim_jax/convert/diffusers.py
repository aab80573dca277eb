"""diffusers folders: a `UNet2DModel` and its scheduler, such as google/ddpm-cifar10-32.

Configuration and safetensors are read without torch.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ddim_jax.checks import check_types
from ddim_jax.convert.diffusers_files import (
    BIN,
    FETCH_AGAIN,
    SAFETENSORS,
    Weights,
    find_weights,
    read_weights,
)
from ddim_jax.convert.diffusers_scheduler import SCHEDULER_TYPES, scheduler_config
from ddim_jax.convert.diffusers_unet import (
    NO_CLASS,
    config_from_unet,
    diffusers_to_flax,
    flax_to_diffusers,
    unet_from_config,
)
from ddim_jax.convert.prefixes import without_prefix
from ddim_jax.convert.tensors import Params, write_safetensors
from ddim_jax.files import naming, read_json, write_whole
from ddim_jax.paths import local_path
from ddim_jax.unet import UNet


class DiffusersCheckpoint(NamedTuple):
    """What a diffusers folder holds."""

    model: UNet
    params: Params
    image_size: int
    scheduler: dict[str, Any] | None
    """scheduler_config.json as it stands, for `schedule_from_diffusers` and its sibling for the
    prediction; None if there is none."""
    description: str
    """What was read, for a log."""


class DiffusersFolder(NamedTuple):
    """A checkpoint, and which of the folder's files it is."""

    checkpoint: DiffusersCheckpoint
    file: str
    """The file of the weights, or the index of its shards, within the folder."""
    kind: Weights | None
    """Averaged or raw; None if nothing says so."""
    unconditional: bool
    """Whether a network with classes is said to know "no class"; False without classes."""


def load_diffusers(
    path_or_id: str | os.PathLike[str],
    weights: Weights = "ema",
    *,
    last_class_is_null: bool | None = None,
) -> DiffusersCheckpoint:
    """The network in a diffusers folder, or in a repository of the hub given as "owner/name".

    The folder has config.json and diffusion_pytorch_model.safetensors (or .bin, which needs torch;
    a variant of half precision; or shards with their index) in itself, in unet/ or, an average
    beside them, in unet_ema/. `weights` says which of two sets; a set of which nothing says whether
    it is averaged is taken for the one asked for. Of a network with classes `last_class_is_null`
    says that its last row means "no class"; if None, what `save_diffusers` wrote, else no.
    Raises ValueError for a damaged file, for a configuration that is another network than `UNet`,
    for tensors that do not fit it, and where the set asked for is not there.
    """
    return open_diffusers(path_or_id, weights, last_class_is_null=last_class_is_null).checkpoint


def open_diffusers(
    path_or_id: str | os.PathLike[str],
    weights: Weights = "ema",
    *,
    last_class_is_null: bool | None = None,
) -> DiffusersFolder:
    """`load_diffusers`, with what it found out about the folder's files."""
    folder = local_path(path_or_id, "path", "folder")
    if not folder.is_dir():
        folder = _download(os.fspath(path_or_id))
    file, said = find_weights(folder, weights)
    settings = read_json(file.config, way_out=FETCH_AGAIN)
    with naming(file.config):
        model, image_size = unet_from_config(settings, last_class_is_null)
    tensors = read_weights(file)
    with naming(file.path):
        state_dict, by_name, beside = without_prefix(tensors, file.kind or weights)
        params = diffusers_to_flax(state_dict, model, image_size)
    if by_name and not file.kind:
        said = f"the {by_name} weights by their names"
    description = f"{len(state_dict)} tensors from {file.path}, {said}{beside}"
    return DiffusersFolder(
        DiffusersCheckpoint(model, params, image_size, _read_scheduler(folder), description),
        os.path.relpath(file.path, folder),
        file.kind or by_name,
        unconditional=model.num_classes is not None
        and model.no_class_row
        and (bool(last_class_is_null) or settings.get(NO_CLASS) == "trained"),
    )


def save_diffusers(
    folder: str | os.PathLike[str],
    model: UNet,
    params: Params,
    image_size: int,
    *,
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear",
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    clip_sample: bool = False,
    prediction: Literal["eps", "v", "x0"] = "eps",
    zero_terminal_snr: bool = False,
    unconditional: bool = True,
) -> None:
    """Writes a folder that `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` load.

    `schedule` and the three arguments after it are those of `linear_schedule` and its siblings;
    the cosine one takes no betas. `zero_terminal_snr` says that the function of that name was
    applied to it, `prediction` what the network predicts, `unconditional` that the row for
    "no class", where there is one, was trained. `clip_sample` is off as in
    `ddim_jax.sample`; diffusers' own default is on. Raises ValueError, before anything is written,
    if diffusers has no such network or `params` are not this model's.
    """
    config = config_from_unet(model, image_size, unconditional)
    state_dict = flax_to_diffusers(params, model)
    diffusers_to_flax(state_dict, model, image_size)  # for its check
    scheduler = scheduler_config(
        schedule=schedule,
        num_steps=num_steps,
        beta_start=beta_start,
        beta_end=beta_end,
        clip_sample=clip_sample,
        prediction=prediction,
        zero_terminal_snr=zero_terminal_snr,
    )
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    folder = local_path(folder, "folder", "folder")
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "unet" / "config.json", config)
    write_safetensors(folder / "unet" / SAFETENSORS, state_dict)


def _read_scheduler(folder: pathlib.Path) -> dict[str, Any] | None:
    places = [folder, folder / "scheduler", folder.parent / "scheduler"]
    if folder.parent.name.startswith("checkpoint-"):  # a network saved while training
        places.append(folder.parent.parent / "scheduler")
    for place in places:
        if (place / "scheduler_config.json").is_file():
            scheduler = read_json(place / "scheduler_config.json", way_out=FETCH_AGAIN)
            with naming(place / "scheduler_config.json"):
                check_types(scheduler, SCHEDULER_TYPES, FETCH_AGAIN)
            return scheduler
    return None


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def _download(repo_id: str) -> pathlib.Path:
    """The folder of the hub's cache with this repository's network in it."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
        raise ValueError(f"no folder {repo_id}; a repository of the hub is written owner/name.")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"no folder {repo_id}; to fetch that repository from the hub: "
            "pip install 'ddim_jax[convert]'"
        ) from error
    fetch = functools.partial(huggingface_hub.snapshot_download, repo_id)
    about = ["config.json", "scheduler_config.json"]
    whole = [SAFETENSORS, *(SAFETENSORS.replace(".", f".{v}.", 1) for v in ("ema", "non_ema"))]
    shards = [f"{SAFETENSORS}.index.json", SAFETENSORS.replace(".", "-*-of-*.", 1)]
    variants = [SAFETENSORS.replace(".", ".*.", 1), f"{SAFETENSORS}.index.*.json"]

    def fetched(names: Sequence[str]) -> pathlib.Path:
        places = [f"{place}{name}" for place in ("", "unet/", "unet_ema/") for name in names]
        return local_path(fetch(allow_patterns=[*places, "scheduler/scheduler_config.json"]))

    # One stage after another, so that half precision is not fetched beside full, say.
    folder = fetched([*about, *whole, *shards])
    for names in (variants, [BIN]):
        if any(folder.rglob("diffusion_pytorch_model*")):
            break
        folder = fetched(names)
    return folder
