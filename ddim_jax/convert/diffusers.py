"""diffusers folders: a `UNet2DModel` and its scheduler, such as google/ddpm-cifar10-32.

Configuration and safetensors are read without torch. A `UNet2DModel` can be many networks; one that
is not ours is refused, by the name of the setting that makes the difference.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ddim_jax.convert.tensors import (
    Params,
    StateDict,
    from_torch,
    is_torch_state_dict,
    naming,
    parameter_shapes,
    read_safetensors,
    read_torch,
    to_torch,
    torch_to_numpy,
    write_safetensors,
)
from ddim_jax.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    schedule_from_betas,
)
from ddim_jax.unet import UNet

BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
"""Our name of a noise schedule -> diffusers' name."""

SAFETENSORS = "diffusion_pytorch_model.safetensors"
BIN = "diffusion_pytorch_model.bin"


class DiffusersCheckpoint(NamedTuple):
    """What a diffusers folder holds."""

    model: UNet
    params: Params
    image_size: int
    scheduler: dict[str, Any] | None
    """scheduler_config.json as it stands, for `schedule_from_diffusers`; None if there is none."""
    description: str
    """What was read, for a log."""


def load_diffusers(path_or_id: str | os.PathLike[str]) -> DiffusersCheckpoint:
    """The network in a diffusers folder, or in a repository of the hub given as "owner/name".

    The folder has config.json and diffusion_pytorch_model.safetensors (or .bin, which needs torch)
    in itself or in unet/. Raises ValueError for a damaged file, for a configuration that is another
    network than `UNet`, and for tensors that do not fit it.
    """
    folder = pathlib.Path(path_or_id)
    if not folder.is_dir():
        folder = _download(os.fspath(path_or_id))
    config = _first_that_exists(folder / "config.json", folder / "unet" / "config.json")
    weights = _first_that_exists(config.parent / SAFETENSORS, config.parent / BIN)
    settings = _read_json(config)
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
) -> None:
    """Writes a folder that `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` load.

    `schedule` and the three arguments after it are those of `linear_schedule` and its siblings;
    the cosine one takes no betas. `clip_sample` is off as in `ddim_jax.sample`; diffusers' own
    default is on. Raises ValueError, before anything is written, if diffusers has no such network
    or `params` are not this model's.
    """
    config = config_from_unet(model, image_size)
    state_dict = flax_to_diffusers(params, model)
    diffusers_to_flax(state_dict, model, image_size)  # for its check
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": num_steps,
        "beta_schedule": BETA_SCHEDULES.get(schedule, schedule),
        "beta_start": beta_start,
        "beta_end": beta_end,
        "clip_sample": clip_sample,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",  # our "uniform" where the steps divide T
        "steps_offset": 0,
    }
    schedule_from_diffusers(scheduler)  # for its check
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    folder = pathlib.Path(folder)
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "unet" / "config.json", config)
    write_safetensors(folder / "unet" / SAFETENSORS, state_dict)


def diffusers_to_flax(state_dict: StateDict, model: UNet, image_size: int) -> Params:
    """Parameters of `model`, for `model.apply({"params": params}, x, t)`, float32.

    `state_dict` has the names of a `UNet2DModel`; the attention names of diffusers before 0.15
    (query, key, value, proj_attn) are read too. Raises ValueError, listing what differs, unless
    the two fit exactly.
    """
    renamed = {_current_name(name): array for name, array in state_dict.items()}
    return from_torch(renamed, parameter_shapes(model, image_size), _name_for(model))


def flax_to_diffusers(params: Params, model: UNet) -> dict[str, np.ndarray]:
    """State dict with the names of a `UNet2DModel`: `diffusers_to_flax` backwards."""
    return to_torch(params, _name_for(model), conv_1x1=frozenset({"nin_shortcut"}))


# Setting -> (what our network is, what diffusers takes when the key is missing).
_ONLY = {
    "attention_head_dim": (None, 8),  # None: one head, as wide as the feature map
    "freq_shift": (1, 0),
    "flip_sin_to_cos": (False, True),
    "downsample_padding": (0, 1),
    "norm_eps": (1e-6, 1e-5),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "attn_norm_num_groups": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
}
_REQUIRED = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
)
_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")  # without attention, with
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")


def unet_from_config(config: Mapping[str, Any]) -> tuple[UNet, int]:
    """The model a `UNet2DModel`'s config.json describes, and its image size.

    With class embeddings, the last of them becomes our "no class".
    Raises ValueError if it describes another network than `UNet`.
    """
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"_class_name must be 'UNet2DModel'; got {config['_class_name']!r}.")
    absent = [key for key in _REQUIRED if key not in config]
    if absent:
        raise ValueError(
            f"the configuration of a UNet2DModel must have {_REQUIRED}; {absent} miss."
        )
    for key, (ours, default) in _ONLY.items():
        value = config.get(key, default)
        if value != ours:
            missing = "" if key in config else f" (the key is missing, and means {default!r})"
            raise ValueError(
                f"{key} must be {ours!r} for the network of ddim_jax; got {value!r}{missing}. "
                "Another value makes another network, which the weights would not fit."
            )
    size, channels = config["sample_size"], config["in_channels"]
    if not isinstance(size, int):
        raise ValueError(f"sample_size must be one integer; got {size!r}.")
    if channels != config["out_channels"]:
        raise ValueError(
            f"out_channels must equal in_channels ({channels}); got {config['out_channels']}. A "
            "network that predicts variances as well is not supported."
        )
    widths = config["block_out_channels"]
    attends = [_attends(name, _DOWN_BLOCKS) for name in config["down_block_types"]]
    if [_attends(name, _UP_BLOCKS) for name in config["up_block_types"]] != attends[::-1]:
        raise ValueError(
            "up_block_types must mirror down_block_types, attention at the same levels; got "
            f"{config['up_block_types']} for {config['down_block_types']}."
        )
    if len(attends) != len(widths) or any(width % widths[0] for width in widths):
        raise ValueError(
            "block_out_channels must hold one multiple of its first entry per block; got "
            f"{widths} for {len(attends)} blocks."
        )
    num_embeds = config.get("num_class_embeds")
    model = UNet(
        image_channels=channels,
        channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        num_res_blocks=config.get("layers_per_block", 2),
        attention_resolutions=tuple(size // 2**i for i, attend in enumerate(attends) if attend),
        dropout=config.get("dropout", 0.0),
        num_classes=None if num_embeds is None else num_embeds - 1,
        norm_groups=config.get("norm_num_groups", 32),
    )
    return model, size


def config_from_unet(model: UNet, image_size: int) -> dict[str, Any]:
    """config.json of the `UNet2DModel` that is this model: `unet_from_config` backwards.

    Raises ValueError if channel_mults does not start with 1, as every `UNet2DModel` does.
    """
    if model.channel_mults[0] != 1:
        raise ValueError(
            f"channel_mults must start with 1 for diffusers; got {tuple(model.channel_mults)}."
        )
    levels = range(len(model.channel_mults))
    attends = [image_size // 2**level in model.attention_resolutions for level in levels]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": image_size,
        "in_channels": model.image_channels,
        "out_channels": model.image_channels,
        "block_out_channels": [model.channels * mult for mult in model.channel_mults],
        "down_block_types": [_DOWN_BLOCKS[attend] for attend in attends],
        "up_block_types": [_UP_BLOCKS[attend] for attend in reversed(attends)],
        "layers_per_block": model.num_res_blocks,
        "dropout": model.dropout,
        "norm_num_groups": model.norm_groups,
        "num_class_embeds": None if model.num_classes is None else model.num_classes + 1,
        **{key: ours for key, (ours, _) in _ONLY.items()},
    }


def schedule_from_diffusers(scheduler: Mapping[str, Any]) -> Schedule:
    """The noise schedule a scheduler_config.json describes.

    Raises ValueError for a schedule we do not have, and for a network that does not predict eps.
    """
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(
            f"prediction_type must be 'epsilon'; got {prediction!r}. Load the network alone, and "
            "wrap it with from_v or from_x0."
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr must be false; alpha_bar must stay above 0.")
    if scheduler.get("trained_betas") is not None:
        return schedule_from_betas(scheduler["trained_betas"])
    num_steps = scheduler.get("num_train_timesteps", 1000)
    betas = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    match scheduler.get("beta_schedule", "linear"):
        case "linear":
            return linear_schedule(num_steps, *betas)
        case "scaled_linear":
            return scaled_linear_schedule(num_steps, *betas)
        case "squaredcos_cap_v2":
            return cosine_schedule(num_steps)
        case other:
            names = tuple(BETA_SCHEDULES.values())
            raise ValueError(f"beta_schedule must be one of {names}; got {other!r}.")


def _attends(block_type: str, known: tuple[str, str]) -> bool:
    if block_type not in known:
        raise ValueError(f"block types must be among {known}; got {block_type!r}.")
    return block_type == known[1]


def _name_for(model: UNet):
    """Our parameter's path -> its name in a `UNet2DModel`, which counts up blocks from below."""
    top = len(model.channel_mults) - 1

    def name(names: tuple[str, ...]) -> str:
        module, *inner, leaf = names
        match module.split("_"):
            case ["down", level, kind, block]:
                module = f"down_blocks.{level}.{_KINDS[kind]}.{block}"
            case ["up", level, kind, block]:
                module = f"up_blocks.{top - int(level)}.{_KINDS[kind]}.{block}"
            case ["down", level, "downsample"]:
                module = f"down_blocks.{level}.downsamplers.0.conv"
            case ["up", level, "upsample"]:
                module = f"up_blocks.{top - int(level)}.upsamplers.0.conv"
            case ["mid", kind, place]:
                module = f"mid_block.{_KINDS[kind]}.{int(place) - 1}"
            case ["temb", "dense", place]:
                module = f"time_embedding.linear_{int(place) + 1}"
        parts = [_LAYERS.get(part, part) for part in (module, *inner)]
        return ".".join([*parts, "bias" if leaf == "bias" else "weight"])

    return name


_KINDS = {"block": "resnets", "attn": "attentions"}
_LAYERS = {
    "norm_out": "conv_norm_out",
    "label_embed": "class_embedding",
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OLD_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _current_name(name: str) -> str:
    """An attention layer's name since diffusers 0.15; other names as they are."""
    *modules, layer, leaf = name.split(".")
    return ".".join([*modules, _OLD_LAYERS.get(layer, layer), leaf])


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
            return _read_json(place / "scheduler_config.json")
    return None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got a {type(content).__name__}.")
    return content


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


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
