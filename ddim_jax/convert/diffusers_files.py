"""Which files of a diffusers folder hold the weights that are asked for, and reading them.

A folder may hold several sets: the raw one beside the one that diffusers' `EMAModel` saved
(`unet/` and `unet_ema/`), single files beside shards, safetensors beside .bin, full precision
beside half. One is chosen, by what was asked for, and what else was there is said.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from ddim_jax.checks import check_one_of
from ddim_jax.convert.tensors import (
    is_torch_state_dict,
    read_safetensors,
    read_torch,
    torch_to_numpy,
)
from ddim_jax.files import read_json

SAFETENSORS = "diffusion_pytorch_model.safetensors"
BIN = "diffusion_pytorch_model.bin"
FETCH_AGAIN = "Copy or download the folder again."
NUM_LISTED = 12  # files of a folder that an error message lists

Weights = Literal["ema", "raw"]

_EMA_FIELDS = frozenset({"decay", "optimization_step"})
"""What `EMAModel` writes into the config.json of the network it saves, among others."""
_WEIGHTS_FILE = re.compile(
    r"diffusion_pytorch_model(?:\.(?P<variant>\w+))?\.(?P<form>safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)


class WeightsFile(NamedTuple):
    """One set of weights in a folder."""

    config: pathlib.Path
    """The config.json that describes its network."""
    path: pathlib.Path
    """The file of its tensors, or the index of its shards."""
    kind: Weights | None
    """None where nothing says whether it is averaged."""
    variant: str
    """"fp16" and the like; "" for the plain file."""


def find_weights(folder: pathlib.Path, weights: Weights) -> tuple[WeightsFile, str]:
    """The set asked for in a diffusers folder, and a clause that says what it is and what else
    was there.

    A set counts as averaged or raw by its folder's name, by what `EMAModel` wrote into its
    config.json, by its file's name, or because it stands beside the other one. A set of which
    nothing says so is taken for the one asked for. Raises ValueError, listing what is in the
    folder, where there is no network, and where the set asked for is not there.
    """
    check_one_of("weights", weights, ("ema", "raw"))
    found = _all_sets(folder)
    own = [one for one in found if one.config.parent in (folder, *_networks_in(folder))]
    if not own:
        raise _absent(folder)
    fitting = [one for one in own if one.kind in (weights, None)]
    if not fitting:
        raise ValueError(
            f"{folder} must hold the {weights} weights asked for; it has the {own[0].kind} ones "
            f"alone, {_names(own, folder)}. Ask for those"
            + (f", or give {folder.parent}." if len(found) > len(own) else ".")
        )
    taken = min(fitting, key=_preference)
    beside = [one for one in found if one is not taken]
    said = (
        f"the {taken.kind} weights"
        if taken.kind
        else f"{'weights' if beside else 'the only weights there'}; nothing says whether they are "
        "averaged"
    )
    also = f"; also there and not read: {_names(beside, folder)}" if beside else ""
    return taken, said + also


def _absent(folder: pathlib.Path) -> ValueError:
    configs = [place / "config.json" for place in (folder, *_networks_in(folder))]
    there = [config for config in configs if config.is_file()]
    wanted = [there[0].parent / name for name in (SAFETENSORS, BIN)] if there else configs
    return ValueError(
        f"no diffusers network here: none of {', '.join(map(str, wanted))} exists"
        f"{', nor a variant or shards of one' if there else ''}; in {folder} {_listing(folder)}."
    )


def read_weights(file: WeightsFile) -> dict[str, np.ndarray]:
    """The tensors of a set, by name. Raises ValueError for a damaged file, or a shard missing."""
    if file.path.suffix != ".json":
        return _read_one(file.path)
    index = read_json(file.path, way_out=FETCH_AGAIN).get("weight_map")
    if not isinstance(index, Mapping) or not all(isinstance(v, str) for v in index.values()):
        raise ValueError(f"{file.path} must have weight_map, tensor -> file. {FETCH_AGAIN}")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(index.values())):
        shard = file.path.parent / name
        if shard.parent != file.path.parent or not shard.is_file():
            raise ValueError(
                f"{file.path} names the shard {name}, which is not there: "
                f"{_listing(file.path.parent)}. {FETCH_AGAIN}"
            )
        tensors |= _read_one(shard)
    if absent := sorted(index.keys() - tensors.keys()):
        raise ValueError(
            f"{file.path} names {len(absent)} tensors that its shards lack, such as {absent[0]}. "
            f"{FETCH_AGAIN}"
        )
    return tensors


def _read_one(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_torch(path)
    if not is_torch_state_dict(content):
        raise ValueError(f"{path} must hold a state dict; got a {type(content).__name__}.")
    return torch_to_numpy(content)


def _networks_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders of a pipeline's network and of its average."""
    return [folder / "unet", folder / "unet_ema"]


def _all_sets(folder: pathlib.Path) -> list[WeightsFile]:
    """Every set in the folder, and in its brother where the folder is itself a network's."""
    places = [folder, *_networks_in(folder)]
    if folder.name in ("unet", "unet_ema"):
        places += [place for place in _networks_in(folder.parent) if place.name != folder.name]
    sets = [one for place in places for one in _sets_of(place)]
    known = {one.kind for one in sets}
    if "ema" in known and "raw" not in known:  # what stands beside an average is raw
        return [one._replace(kind=one.kind or "raw") for one in sets]
    if "raw" in known and "ema" not in known:
        return [one._replace(kind=one.kind or "ema") for one in sets]
    return sets


def _sets_of(place: pathlib.Path) -> Iterator[WeightsFile]:
    """The sets whose files stand in this folder, with the kind that they say themselves."""
    config = place / "config.json"
    if not config.is_file():
        return
    fields = read_json(config, way_out=FETCH_AGAIN).keys()
    averaged = place.name == "unet_ema" or fields >= _EMA_FIELDS
    for path in sorted(place.iterdir()):
        match = _WEIGHTS_FILE.fullmatch(path.name)
        if match and path.is_file():
            variant = match["variant"] or match["index_variant"] or ""
            by_name: dict[str, Weights] = {"ema": "ema", "non_ema": "raw", "raw": "raw"}
            yield WeightsFile(config, path, "ema" if averaged else by_name.get(variant), variant)


def _preference(file: WeightsFile) -> tuple[bool, bool, bool, bool, str]:
    """Smallest first: of known kind, full precision, safetensors, in one piece."""
    return (
        file.kind is None,
        file.variant not in ("", "ema", "non_ema", "raw"),
        ".safetensors" not in file.path.name,
        file.path.suffix == ".json",
        str(file.path),
    )


def _names(files: list[WeightsFile], folder: pathlib.Path) -> str:
    names = (
        f"{os.path.relpath(file.path, folder)}{f' ({file.kind})' if file.kind else ''}"
        for file in files
    )
    return ", ".join(names)


def _listing(folder: pathlib.Path) -> str:
    """What is in the folder, in words."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [os.path.relpath(path, folder) for path in paths]
    if not names:
        return "is nothing"
    more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return f"are {', '.join(names[:NUM_LISTED])}{more}"
