"""diffusers' `UNet2DModel` and our `UNet`: configuration and names of tensors, both ways.

A `UNet2DModel` can be many networks; one that is not ours is refused, by the name of the setting
that makes the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.checks import check_is, check_types
from ddim_jax.convert.tensors import (
    Params,
    StateDict,
    TorchName,
    check_network,
    from_torch,
    to_torch,
)
from ddim_jax.unet import UNet, parameter_shapes


def diffusers_to_flax(state_dict: StateDict, model: UNet, image_size: int) -> Params:
    """Parameters of `model`, for `model.apply({"params": params}, x, t)`, float32.

    `state_dict` has the names of a `UNet2DModel`; the attention names of diffusers before 0.15
    (query, key, value, proj_attn) are read too. Raises ValueError, listing what differs, unless
    the two fit exactly.
    """
    check_network(model, image_size)
    check_is("state_dict", state_dict, Mapping, "a mapping of names to arrays")
    renamed = {_current_name(name): array for name, array in state_dict.items()}
    image_shape = (image_size, image_size, model.image_channels)
    return from_torch(renamed, parameter_shapes(model, image_shape), _name_for(model))


def flax_to_diffusers(params: Params, model: UNet) -> dict[str, np.ndarray]:
    """State dict with the names of a `UNet2DModel`: `diffusers_to_flax` backwards."""
    check_is("model", model, UNet, "a UNet")
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
_TYPES = {
    **dict.fromkeys(("in_channels", "out_channels", "layers_per_block"), int),
    **dict.fromkeys(("down_block_types", "up_block_types"), tuple[str, ...]),
    "block_out_channels": tuple[int, ...],
    "dropout": float,
    "norm_num_groups": int,
    "num_class_embeds": int | None,
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


NO_CLASS = "_no_class"
"""Our own entry of config.json: the last class means none, and is "trained" or "untrained".
diffusers keeps private entries, and does not read them."""


def unet_from_config(
    config: Mapping[str, Any], last_class_is_null: bool | None = None
) -> tuple[UNet, int]:
    """The model a `UNet2DModel`'s config.json describes, and its image size.

    Each class embedding is a class, but that `last_class_is_null` may say that the last means
    "no class"; if None, that is so for what `config_from_unet` wrote of such a network.
    Raises ValueError if it describes another network than `UNet`.
    """
    _check_settings(config)
    size, widths = config["sample_size"], config["block_out_channels"]
    attends = _check_blocks(config)
    num_embeds = config.get("num_class_embeds")
    if last_class_is_null and (num_embeds or 0) < 2:
        raise ValueError(
            "last_class_is_null must be left out for a network without classes; num_class_embeds "
            f"is {num_embeds}."
        )
    null = NO_CLASS in config if last_class_is_null is None else last_class_is_null
    model = UNet(
        image_channels=config["in_channels"],
        channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        num_res_blocks=config.get("layers_per_block", 2),
        attention_resolutions=tuple(size // 2**i for i, attend in enumerate(attends) if attend),
        dropout=config.get("dropout", 0.0),
        num_classes=None if num_embeds is None else num_embeds - null,
        norm_groups=config.get("norm_num_groups", 32),
        no_class_row=null or num_embeds is None,
    )
    return model, size


def config_from_unet(model: UNet, image_size: int, unconditional: bool = True) -> dict[str, Any]:
    """config.json of the `UNet2DModel` that is this model: `unet_from_config` backwards.

    `unconditional` says that the row for "no class", where there is one, was trained.
    Raises ValueError if channel_mults does not start with 1, as every `UNet2DModel` does.
    """
    if model.channel_mults[0] != 1:
        raise ValueError(
            f"channel_mults must start with 1 for diffusers; got {tuple(model.channel_mults)}."
        )
    levels = range(len(model.channel_mults))
    attends = [image_size // 2**level in model.attention_resolutions for level in levels]
    num_embeds, note = model.num_classes, {}
    if num_embeds is not None and model.no_class_row:
        num_embeds, note = num_embeds + 1, {NO_CLASS: "trained" if unconditional else "untrained"}
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
        "num_class_embeds": num_embeds,
        **note,
        **{key: ours for key, (ours, _) in _ONLY.items()},
    }


def _check_settings(config: Mapping[str, Any]) -> None:
    """ValueError, by its name, for a setting that our network does not have."""
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"_class_name must be 'UNet2DModel'; got {config['_class_name']!r}.")
    check_types(config, _TYPES)
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
            "network that predicts variances as well, in twice the channels, is not supported: "
            "its loss was another one. Take a network trained with fixed variances."
        )


def _check_blocks(config: Mapping[str, Any]) -> list[bool]:
    """Whether the blocks of each level attend; ValueError for levels that our network has not."""
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
    return attends


def _attends(block_type: str, known: tuple[str, str]) -> bool:
    if block_type not in known:
        raise ValueError(f"block types must be among {known}; got {block_type!r}.")
    return block_type == known[1]


def _name_for(model: UNet) -> TorchName:
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
