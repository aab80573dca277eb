"""Checkpoints of the DDIM paper's torch code (ermongroup/ddim) and of its siblings.

The same names are in pesser/pytorch_diffusion, which holds DDPM's published weights converted from
TensorFlow. Files come as a plain state dict, or as the list the paper's code saves:
[state dict whose names start with "module.", optimizer, epoch, step, moving average].
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ddim_jax.convert.prefixes import without_prefix
from ddim_jax.convert.tensors import (
    Params,
    StateDict,
    check_network,
    from_torch,
    is_torch_state_dict,
    read_torch,
    to_torch,
    torch_to_numpy,
)
from ddim_jax.files import naming
from ddim_jax.paths import local_path
from ddim_jax.unet import UNet, parameter_shapes

Weights = Literal["ema", "raw"]


def paper_to_flax(state_dict: StateDict, model: UNet, image_size: int) -> Params:
    """Parameters of `model`, for `model.apply({"params": params}, x, t)`, float32.

    `state_dict` has the paper code's names and torch's layouts. `image_size` is the one the network
    was trained at. Raises ValueError, listing what differs, unless the two fit exactly.
    """
    check_network(model, image_size)
    image_shape = (image_size, image_size, model.image_channels)
    return from_torch(state_dict, parameter_shapes(model, image_shape), _paper_name)


def flax_to_paper(params: Params) -> dict[str, np.ndarray]:
    """State dict with the paper code's names and torch's layouts: `paper_to_flax` backwards.

    A class embedding, which the paper's network does not have, is stored as "label_embed.weight".
    """
    return to_torch(params, _paper_name, _CONV_1X1)


def load_paper_checkpoint(
    path: str | os.PathLike[str], model: UNet, image_size: int, weights: Weights = "ema"
) -> tuple[Params, str]:
    """Parameters of `model` from a .ckpt or .pth file, and a sentence that says what was taken.

    A plain state dict holds one set of weights, which is taken whatever `weights` says. Needs
    torch, which reads tensors only: nothing in the file is ever executed. Raises ValueError for a
    damaged or unsafe file, another form, weights that are not there or do not fit the model.
    """
    path = local_path(path, "path", "file")
    state_dict, taken = _select(read_torch(path), weights, path)
    with naming(path):
        params = paper_to_flax(torch_to_numpy(state_dict), model, image_size)
    return params, f"{taken} from {path}, {len(state_dict)} tensors"


def _select(content: Any, weights: Weights, path: pathlib.Path) -> tuple[dict[str, Any], str]:
    """The state dict wanted, without "module." before its names, and what to call it."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw'; got {weights!r}.")
    if is_torch_state_dict(content):
        state_dict, kind, beside = without_prefix(content, weights)
        if kind:
            return state_dict, f"{_NAMES[kind]} weights by their names{beside}"
        taken = "the only weights (a plain state dict does not say whether they are averaged)"
        return state_dict, taken
    if not (isinstance(content, list) and content and is_torch_state_dict(content[0])):
        raise ValueError(
            f"{path} is neither a state dict nor a list that starts with one, the two forms the "
            f"paper's code saves; it holds a {_contents(content)}."
        )
    if weights == "raw":
        return without_prefix(content[0], "raw")[0], "raw weights"
    if not is_torch_state_dict(content[-1]) or len(content) == 1:
        raise ValueError(
            f"{path} has no moving average: the last of its {len(content)} entries is no state "
            "dict. Take its raw weights with weights='raw', knowing that they sample worse."
        )
    return without_prefix(content[-1], "ema")[0], "EMA weights"


_NAMES = {"ema": "EMA", "raw": "raw"}


def _contents(content: Any) -> str:
    """What a file holds, in words."""
    kind = type(content).__name__
    if isinstance(content, Mapping):
        return f"{kind} of {', '.join(map(str, [*content][:8])) or 'nothing'}"
    if isinstance(content, list):
        return f"{kind} of {', '.join(type(one).__name__ for one in content[:8]) or 'nothing'}"
    return kind


_CONV_1X1 = frozenset({"nin_shortcut", "q", "k", "v", "proj_out"})


def _paper_name(names: tuple[str, ...]) -> str:
    module, *inner, leaf = names
    match module.split("_"):
        case ["down" | "up" as side, level, "block" | "attn" as kind, block]:
            module = f"{side}.{level}.{kind}.{block}"
        case ["down" | "up" as side, level, "downsample" | "upsample" as kind]:
            module = f"{side}.{level}.{kind}.conv"
        case ["mid", kind, place]:
            module = f"mid.{kind}_{place}"
        case ["temb", "dense", place]:
            module = f"temb.dense.{place}"
    return ".".join([module, *inner, "bias" if leaf == "bias" else "weight"])
