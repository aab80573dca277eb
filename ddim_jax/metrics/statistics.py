"""What metrics are compared with: saved states of real images, with the recipe they were made by.

    network = feature_network("inception")  # or "classifier" with its file, or "pixels"
    batches = (batch["image"] for batch in sequential_batches(source, 100))
    metrics = named_metrics(["frechet", "kid"])
    statistics = compute_statistics(
        network, batches, num_samples=len(source), data={...}, metrics=metrics
    )
    save_statistics("stats.npz", statistics)

    states = gather(network, batches_of_samples, metrics)
    for metric in metrics:
        statistics.compute(metric, states)  # {"fid": 3.1}, then {"kid": 0.002, "kid_std": 0.0004}

The file holds `mu` and `sigma` as pytorch-fid and TTUR write them, so both read ours and we read
theirs; a JSON string that says which network, which images and how many; and the arrays of other
metrics' states.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ddim_jax.checks import check_grey_levels, check_types
from ddim_jax.files import naming, parsed, write_whole
from ddim_jax.hashing import content_hash
from ddim_jax.metrics.features import FeatureName, FeatureNetwork, Images, feature_batches
from ddim_jax.metrics.frechet import (
    MOMENTS,
    FeatureMoments,
    Gaussian,
    finalize_moments,
    frechet_metric,
)
from ddim_jax.metrics.metric import (
    Metric,
    State,
    column_name,
    init_states,
    state_from_arrays,
    state_to_arrays,
    update_states,
)
from ddim_jax.metrics.statistics_file import read_arrays
from ddim_jax.paths import local_path

FORMAT = 2
"""Of the files written; 1 had no format number and the moments alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features, other metrics' states, and what made them.

    Published files hold only the two arrays; what they leave open is None.
    """

    mean: Float[np.ndarray, "D"]
    cov: Float[np.ndarray, "D D"]  # unbiased
    features: FeatureName
    network_hash: str | None = None
    num_samples: int | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name, split, size, crop
    rounding: str | None = None  # how floats became uint8
    states: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    """Fields of the saved states, by the state's name and "name.field"; the moments not among
    them."""

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of mean and covariance."""
        return content_hash({"mu": self.mean, "sigma": self.cov})

    @functools.cached_property
    def state_hashes(self) -> dict[str, str]:
        """SHA-256 of each saved state, by its name."""
        return {name: content_hash(dict(arrays)) for name, arrays in self.states.items()}

    def reference(self, metric: Metric) -> State | None:
        """What `metric.compute` compares with: a saved state, a `Gaussian` in place of moments.

        None for a metric that needs none. Raises ValueError when the file lacks the state.
        """
        if not metric.needs_reference:
            return None
        if metric.state == MOMENTS:
            return Gaussian(self.mean, self.cov)
        if metric.state not in self.states:
            raise ValueError(
                f"{metric.name} compares with {metric.state}, which the statistics lack; they hold "
                f"{', '.join([MOMENTS, *self.states])}. Make them anew with {metric.name} among "
                "their metrics."
            )
        return state_from_arrays(metric, self.states[metric.state], metric.state)

    def reference_hash(self, metric: Metric) -> str | None:
        """SHA-256 of what the metric is compared with, None where it needs nothing."""
        if not metric.needs_reference:
            return None
        self.reference(metric)  # refuses what is not there
        return self.content_hash if metric.state == MOMENTS else self.state_hashes[metric.state]

    def compute(self, metric: Metric, states: Mapping[str, State]) -> dict[str, float]:
        """The metric's numbers for the images behind `states`, by the names of their columns."""
        numbers = metric.compute(states[metric.state], self.prepared(metric))
        return {column_name(x, self.features): numbers[x.name] for x in metric.numbers}

    def prepared(self, metric: Metric) -> Any:
        """`reference` with what is the same for all images worked out, at the first call."""
        key = metric.state, metric.prepare
        if metric.needs_reference and key not in self._prepared:
            self._prepared[key] = metric.prepare(self.reference(metric))
        return self._prepared.get(key)

    @functools.cached_property
    def _prepared(self) -> dict[Any, Any]:
        return {}

    def distance(self, moments: FeatureMoments) -> float:
        """Frechet distance of the features gathered in `moments` to these."""
        metric = frechet_metric()
        return metric.compute(moments, self.prepared(metric))["fd"]

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
                "make the statistics anew with this one."
            )
        if (dim := network.dim(image_shape)) != len(self.mean):
            raise ValueError(
                f"The statistics are of {len(self.mean)} features; {network.name} gives {dim} on "
                f"images of shape {image_shape}."
            )


def gather(
    network: FeatureNetwork, batches: Iterable[Images], metrics: Sequence[Metric]
) -> dict[str, State]:
    """The states of the metrics, by the states' names, over all images; the first has index 0.

    Raises ValueError when there is no image, and for a metric that reads what the network lacks.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("batches must hold at least one image; got none.")
    check_grey_levels("batches", first, 4)
    states = init_states(metrics, network.dims(first.shape[1:]))
    names, start = {metric.features for metric in metrics}, 0
    for features in feature_batches(network, itertools.chain([first], batches), names):
        stop = start + len(next(iter(features.values())))
        states = update_states(states, metrics, features, np.arange(start, stop))
        start = stop
    return states


def gather_moments(network: FeatureNetwork, batches: Iterable[Images]) -> FeatureMoments:
    """Moments of the features of all images in `batches`. Raises ValueError if there is none."""
    return gather(network, batches, [frechet_metric()])[MOMENTS]


def compute_statistics(
    network: FeatureNetwork,
    batches: Iterable[Images],
    *,
    num_samples: int,
    data: Mapping[str, Any],
    rounding: str = "uint8 as stored",
    metrics: Sequence[Metric] = (),
) -> FeatureStatistics:
    """Statistics of exactly `num_samples` images: each once, none dropped, none flipped.

    data: how to get the images again, as JSON: name, split, image shape, crop.
    metrics: those whose states to keep too; mean and covariance are there always.
    Raises ValueError when the batches hold another number of images.
    """
    metrics = [frechet_metric(), *(metric for metric in metrics if metric.needs_reference)]
    states = gather(network, batches, metrics)
    return statistics_of(states, network, num_samples=num_samples, data=data, rounding=rounding)


def statistics_of(
    states: Mapping[str, State],
    network: FeatureNetwork,
    *,
    num_samples: int,
    data: Mapping[str, Any],
    rounding: str = "uint8 as stored",
) -> FeatureStatistics:
    """`compute_statistics` of states that were gathered already, the moments among them."""
    moments = states[MOMENTS]
    if moments.count != num_samples:
        raise ValueError(
            f"num_samples must be the number of images, {num_samples}; the batches held "
            f"{moments.count}. Was a batch dropped or repeated?"
        )
    return FeatureStatistics(
        *finalize_moments(moments),
        features=network.name,
        network_hash=network.content_hash,
        num_samples=num_samples,
        data=dict(data),
        rounding=rounding,
        states={k: state_to_arrays(state, k) for k, state in states.items() if k != MOMENTS},
    )


def save_statistics(path: str | os.PathLike[str], statistics: FeatureStatistics) -> None:
    """Write a .npz that pytorch-fid and TTUR read too: `mu`, `sigma`, `metadata` (JSON), states."""
    metadata = {
        field.name: getattr(statistics, field.name)
        for field in dataclasses.fields(statistics)
        if field.name not in ("mean", "cov", "states")
    }
    metadata |= {
        "content_hash": statistics.content_hash,
        "state_hashes": statistics.state_hashes,
        "format": FORMAT,
    }
    arrays: dict[str, Any] = {}
    for state in statistics.states.values():
        arrays |= state
    file = io.BytesIO()
    np.savez(
        file, mu=statistics.mean, sigma=statistics.cov, metadata=json.dumps(metadata), **arrays
    )
    write_whole(path, file.getvalue())


_METADATA = {
    **dict.fromkeys(("content_hash", "network_hash", "rounding"), str | None),
    **dict.fromkeys(("data", "state_hashes"), dict),
    "features": str,
    "num_samples": int | None,
    "format": int,
}


def load_statistics(path: str | os.PathLike[str]) -> FeatureStatistics:
    """What `save_statistics` wrote, or the `mu` and `sigma` that pytorch-fid and TTUR publish.

    The latter are taken to be of Inception features, as are the reference batches of
    guided-diffusion and a file of such features under `pool_3`. Raises FileNotFoundError without a
    file, and ValueError on another kind of file, on what is no mean and covariance (see
    `covariance.check_covariance`), or when the arrays are not those its metadata name.
    """
    path = local_path(path, "stats", "file")
    arrays = read_arrays(path)
    mean, cov = arrays["mu"], arrays["sigma"]
    try:
        with naming(path):
            metadata = parsed(str(arrays.get("metadata", '{"features": "inception"}')))
            check_types(metadata, _METADATA, "Make it again.")
        _check_format(path, metadata.pop("format", 1))
        want = metadata.pop("content_hash", None)
        hashes = metadata.pop("state_hashes", {})
        statistics = FeatureStatistics(mean, cov, states=_states(arrays, hashes), **metadata)
        _check_metadata(statistics)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds metadata that this version cannot read: {error}. Make it again."
        ) from error
    if want not in (None, statistics.content_hash) or hashes != statistics.state_hashes:
        raise ValueError(f"{path} was altered: its arrays are not those that its metadata name.")
    for name, array in (pair for state in statistics.states.values() for pair in state.items()):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(
                f"{path} must hold finite numbers; {name} has NaN or infinity in it. Make it "
                "again, with a feature network whose weights are finite."
            )
    return statistics


def _check_format(path: pathlib.Path, number: int) -> None:
    if number > FORMAT:
        raise ValueError(
            f"{path} is of format {number}; this version of ddim_jax reads formats up to {FORMAT}. "
            "Install a newer one, or make the statistics anew with this one."
        )


def _check_metadata(statistics: FeatureStatistics) -> None:
    """Raise TypeError where the JSON is of another type than the field."""
    types = {
        "features": str,
        "network_hash": (str, type(None)),
        "num_samples": (int, type(None)),
        "data": dict,
        "rounding": (str, type(None)),
    }
    for name, type_ in types.items():
        if not isinstance(value := getattr(statistics, name), type_):
            raise TypeError(f"{name} is {value!r}")


def _states(arrays: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, dict]:
    """The arrays of each state of these names."""
    return {
        name: {key: x for key, x in arrays.items() if key.startswith(f"{name}.")} for name in names
    }
