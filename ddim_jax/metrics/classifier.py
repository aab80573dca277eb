"""A small classifier to measure with, trained on the data set at hand: no download, any images.

Distances between its features order methods on one data set. They are named fd_classifier, never
FID, and compare only under the same weights, which `content_hash` names.

    model = Classifier(num_classes=10)
    params = init_classifier(key, model, image_shape=(32, 32, 3))
    (loss, accuracy), grads = jax.value_and_grad(classifier_loss, has_aux=True)(
        params, model, images, labels
    )
    save_classifier("classifier.safetensors", model, params, {"data": "cifar10"})
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int, UInt8

from ddim_jax.checks import check_finite_weights, check_grey_levels, check_types
from ddim_jax.data.pixels import to_model_range
from ddim_jax.files import naming, parsed, write_whole
from ddim_jax.hashing import content_hash
from ddim_jax.paths import local_path
from ddim_jax.types import PRNGKey

Images: TypeAlias = UInt8[Array, "B H W C"] | UInt8[np.ndarray, "B H W C"]
Labels: TypeAlias = Int[Array, "B"] | Int[np.ndarray, "B"]

_HEADER = "ddim_jax.classifier"


class ClassifierOutput(NamedTuple):
    """Features are spatial means after the last convolution, not negative; D is 4 x width."""

    features: Float[Array, "B D"]
    logits: Float[Array, "B K"]


class Classifier(nn.Module):
    """Five 3x3 convolutions on uint8 images of any size: one at full size, two at 1/2, two at 1/4.

    Without normalisation layers: those would hide an image's contrast from its features.
    """

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, images: Images) -> ClassifierOutput:
        """Features and logits of uint8 images."""
        x = to_model_range(images)
        x = _conv(x, "conv_in", self.width)
        for level in (1, 2):
            x = _conv(x, f"down_{level}", self.width * 2**level, stride=2)
            x = x + _conv(x, f"conv_{level}", self.width * 2**level)
        features = x.mean(axis=(1, 2))
        return ClassifierOutput(features, nn.Dense(self.num_classes, name="logits")(features))


def _conv(x, name, features, stride=1):
    conv = nn.Conv(
        features,
        (3, 3),
        stride,
        kernel_init=nn.initializers.he_normal(),
        precision=jax.lax.Precision.HIGHEST,  # the same distance on every device
        name=name,
    )
    return nn.relu(conv(x))


class TrainedClassifier(NamedTuple):
    """A network, its weights, the hash that names them, and how they came about."""

    model: Classifier
    params: Any
    content_hash: str
    metadata: dict[str, Any]


def init_classifier(key: PRNGKey, model: Classifier, image_shape: tuple[int, int, int]) -> Any:
    """Random parameters for images of `image_shape` (H, W, C); H and W may change later."""
    return jax.jit(model.init)(key, jnp.zeros((1, *image_shape), jnp.uint8))["params"]


def apply_classifier(model: Classifier, params: Any, images: Images) -> ClassifierOutput:
    """Features and logits of uint8 images; ValueError unless they have its number of channels."""
    check_grey_levels("images", images, 4)
    channels = params["conv_in"]["kernel"].shape[2]
    if images.shape[-1] != channels:
        raise ValueError(
            f"images must have {channels} channels, as those that the classifier was trained on; "
            f"got shape {images.shape}. Train one on such images."
        )
    return cast(ClassifierOutput, model.apply({"params": params}, images))


def classifier_loss(
    params: Any, model: Classifier, images: Images, labels: Labels
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy in nats, and the share of right answers; for value_and_grad(has_aux)."""
    logits = apply_classifier(model, params, images).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
    return losses.mean(), jnp.mean(logits.argmax(axis=-1) == labels)


def save_classifier(
    path: str | os.PathLike, model: Classifier, params: Any, metadata: Mapping[str, Any]
) -> str:
    """Write one .safetensors file with `metadata` (what JSON holds) inside; returns its hash.

    The hash is `content_hash(params)`: of the weights alone, whatever the metadata say.
    """
    from safetensors.numpy import save

    header = {
        "num_classes": model.num_classes,
        "width": model.width,
        "content_hash": content_hash(params),
        "metadata": dict(metadata),
    }
    tensors: dict[Any, Any] = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    write_whole(local_path(path, "path", "file"), save(tensors, {_HEADER: json.dumps(header)}))
    return header["content_hash"]


def load_classifier(path: str | os.PathLike) -> TrainedClassifier:
    """What `save_classifier` wrote. Raises ValueError on other files, altered or NaN weights."""
    from safetensors import SafetensorError, safe_open

    path = local_path(path, "path", "file")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; train a classifier and write it with save_classifier."
        )
    try:
        with safe_open(path, "numpy") as file:
            header = parsed((file.metadata() or {}).get(_HEADER, "null"))
            names = file.keys()
            tensors = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a classifier, or damaged: {error}") from error
    if header is None:
        raise ValueError(f"{path} is not a classifier: its header has no entry {_HEADER!r}.")
    kinds = {"num_classes": int, "width": int, "content_hash": str, "metadata": dict}
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a classifier: its entry {_HEADER!r} is no object.")
    if missing := kinds.keys() - header.keys():
        lacks = ", ".join(sorted(missing))
        raise ValueError(f"{path} is not a classifier: its entry {_HEADER!r} lacks {lacks}.")
    with naming(path):
        check_types(header, kinds, "Train the classifier anew.")
    params = traverse_util.unflatten_dict(tensors, sep="/")
    if (got := content_hash(params)) != header["content_hash"]:
        raise ValueError(
            f"{path} must hold the weights {header['content_hash'][:12]} its header names; got "
            f"{got[:12]}. Copy the file again."
        )
    with naming(path):
        check_finite_weights(params)
    model = Classifier(header["num_classes"], header["width"])
    return TrainedClassifier(model, params, header["content_hash"], header["metadata"])
