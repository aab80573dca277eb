"""What a distance is measured against: moments of features, with the recipe they were made by.

    network = feature_network("inception")  # or "classifier" with its file, or "pixels"
    batches = (batch["image"] for batch in sequential_batches(source, 100))
    statistics = compute_statistics(network, batches, num_samples=len(source), data={...})
    save_statistics("stats.npz", statistics)

The file holds `mu` and `sigma` as pytorch-fid and TTUR write them, so both read ours and we read
theirs, and a JSON string that says which network, which images and how many.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from ddim_jax.data import to_model_range
from ddim_jax.metrics.content_hash import content_hash
from ddim_jax.metrics.frechet import (
    FeatureMoments,
    finalize_moments,
    frechet_distance,
    init_moments,
    update_moments,
)

FeatureName: TypeAlias = Literal["inception", "classifier", "pixels"]
Images: TypeAlias = UInt8[Array, "_ H W C"] | UInt8[np.ndarray, "_ H W C"]

DISTANCE_NAMES: Mapping[str, str] = {
    "inception": "fid",
    "classifier": "fd_classifier",
    "pixels": "fd_pixels",
}
"""What the Frechet distance between such features is called in tables; only Inception's is FID."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """uint8 images (B, H, W, C) -> float32 features (B, D): `network(images)`, jitted.

    `apply_fn(params, images)` is the same as a pure function, for a caller's own jit or pmap.
    """

    name: FeatureName
    params: Any
    apply_fn: Callable[[Any, Images], Float[Array, "_ D"]]
    content_hash: str  # of params

    def __call__(self, images: Images) -> Float[Array, "_ D"]:
        """The features of the images."""
        return self.apply_fn(self.params, images)

    def dim(self, image_shape: tuple[int, int, int]) -> int:
        """Length of a feature vector of images (H, W, C), without computing one."""
        images = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
        return jax.eval_shape(self.apply_fn, self.params, images).shape[1]


def feature_network(
    name: FeatureName, weights: str | os.PathLike[str] | None = None
) -> FeatureNetwork:
    """The network called `name`, its weights read from the file `weights`.

    "inception" without a file fetches the published weights once; "classifier" needs the file that
    experiments/train_classifier.py writes; "pixels" has no weights: its features are the pixel
    values in data units, [-1, 1].
    """
    # A network's module is imported when asked for, so that pixels and saved files need no flax.
    if name == "inception":
        from ddim_jax.metrics.inception import inception_features, load_inception

        params = load_inception(weights)
        return FeatureNetwork(name, params, inception_features, content_hash(params))
    if name == "classifier":
        from ddim_jax.metrics.classifier import apply_classifier, load_classifier

        if weights is None:
            raise ValueError(
                "classifier features need weights, the file that experiments/train_classifier.py "
                "wrote: --feature-weights PATH."
            )
        trained = load_classifier(weights)
        apply_fn = jax.jit(
            lambda params, images: apply_classifier(trained.model, params, images).features
        )
        return FeatureNetwork(name, trained.params, apply_fn, trained.content_hash)
    if name == "pixels":
        if weights is not None:
            raise ValueError(f"pixels are features without weights; got weights {weights}.")
        return FeatureNetwork(name, {}, _flat_pixels, content_hash({}))
    raise ValueError(f"name must be one of {', '.join(DISTANCE_NAMES)}; got {name!r}.")


@jax.jit
def _flat_pixels(params, images):
    del params
    return to_model_range(images).reshape(images.shape[0], -1)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features, and what is needed to make them again.

    Published files hold only the two arrays; what they leave open is None.
    """

    mean: Float[np.ndarray, "D"]
    cov: Float[np.ndarray, "D D"]  # unbiased
    features: FeatureName
    network_hash: str | None = None
    num_samples: int | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name, split, size, crop
    rounding: str | None = None  # how floats became uint8

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of mean and covariance."""
        return content_hash({"mu": self.mean, "sigma": self.cov})

    def distance(self, moments: FeatureMoments) -> float:
        """Frechet distance of the features gathered in `moments` to these."""
        return frechet_distance(*finalize_moments(moments), self.mean, self.cov)

    def check_network(self, network: FeatureNetwork, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless `network` is the one that made these statistics.

        Published files hold no hash; then only the length of the features is compared.
        """
        if self.features != network.name:
            raise ValueError(
                f"The statistics are of {self.features} features; got a {network.name} network."
            )
        if self.network_hash not in (None, network.content_hash):
            raise ValueError(
                f"The statistics were made with {self.features} weights "
                f"{self.network_hash[:12]}; got {network.content_hash[:12]}. Use the same file, or "
                "make the statistics anew with experiments/statistics.py."
            )
        if (dim := network.dim(image_shape)) != len(self.mean):
            raise ValueError(
                f"The statistics are of {len(self.mean)} features; {network.name} gives {dim} on "
                f"images of shape {image_shape}."
            )


def feature_batches(
    network: FeatureNetwork, batches: Iterable[Images]
) -> Iterator[Float[np.ndarray, "_ D"]]:
    """The features of each batch, on the host, while the device works on the next batch.

    A short last batch is filled up and the filling dropped, so that one program serves all.
    """
    batch_size, before = 0, None
    for images in batches:
        batch_size = max(batch_size, len(images))
        num_images = len(images)
        if num_images < batch_size:
            images = np.pad(images, [(0, batch_size - num_images), (0, 0), (0, 0), (0, 0)])
        now = network(images), num_images
        if before is not None:
            yield _on_host(*before)
        before = now
    if before is not None:
        yield _on_host(*before)


def _on_host(features: Array, num_images: int) -> np.ndarray:
    return np.asarray(features)[:num_images]


def gather_moments(network: FeatureNetwork, batches: Iterable[Images]) -> FeatureMoments:
    """Moments of the features of all images in `batches`. Raises ValueError if there is none."""
    moments = None
    for features in feature_batches(network, batches):
        moments = update_moments(moments or init_moments(features.shape[1]), features)
    if moments is None:
        raise ValueError("batches must hold at least one image; got none.")
    return moments


def compute_statistics(
    network: FeatureNetwork,
    batches: Iterable[Images],
    *,
    num_samples: int,
    data: Mapping[str, Any],
    rounding: str = "uint8 as stored",
) -> FeatureStatistics:
    """Statistics of exactly `num_samples` images: each once, none dropped, none flipped.

    data: how to get the images again, as JSON: name, split, image shape, crop.
    Raises ValueError when the batches hold another number of images.
    """
    moments = gather_moments(network, batches)
    if moments.count != num_samples:
        raise ValueError(
            f"num_samples must be the number of images, {num_samples}; the batches held "
            f"{moments.count}. Was a batch dropped or repeated?"
        )
    mean, cov = finalize_moments(moments)
    return FeatureStatistics(
        mean, cov, network.name, network.content_hash, num_samples, dict(data), rounding
    )


def save_statistics(path: str | os.PathLike[str], statistics: FeatureStatistics) -> None:
    """Write a .npz that pytorch-fid and TTUR read too: `mu`, `sigma`, and `metadata` (JSON)."""
    metadata = {
        field.name: getattr(statistics, field.name)
        for field in dataclasses.fields(statistics)
        if field.name not in ("mean", "cov")
    }
    metadata["content_hash"] = statistics.content_hash
    new = f"{os.fspath(path)}.new"  # a kill leaves the old file or the new one
    with open(new, "wb") as file:  # given a name, numpy might append to it
        np.savez(file, mu=statistics.mean, sigma=statistics.cov, metadata=json.dumps(metadata))
    os.replace(new, path)


def load_statistics(path: str | os.PathLike[str]) -> FeatureStatistics:
    """What `save_statistics` wrote, or the `mu` and `sigma` that pytorch-fid and TTUR publish.

    The latter are taken to be of Inception features. Raises FileNotFoundError without a file, and
    ValueError on another kind of file or when the arrays are not those its metadata name.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; make statistics with experiments/statistics.py."
        )
    arrays = _read_npz(path)
    mean, cov = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(
            f"{path} must hold mu of shape (D,) and sigma of shape (D, D); got {mean.shape} and "
            f"{cov.shape}."
        )
    try:
        metadata = json.loads(str(arrays.get("metadata", '{"features": "inception"}')))
        want = metadata.pop("content_hash", None)
        statistics = FeatureStatistics(mean, cov, **metadata)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} holds metadata that this version cannot read: {error}; make it again with "
            "experiments/statistics.py."
        ) from error
    if want not in (None, statistics.content_hash):
        raise ValueError(f"{path} was altered: its arrays are not those that its metadata name.")
    return statistics


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a .npz file, or damaged: {error}") from error
    if missing := {"mu", "sigma"} - arrays.keys():
        raise ValueError(
            f"{path} must hold mu and sigma; {' and '.join(sorted(missing))} missing. Images "
            "in a .npz become statistics with experiments/statistics.py."
        )
    return arrays
