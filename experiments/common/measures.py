"""What measures images: a feature network, what its features are compared with, metrics by name."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from common.progress import Progress
from ddim_jax.checks import NUM_SEEDS
from ddim_jax.data.source import ImageSource
from ddim_jax.data.stream import sequential_batches
from ddim_jax.metrics.features import FeatureName, FeatureNetwork, network_of
from ddim_jax.metrics.kept import NUM_KEPT, fair_indices
from ddim_jax.metrics.metric import (
    Metric,
    Number,
    State,
    column_name,
    column_title,
    init_states,
    update_states,
)
from ddim_jax.metrics.origin import Origin, origin_of, origin_warnings
from ddim_jax.metrics.statistics import FeatureStatistics, load_statistics
from ddim_jax.metrics.table import METRICS, named_metrics
from ddim_jax.parallel import everywhere, map_batches, over_devices
from ddim_jax.paths import File
from ddim_jax.runs.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """Which numbers, and the network behind them."""

    metrics: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"What is measured, one or more of {', '.join(METRICS)}."),
    ] = ("frechet",)
    kept_features: int = option(NUM_KEPT, at_least=2)
    """Images whose features are kept for the metrics that need single ones."""
    feature_weights: File | None = None
    """Weights of the feature network; if not given classifier.safetensors beside the statistics, or
    Inception's published ones."""

    def named_metrics(self) -> tuple[Metric, ...]:
        """The metrics. Raises ValueError for an unknown name, and for none or one twice."""
        check_different("metrics", self.metrics)
        return named_metrics(self.metrics, self.kept_features)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless these are one or more different seeds."""
    check_different("seeds", seeds)
    if wrong := [seed for seed in seeds if not 0 <= seed < NUM_SEEDS]:
        raise ValueError(f"seeds must be in [0, {NUM_SEEDS - 1}]; got {wrong[0]}.")


def check_different(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError unless the option has values, each once."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more different values; got {values}.")


Features = dict[str, Any]
"""Output of a feature network -> one vector for each image."""

Program = Callable[[Any, Any], Features]
"""(params, images) -> the features that the metrics read, on all devices."""


class Measure(NamedTuple):
    """One file of statistics, the network that made it, and the metrics between samples and it."""

    network: FeatureNetwork
    """With its weights on every device."""
    statistics: FeatureStatistics
    metrics: tuple[Metric, ...]
    dims: dict[str, int]
    """Length of each output's vectors."""
    program: Program
    """For network.params."""
    samples: Origin = Origin(lossy=0.0)
    """How what is measured came to be; drawn images were never compressed."""

    @property
    def name(self) -> str:
        """The network's."""
        return self.network.name

    def columns(self) -> dict[str, tuple[Metric, Number]]:
        """The names of the numbers, such as fid or kid_pixels, in order."""
        return {column_name(n, self.name): (m, n) for m in self.metrics for n in m.numbers}

    def init(self) -> dict[str, State]:
        """The states of no images."""
        return init_states(self.metrics, self.dims)

    def update(self, states: dict[str, State], features: Features, indices) -> dict[str, State]:
        """The states after the images of these indices too."""
        return update_states(states, self.metrics, features, indices)

    def prepare(self) -> None:
        """Work out what is the same for all states, which else their first `values` does."""
        for metric in self.metrics:
            self.statistics.prepared(metric)

    def values(self, states: dict[str, State]) -> dict[str, float]:
        """The numbers by column."""
        numbers: dict[str, float] = {}
        for metric in self.metrics:
            numbers |= self.statistics.compute(metric, states)
        return {column: float(number) for column, number in numbers.items()}

    def facts(self) -> dict[str, dict[str, Any]]:
        """What decides the number of each column beside the images, as JSON holds it."""
        return {column: self._facts(metric) for column, (metric, _) in self.columns().items()}

    def _facts(self, metric: Metric) -> dict[str, Any]:
        digest, of = self.statistics.reference_hash(metric), self.statistics
        return {
            "metric": metric.name,
            "features": self.name,
            "dim": self.dims[metric.features],
            "network_hash": self.network.content_hash[:16],
            "statistics_hash": digest and digest[:16],
            "statistics_of": digest and dict(of.data),
            "statistics_num_samples": digest and of.num_samples,
        }

    def shown(self, states: dict[str, State]) -> dict[str, dict[str, Any]]:
        """How to show each column, and what must be read with it."""
        return {
            column: {
                **number_shown(metric, number, self.name),
                "description": self.describe(metric, states),
                "warning": self.warning(metric, states),
            }
            for column, (metric, number) in self.columns().items()
        }

    def describe(self, metric: Metric, states: dict[str, State]) -> str:
        """How many images are behind the metric's numbers, and its settings."""
        return metric.describe(states[metric.state], self.statistics.reference(metric))

    def warning(self, metric: Metric, states: dict[str, State]) -> str | None:
        """What must be read with the metric's numbers, or None."""
        warnings = [metric.warning(states[metric.state], self.statistics.reference(metric))]
        if metric.needs_reference:
            of = self.statistics
            warnings += origin_warnings(self.samples, origin_of(of.data, of.num_samples))
        return " ".join(filter(None, warnings)) or None


def number_shown(metric: Metric, number: Number, network: str) -> dict[str, Any]:
    """How a report shows a number of the metric, of the network's features."""
    columns = {other.name: column_name(other, network) for other in metric.numbers}
    return {
        "title": column_title(number, network),
        "published_as": column_name(number, "inception"),
        "direction": number.direction,
        "axis": number.axis,
        "std_of": number.std_of and columns[number.std_of],
    }


def open_network(
    name: FeatureName, weights: str | None, stats_path: str | pathlib.Path
) -> FeatureNetwork:
    """The feature network; a classifier given no weights is the one beside the statistics."""
    network = network_of(name, weights, stats_path)
    return dataclasses.replace(network, params=everywhere(network.params))


def open_measures(
    stats_paths: Sequence[str],
    options: MetricOptions,
    image_shape: tuple[int, int, int],
    samples: Origin,
) -> list[Measure]:
    """One measure for each file of statistics; `feature_weights` are of the first that has any.

    `samples` is how what is measured came to be.

    Raises ValueError for a missing file, for two statistics of one kind of feature, for statistics
    that another network made, and for a metric that the network or the file has nothing for.
    """
    measures: list[Measure] = []
    weights = options.feature_weights
    for path in stats_paths:
        statistics = _load(path)
        if any(statistics.features == other.name for other in measures):
            raise ValueError(
                f"stats must be of different features, or their numbers would have one name; "
                f"got {statistics.features} twice."
            )
        given = None
        if statistics.features != "pixels":
            given, weights = weights, None
        network = open_network(statistics.features, given, path)
        statistics.check_network(network, image_shape)
        metrics, dims = options.named_metrics(), network.dims(image_shape)
        _check_references(path, statistics, metrics, options)
        init_states(metrics, dims)  # refuses a metric of what the network does not give
        program = feature_program(network, metrics)
        measures.append(Measure(network, statistics, metrics, dims, program, samples))
    return measures


def _load(path: str) -> FeatureStatistics:
    try:
        return load_statistics(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def _check_references(
    path: str, statistics: FeatureStatistics, metrics: Sequence[Metric], options: MetricOptions
) -> None:
    try:
        for metric in metrics:
            statistics.reference(metric)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} As before, by experiments/make_statistics.py --metrics "
            f"{' '.join(options.metrics)}"
        ) from error


def feature_program(network: FeatureNetwork, metrics: Sequence[Metric]) -> Program:
    """What runs the network on all devices for `map_batches`; only what the metrics read."""
    names = sorted({metric.features for metric in metrics})

    def apply(params: Any, images: Any) -> Features:
        features = network.apply_fn(params, images)
        return {name: features[name] for name in names}

    return over_devices(apply)


def gather(
    network: FeatureNetwork,
    metrics: Sequence[Metric],
    source: ImageSource,
    batch_size: int,
    num_kept: int,
) -> dict[str, State]:
    """The states of the metrics over all images of a source, which may be sorted by class."""
    states, start = init_states(metrics, network.dims(source.image_shape)), 0
    indices = fair_indices(len(source), num_kept)
    images = (batch["image"] for batch in sequential_batches(source, batch_size))
    with Progress("features", len(source), "images") as progress:
        for features in map_batches(feature_program(network, metrics), network.params, images):
            stop = start + len(next(iter(features.values())))
            states = update_states(states, metrics, features, indices[start:stop])
            progress.add(stop - start)
            start = stop
    return states
