"""Feature networks: images in, named features out. Metrics say which of them they read.

One more network is one file with its weights and its function, and one entry in FEATURE_NETWORKS.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from ddim_jax.checks import check_grey_levels, look_up
from ddim_jax.data.pixels import to_model_range
from ddim_jax.hashing import content_hash
from ddim_jax.paths import local_path

FeatureName: TypeAlias = str
"""A name in FEATURE_NETWORKS."""

Images: TypeAlias = UInt8[Array, "_ H W C"] | UInt8[np.ndarray, "_ H W C"]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """uint8 images (B, H, W, C) -> float32 features (B, D) by name.

    `apply_fn(params, images)`, jitted, is a pure function for a caller's own jit or pmap. "pool" is
    the vector that stands for an image; "logits", where there are classes, their scores (B, K).
    """

    name: FeatureName
    params: Any
    apply_fn: Callable[[Any, Images], dict[str, Array]]
    content_hash: str  # of params

    def __call__(self, images: Images) -> Float[Array, "_ D"]:
        """The pooled features of the images."""
        return self.apply_fn(self.params, images)["pool"]

    def dims(self, image_shape: tuple[int, ...]) -> dict[str, int]:
        """Length of each kind of feature vector of images (H, W, C), without computing one."""
        images = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
        features = jax.eval_shape(self.apply_fn, self.params, images)
        return {name: x.shape[1] for name, x in features.items()}

    def dim(self, image_shape: tuple[int, int, int]) -> int:
        """Length of the pooled features."""
        return self.dims(image_shape)["pool"]


Weights: TypeAlias = str | os.PathLike[str] | None


# A network's module is imported when asked for, so that pixels and saved files need no flax.


def _inception(weights: Weights) -> FeatureNetwork:
    from ddim_jax.metrics.inception import inception_outputs, load_inception

    params = load_inception(weights)
    return FeatureNetwork("inception", params, inception_outputs, content_hash(params))


def _classifier(weights: Weights) -> FeatureNetwork:
    from ddim_jax.metrics.classifier import apply_classifier, load_classifier

    if weights is None:
        raise ValueError(
            "classifier features need weights, the file that save_classifier wrote (on a command "
            "line --feature-weights PATH)."
        )
    trained = load_classifier(weights)

    def apply_fn(params: Any, images: Images) -> dict[str, Array]:
        output = apply_classifier(trained.model, params, images)
        return {"pool": output.features, "logits": output.logits}

    return FeatureNetwork("classifier", trained.params, jax.jit(apply_fn), trained.content_hash)


def _pixels(weights: Weights) -> FeatureNetwork:
    if weights is not None:
        raise ValueError(f"pixels are features without weights; got weights {weights}.")
    return FeatureNetwork("pixels", {}, _pixel_features, content_hash({}))


def _pixel_features(params: Any, images: Images) -> dict[str, Array]:
    check_grey_levels("images", images, 4)
    return _flat_pixels(params, images)


@jax.jit
def _flat_pixels(params: Any, images: Images) -> dict[str, Array]:
    del params
    return {"pool": to_model_range(images).reshape(images.shape[0], -1)}


FEATURE_NETWORKS: dict[str, Callable[[Weights], FeatureNetwork]] = {
    "inception": _inception,
    "classifier": _classifier,
    "pixels": _pixels,
}
"""name -> (weight file or None) -> the network."""


def feature_network(name: FeatureName, weights: Weights = None) -> FeatureNetwork:
    """The network called `name` in FEATURE_NETWORKS, its weights read from the file `weights`.

    "inception" without a file fetches the published weights once; "classifier" needs the file that
    `save_classifier` writes; "pixels" has no weights: its features are the pixel values in data
    units, [-1, 1].
    """
    return look_up("name", name, FEATURE_NETWORKS)(weights)


CLASSIFIER_FILE = "classifier.safetensors"
"""Where statistics of classifier features look for their network, unless told: beside them."""


def network_of(
    name: FeatureName, weights: Weights, stats_path: str | os.PathLike[str]
) -> FeatureNetwork:
    """The feature network; a classifier given no weights is the one beside the statistics.

    Raises ValueError for a file of weights that is not there.
    """
    if name == "classifier" and weights is None:
        weights = local_path(stats_path).parent / CLASSIFIER_FILE
    try:
        return feature_network(name, weights)
    except FileNotFoundError as error:  # a wrong path is a wrong setting
        raise ValueError(str(error)) from error


def feature_batches(
    network: FeatureNetwork, batches: Iterable[Images], names: Collection[str] = ("pool",)
) -> Iterator[dict[str, Float[np.ndarray, "_ _"]]]:
    """The features called `names` of each batch, on the host, while the device is at the next one.

    A short last batch is filled up and the filling dropped, so that one program serves all.
    """
    batch_size, before = 0, None
    for images in batches:
        check_grey_levels("images", images, 4)
        batch_size = max(batch_size, len(images))
        num_images = len(images)
        if num_images < batch_size:
            images = np.pad(images, [(0, batch_size - num_images), (0, 0), (0, 0), (0, 0)])
        features = network.apply_fn(network.params, images)
        now = {name: features[name] for name in names}, num_images
        if before is not None:
            yield _on_host(*before)
        before = now
    if before is not None:
        yield _on_host(*before)


def _on_host(features: dict[str, Array], num_images: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(x)[:num_images] for name, x in features.items()}
