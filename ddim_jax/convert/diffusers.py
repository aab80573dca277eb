"""diffusers folders: a `UNet2DModel` and its scheduler, such as google/ddpm-cifar10-32.

Configuration and safetensors are read without torch.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ddim_jax.convert.diffusers_scheduler import scheduler_config
from ddim_jax.convert.diffusers_unet import (
    config_from_unet,
    diffusers_to_flax,
    flax_to_diffusers,
    unet_from_config,
)
from ddim_jax.convert.tensors import (
    Params,
    is_torch_state_dict,
    naming,
    read_safetensors,
    read_torch,
    torch_to_numpy,
    write_safetensors,
)
from ddim_jax.files import read_json, write_whole
from ddim_jax.paths import local_path
from ddim_jax.unet import UNet

SAFETENSORS = "diffusion_pytorch_model.safetensors"
BIN = "diffusion_pytorch_model.bin"
FETCH_AGAIN = "Copy or download the folder again."


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


def load_diffusers(path_or_id: str | os.PathLike[str]) -> DiffusersCheckpoint:
    """The network in a diffusers folder, or in a repository of the hub given as "owner/name".

    The folder has config.json and diffusion_pytorch_model.safetensors (or .bin, which needs torch)
    in itself or in unet/. Raises ValueError for a damaged file, for a configuration that is another
    network than `UNet`, and for tensors that do not fit it.
    """
    folder = local_path(path_or_id, "path", "folder")
    if not folder.is_dir():
        folder = _download(os.fspath(path_or_id))
    config = _first_that_exists(folder / "config.json", folder / "unet" / "config.json")
    weights = _first_that_exists(config.parent / SAFETENSORS, config.parent / BIN)
    settings = read_json(config, way_out=FETCH_AGAIN)
    with naming(config):
        model, image_size = unet_from_config(settings)
    state_dict = read_safetensors(weights) if weights.name == SAFETENSORS else _read_bin(weights)
    with naming(weights):
        params = diffusers_to_flax(state_dict, model, image_size)
    description = (
        f"{len(state_dict)} tensors from {weights}, the only weights there; "
        "diffusers does not record whether they are averaged"
    )
    return DiffusersCheckpoint(model, params, image_size, _read_scheduler(folder), description)


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
) -> None:
    """Writes a folder that `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` load.

    `schedule` and the three arguments after it are those of `linear_schedule` and its siblings;
    the cosine one takes no betas. `zero_terminal_snr` says that the function of that name was
    applied to it, `prediction` what the network predicts. `clip_sample` is off as in
    `ddim_jax.sample`; diffusers' own default is on. Raises ValueError, before anything is written,
    if diffusers has no such network or `params` are not this model's.
    """
    config = config_from_unet(model, image_size)
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


def _first_that_exists(*paths: pathlib.Path) -> pathlib.Path:
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"no diffusers network here: none of {', '.join(map(str, paths))} exists.")


def _read_bin(path: pathlib.Path) -> dict[str, np.ndarray]:
    content = read_torch(path)
    if not is_torch_state_dict(content):
        raise ValueError(f"{path} must hold a state dict; got a {type(content).__name__}.")
    return torch_to_numpy(content)


def _read_scheduler(folder: pathlib.Path) -> dict[str, Any] | None:
    for place in (folder, folder / "scheduler", folder.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            return read_json(place / "scheduler_config.json", way_out=FETCH_AGAIN)
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
    names = ["config.json", "scheduler_config.json", SAFETENSORS]
    patterns = [*names, *(f"unet/{name}" for name in names), "scheduler/scheduler_config.json"]
    folder = pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
    if not list(folder.rglob(SAFETENSORS)):  # an old repository
        huggingface_hub.snapshot_download(repo_id, allow_patterns=[BIN, f"unet/{BIN}"])
    return folder
