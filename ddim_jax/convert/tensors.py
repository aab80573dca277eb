"""What the checkpoint formats share: torch's layouts, the strict check, and reading files safely.

A format is described by two things only: the torch name of each of our parameters, and which of
our dense layers it stores as 1x1 convolutions.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.checks import check_array, check_count, check_finite_weights, check_is
from ddim_jax.files import write_whole
from ddim_jax.unet import UNet

Params = Any
"""What `model.init` returns under "params": nested dicts of arrays."""

StateDict = Mapping[str, np.ndarray]

TorchName = Callable[[tuple[str, ...]], str]
"""("down_0_block_0", "norm1", "scale") -> "down.0.block.0.norm1.weight", say."""

NUM_LISTED = 8  # differences an error message lists; it counts the others


def from_torch(state_dict: StateDict, shapes: Params, torch_name: TorchName) -> Params:
    """Parameters of the given shapes, float32, from a state dict in torch's layouts.

    Raises ValueError unless the state dict holds exactly these parameters in these shapes, finite.
    """
    check_is("state_dict", state_dict, Mapping, "a mapping of names to arrays")
    for name, array in state_dict.items():
        check_array(f"state_dict[{name!r}]", array)
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    wanted = {}  # torch name -> is it a kernel, shape in torch's layout
    for path, leaf in leaves:
        names = _names(path)
        kernel = names[-1] == "kernel"
        wanted[torch_name(names)] = kernel, _torch_shape(leaf.shape) if kernel else leaf.shape
    arrays = {name: _drop_1x1(array, wanted.get(name)) for name, array in state_dict.items()}
    _check_same(
        {name: array.shape for name, array in arrays.items()},
        {name: shape for name, (_, shape) in wanted.items()},
    )
    params = [
        jnp.asarray(_flax_layout(arrays[name]) if kernel else arrays[name], jnp.float32)
        for name, (kernel, _) in wanted.items()
    ]
    check_finite_weights(dict(zip(wanted, params, strict=True)))
    return jax.tree.unflatten(treedef, params)


def check_network(model: object, image_size: int) -> None:
    """Raise ValueError unless `model` is a UNet, and the size a number of pixels."""
    check_is("model", model, UNet, "a UNet")
    check_count("image_size", image_size)


def to_torch(
    params: Params, torch_name: TorchName, conv_1x1: frozenset[str]
) -> dict[str, np.ndarray]:
    """State dict in torch's layouts; dense layers named in `conv_1x1` become 1x1 convolutions."""
    check_is("params", params, Mapping, "nested dicts of arrays, such as model.init gives")
    if not jax.tree.leaves(params):
        raise ValueError("params must hold arrays; got none.")
    state_dict = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = _names(path)
        check_array("/".join(("params", *names)), leaf)
        array = np.asarray(leaf)
        if names[-1] == "kernel":
            array = np.ascontiguousarray(_torch_layout(array))
            if array.ndim == 2 and names[-2] in conv_1x1:
                array = array[:, :, None, None]
        state_dict[torch_name(names)] = array
    return state_dict


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, by name. ValueError if it is damaged."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(_missing("safetensors", path)) from error
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def write_safetensors(path: pathlib.Path, state_dict: StateDict) -> None:
    """Writes the tensors to a .safetensors file, whole or not at all."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(_missing("safetensors", path)) from error
    # diffusers looks at the format to know whose layouts these are.
    write_whole(path, safetensors.numpy.save(dict(state_dict), metadata={"format": "pt"}))


def read_torch(path: pathlib.Path) -> Any:
    """What a .bin, .ckpt or .pth file holds. ValueError if it is damaged or holds code.

    Only tensors and plain containers are read: a pickle that would run code is refused unrun.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(_missing("torch", path)) from error
    with path.open("rb") as file:  # an absent file is an OSError with its own clear message
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types for a damaged file
            # One sentence: what follows it is torch's advice on how to run such code after all.
            reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
            raise ValueError(
                f"{path} was refused: it is damaged, or it holds more than tensors and plain "
                f"containers, which could run code when read. torch says: {reason}"
            ) from error


def is_torch_state_dict(content: Any) -> bool:
    """Whether what `read_torch` returned is a non-empty mapping to tensors."""
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(hasattr(value, "detach") for value in content.values())
    )


def torch_to_numpy(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A torch state dict as float32 numpy arrays."""
    return {name: tensor.detach().float().numpy() for name, tensor in state_dict.items()}


def _missing(package: str, path: pathlib.Path) -> str:
    return f"{path} needs the package {package}: pip install 'ddim_jax[convert]'"


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def _torch_layout(kernel: np.ndarray) -> np.ndarray:
    return np.moveaxis(kernel, (-1, -2), (0, 1))  # (h, w, I, O) -> (O, I, h, w); (I, O) -> (O, I)


def _flax_layout(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    *window, features_in, features_out = shape
    return (features_out, features_in, *window)


def _drop_1x1(array: np.ndarray, wanted: tuple[bool, tuple[int, ...]] | None) -> np.ndarray:
    """Formats differ in which dense layers they store as 1x1 convolutions; both are read."""
    is_dense = wanted is not None and wanted[0] and len(wanted[1]) == 2
    return array[:, :, 0, 0] if is_dense and array.shape[2:] == (1, 1) else array


def _check_same(got: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    missing = [f"missing {name} {wanted[name]}" for name in wanted if name not in got]
    left_over = [f"left over {name} {got[name]}" for name in got if name not in wanted]
    reshaped = [
        f"shape of {name} is {got[name]}, must be {wanted[name]}"
        for name in wanted
        if name in got and got[name] != wanted[name]
    ]
    differences = missing + left_over + reshaped
    if differences:
        unlisted = len(differences) - NUM_LISTED
        raise ValueError(
            f"the weights do not fit this network: {len(missing)} tensors missing, "
            f"{len(left_over)} left over, {len(reshaped)} of another shape.\n  "
            + "\n  ".join(differences[:NUM_LISTED])
            + (f"\n  and {unlisted} more" if unlisted > 0 else "")
            + "\nIs it a checkpoint of another configuration or image size?"
        )
