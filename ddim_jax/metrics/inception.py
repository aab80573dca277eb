"""The Inception v3 network of the Frechet Inception distance (weights of 2015-12-05).

Not torchvision's: average pools leave the border out of their mean, the last block pools by
maximum, and there are 1008 classes. With the published weights the 2048 pooled features are
pytorch-fid's, and so those behind nearly every published FID.

    params = load_inception()  # fetched once, 91 MB; or load_inception(path)
    features = inception_features(params, images)  # uint8 in, (B, 2048) out

Batch norm is folded into the convolutions when weights are loaded. Everything runs in full
float32: the faster products of accelerators (TF32, bfloat16) would move the distance.

Source: Szegedy et al. 2016 (arXiv:1512.00567); Heusel et al. 2017 (arXiv:1706.08500).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from ddim_jax.checks import check_finite_weights
from ddim_jax.convert.tensors import read_safetensors, read_torch, torch_to_numpy
from ddim_jax.files import naming
from ddim_jax.metrics.inception_weights import (
    WEIGHTS_FILE,
    WEIGHTS_SHA256,
    cache_dir,
    check_sha256,
    fetch_weights,
    manual_steps,
)
from ddim_jax.paths import local_path

InceptionParams: TypeAlias = dict[str, Any]
"""Nested by the names of the weight file: params["Mixed_5b"]["branch1x1"]["kernel"]."""

Images: TypeAlias = UInt8[Array, "B H W C"] | UInt8[np.ndarray, "B H W C"]

IMAGE_SIZE = 299
BATCH_NORM_EPS = 1e-3
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_PRECISION = jax.lax.Precision.HIGHEST


class InceptionOutput(NamedTuple):
    """Spatial means at four depths, and the class scores; jit computes only what is used."""

    pool64: Float[Array, "B 64"]
    pool192: Float[Array, "B 192"]
    pool768: Float[Array, "B 768"]
    pool2048: Float[Array, "B 2048"]
    logits: Float[Array, "B 1008"]


def _conv(x, name, features, kernel=(1, 1), stride=1, padding="SAME"):
    conv = nn.Conv(features, kernel, stride, padding, precision=_PRECISION, name=name)
    return nn.relu(conv(x))


def _max_pool(x):
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _avg_pool(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _concat(*branches):
    return jnp.concatenate(branches, axis=-1)


class _BlockA(nn.Module):
    pool_features: int

    @nn.compact
    def __call__(self, x):
        one = _conv(x, "branch1x1", 64)
        five = _conv(x, "branch5x5_1", 48)
        five = _conv(five, "branch5x5_2", 64, (5, 5))
        three = _conv(x, "branch3x3dbl_1", 64)
        three = _conv(three, "branch3x3dbl_2", 96, (3, 3))
        three = _conv(three, "branch3x3dbl_3", 96, (3, 3))
        pool = _conv(_avg_pool(x), "branch_pool", self.pool_features)
        return _concat(one, five, three, pool)


class _BlockB(nn.Module):
    @nn.compact
    def __call__(self, x):
        three = _conv(x, "branch3x3", 384, (3, 3), 2, "VALID")
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, (3, 3))
        double = _conv(double, "branch3x3dbl_3", 96, (3, 3), 2, "VALID")
        return _concat(three, double, _max_pool(x))


class _BlockC(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        one = _conv(x, "branch1x1", 192)
        seven = _conv(x, "branch7x7_1", self.width)
        seven = _conv(seven, "branch7x7_2", self.width, (1, 7))
        seven = _conv(seven, "branch7x7_3", 192, (7, 1))
        double = _conv(x, "branch7x7dbl_1", self.width)
        double = _conv(double, "branch7x7dbl_2", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_3", self.width, (1, 7))
        double = _conv(double, "branch7x7dbl_4", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_5", 192, (1, 7))
        pool = _conv(_avg_pool(x), "branch_pool", 192)
        return _concat(one, seven, double, pool)


class _BlockD(nn.Module):
    @nn.compact
    def __call__(self, x):
        three = _conv(x, "branch3x3_1", 192)
        three = _conv(three, "branch3x3_2", 320, (3, 3), 2, "VALID")
        seven = _conv(x, "branch7x7x3_1", 192)
        seven = _conv(seven, "branch7x7x3_2", 192, (1, 7))
        seven = _conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = _conv(seven, "branch7x7x3_4", 192, (3, 3), 2, "VALID")
        return _concat(three, seven, _max_pool(x))


class _BlockE(nn.Module):
    pool: str  # "average" or, in the network's last block, "max"

    @nn.compact
    def __call__(self, x):
        one = _conv(x, "branch1x1", 320)
        three = _conv(x, "branch3x3_1", 384)
        three_a = _conv(three, "branch3x3_2a", 384, (1, 3))
        three_b = _conv(three, "branch3x3_2b", 384, (3, 1))
        double = _conv(x, "branch3x3dbl_1", 448)
        double = _conv(double, "branch3x3dbl_2", 384, (3, 3))
        double_a = _conv(double, "branch3x3dbl_3a", 384, (1, 3))
        double_b = _conv(double, "branch3x3dbl_3b", 384, (3, 1))
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.pool == "max" else _avg_pool(x)
        pool = _conv(pooled, "branch_pool", 192)
        return _concat(one, three_a, three_b, double_a, double_b, pool)


class _Inception(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> InceptionOutput:
        x = _conv(x, "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
        x = _conv(x, "Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")
        x = _conv(x, "Conv2d_2b_3x3", 64, (3, 3))
        x64 = x = _max_pool(x)
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _conv(x, "Conv2d_4a_3x3", 192, (3, 3), 1, "VALID")
        x192 = x = _max_pool(x)
        x = _BlockA(32, name="Mixed_5b")(x)
        x = _BlockA(64, name="Mixed_5c")(x)
        x = _BlockA(64, name="Mixed_5d")(x)
        x = _BlockB(name="Mixed_6a")(x)
        x = _BlockC(128, name="Mixed_6b")(x)
        x = _BlockC(160, name="Mixed_6c")(x)
        x = _BlockC(160, name="Mixed_6d")(x)
        x768 = x = _BlockC(192, name="Mixed_6e")(x)
        x = _BlockD(name="Mixed_7a")(x)
        x = _BlockE("average", name="Mixed_7b")(x)
        x2048 = _BlockE("max", name="Mixed_7c")(x)
        p64, p192, p768, p2048 = (y.mean(axis=(1, 2)) for y in (x64, x192, x768, x2048))
        logits = nn.Dense(1008, precision=_PRECISION, name="fc")(p2048)
        return InceptionOutput(p64, p192, p768, p2048, logits)


def inception(params: InceptionParams, images: Images) -> InceptionOutput:
    """Features at every depth and logits of uint8 images; see `inception_input` for errors."""
    return cast(InceptionOutput, _Inception().apply({"params": params}, inception_input(images)))


def inception_input(images: Images) -> Float[Array, "B 299 299 3"]:
    """What the network sees, in [-1, 1], of uint8 images of any size, grey or RGB.

    Resized as torch does by default: bilinear, half-pixel centres, no antialiasing. Raises
    ValueError on another dtype or channel count.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must have shape (B, H, W, 1 or 3); got {images.shape}.")
    if images.dtype != jnp.uint8:
        raise ValueError(
            f"images must be uint8 with values 0 to 255; got {images.dtype}. Round them first: "
            "the rounding is part of what an FID measures."
        )
    x = jnp.broadcast_to(images, (*images.shape[:-1], 3)) / jnp.float32(255)
    size = (x.shape[0], IMAGE_SIZE, IMAGE_SIZE, 3)
    return 2 * jax.image.resize(x, size, "bilinear", antialias=False, precision=_PRECISION) - 1


@jax.jit
def inception_features(params: InceptionParams, images: Images) -> Float[Array, "B 2048"]:
    """The features of the FID, one program for each shape of images; see `inception`."""
    return inception(params, images).pool2048


@jax.jit
def inception_outputs(params: InceptionParams, images: Images) -> dict[str, Array]:
    """ "pool" (B, 2048), the features of the FID, and "logits" (B, 1008) without the last bias.

    Published Inception scores were made without that bias.
    """
    output = inception(params, images)
    return {"pool": output.pool2048, "logits": output.logits - params["fc"]["bias"]}


def load_inception(path: str | os.PathLike | None = None) -> InceptionParams:
    """Parameters from the published .pth or a .safetensors copy of it; None fetches them once.

    A file of the published name must have the published hash; every file must have exactly this
    network's names and shapes. A .pth is read by torch (extra `convert`). Raises FileNotFoundError
    without a file and ValueError on a damaged one or another network's.
    """
    path = fetch_weights() if path is None else local_path(path, "weights", "file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. {manual_steps(cache_dir())}")
    if path.name == WEIGHTS_FILE:
        check_sha256(path, WEIGHTS_SHA256)
    state_dict = _read_state_dict(path)
    with naming(path):
        return params_from_state_dict(state_dict)


def _read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return torch_to_numpy(read_torch(path))


def params_from_state_dict(state_dict: Mapping[str, np.ndarray]) -> InceptionParams:
    """Flax parameters from torch's names and layouts, batch norm folded in (float64, cast once).

    Raises ValueError that lists what is missing, left over or of another shape, and on weights that
    are not finite.
    """
    kernel_shapes = _kernel_shapes()
    _check_names_and_shapes(state_dict, kernel_shapes)
    params: dict[Any, Array] = {}
    for path in kernel_shapes:
        kernel, bias = _dense(state_dict) if path == ("fc",) else _folded_conv(state_dict, path)
        params[*path, "kernel"] = jnp.asarray(kernel, jnp.float32)
        params[*path, "bias"] = jnp.asarray(bias, jnp.float32)
    check_finite_weights({"/".join(path): x for path, x in params.items()})
    return traverse_util.unflatten_dict(params)


def _dense(state_dict):
    return np.transpose(state_dict["fc.weight"]), state_dict["fc.bias"]


def _folded_conv(state_dict, path):
    name = ".".join(path)
    scale, shift, mean, var = (np.float64(state_dict[f"{name}.bn.{x}"]) for x in _BATCH_NORM)
    with np.errstate(invalid="ignore"):  # a negative variance: NaN, which is refused
        scale = scale / np.sqrt(var + BATCH_NORM_EPS)
    kernel = np.transpose(state_dict[f"{name}.conv.weight"], (2, 3, 1, 0))
    return kernel * scale, shift - mean * scale


def inception_shapes() -> InceptionParams:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`, without any file."""
    images = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    return jax.eval_shape(_Inception().init, jax.random.key(0), images)["params"]


def _kernel_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path of every layer -> shape of its Flax kernel, read off the network itself."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(inception_shapes())
    return {path[:-1]: leaf.shape for path, leaf in flat.items() if path[-1] == "kernel"}


def _torch_shapes(path, kernel_shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of one layer in the published file."""
    name = ".".join(path)
    if len(kernel_shape) == 2:
        return {f"{name}.weight": kernel_shape[::-1], f"{name}.bias": kernel_shape[1:]}
    height, width, inputs, outputs = kernel_shape
    norm = {f"{name}.bn.{x}": (outputs,) for x in _BATCH_NORM}
    return {f"{name}.conv.weight": (outputs, inputs, height, width), **norm}


def _check_names_and_shapes(state_dict, kernel_shapes) -> None:
    want = {}
    for path, kernel_shape in kernel_shapes.items():
        want |= _torch_shapes(path, kernel_shape)
    got = {k: np.shape(v) for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    problems = [f"{name} is missing" for name in want if name not in got]
    problems += [f"{name} is left over" for name in got if name not in want]
    problems += [
        f"{name} has shape {got[name]} instead of {shape}"
        for name, shape in want.items()
        if got.get(name, shape) != shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"These are not the weights of {WEIGHTS_FILE}, nor of its form:\n  "
            + "\n  ".join(problems[:10])
            + more
        )
