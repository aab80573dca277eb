"""A feature network with the statistics it is measured against, opened from files."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from ddim_jax.metrics.frechet import FeatureMoments, few_samples_warning
from ddim_jax.metrics.statistics import (
    DISTANCE_NAMES,
    FeatureName,
    FeatureNetwork,
    FeatureStatistics,
    feature_network,
    load_statistics,
)
from ddim_jax.parallel import everywhere, over_devices

CLASSIFIER_FILE = "classifier.safetensors"
"""What train_classifier.py writes, and where statistics of classifier features look for it."""


class Measure(NamedTuple):
    """One Frechet distance: the network that makes features, and what they are compared with."""

    network: FeatureNetwork
    statistics: FeatureStatistics

    @property
    def name(self) -> str:
        """fid, fd_classifier or fd_pixels."""
        return DISTANCE_NAMES[self.network.name]

    def distance(self, moments: FeatureMoments) -> float:
        """The distance of the features gathered in `moments`."""
        return self.statistics.distance(moments)

    def warning(self, num_samples: int) -> str | None:
        """A sentence for tables when there are too few samples, else None."""
        return few_samples_warning(num_samples, len(self.statistics.mean))


def open_network(
    name: FeatureName, weights: str | None, stats_path: str | pathlib.Path
) -> FeatureNetwork:
    """The feature network; a classifier given no weights is the one beside the statistics."""
    if name == "classifier" and weights is None:
        weights = str(pathlib.Path(stats_path).parent / CLASSIFIER_FILE)
    try:
        return feature_network(name, weights)
    except FileNotFoundError as error:  # a wrong path is a wrong setting
        raise ValueError(str(error)) from error


def open_measures(
    stats_paths: Sequence[str], weights: str | None, image_shape: tuple[int, int, int]
) -> list[Measure]:
    """One measure for each file of statistics; `weights` are those of the first that has any.

    Raises ValueError for a missing file, for two statistics of one kind of feature, and for
    statistics that another network made.
    """
    measures: list[Measure] = []
    for path in stats_paths:
        try:
            statistics = load_statistics(path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        if any(statistics.features == other.network.name for other in measures):
            raise ValueError(
                f"stats must be of different features, or their distances would have one name; "
                f"got {statistics.features} twice."
            )
        given = None
        if statistics.features != "pixels":
            given, weights = weights, None
        network = open_network(statistics.features, given, path)
        statistics.check_network(network, image_shape)
        measures.append(Measure(network, statistics))
    return measures


def on_all_devices(network: FeatureNetwork) -> FeatureNetwork:
    """The network with its batches split over the devices; one that does not divide is filled."""
    program, devices = over_devices(network.apply_fn), jax.local_device_count()

    def apply_fn(params, images):
        missing = -len(images) % devices
        if not missing:
            return program(params, images)
        filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        return program(params, filled)[: len(images)]

    return dataclasses.replace(network, apply_fn=apply_fn, params=everywhere(network.params))


def whole_batch_size(batch_size: int, num_images: int) -> int:
    """The batch size, at most num_images, as a multiple of the devices."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    devices = jax.local_device_count()
    return max(1, min(batch_size, num_images) // devices) * devices
