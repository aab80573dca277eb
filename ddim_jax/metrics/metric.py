"""One protocol for every metric: a state that grows with the images, and numbers at the end.

    metric = METRICS["kid"](10_000)  # from metrics.table
    state = metric.init(dim)
    for features, indices in batches:  # of the network's output that metric.features names
        state = metric.update(state, features, indices)
    metric.compute(state, reference)  # {"kid": 0.0123, "kid_std": 0.0007}

A state is a NamedTuple of NumPy arrays, so it saves and goes on bit for bit, and the states of
different images merge. The reference is a state too, of the images compared with. A metric knows no
network: what its numbers are called beside one, `column_name` says.

A metric of your own is a function that returns a `Metric`, put into METRICS; nothing else. Those
that keep features share the state of metrics.kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from ddim_jax.checks import check_finite, check_vectors

State: TypeAlias = Any
"""A NamedTuple of NumPy arrays, one type for each metric."""


class Number(NamedTuple):
    """One number that a metric gives, and how to show it."""

    name: str  # its key in what `compute` returns
    title: str  # for headings, where it is of Inception features
    direction: Literal["lower", "higher"]  # which is better
    axis: Literal["log", "linear"]  # of a plot
    inception_name: str | None = None  # what it is called of Inception features, if not `name`
    std_of: str | None = None  # the number whose standard deviation this is; no score of its own


def _as_it_is(reference: State) -> State:
    return reference


class Metric(NamedTuple):
    """What a metric reads, how its state grows, and the numbers that come of it."""

    name: str
    """Its name in METRICS."""
    features: str
    """The output of a feature network that it reads: "pool" or "logits"."""
    state: str
    """What its state is called. Metrics that name the same state share one, gathered once."""
    numbers: tuple[Number, ...]
    """What `compute` returns, in order."""
    init: Callable[[int], State]
    """(dim) -> the state of no images, for features of `dim` entries."""
    update: Callable[[State, Any, Any], State]
    """(state, features (N, dim), indices (N,)) -> the state after these images too."""
    merge: Callable[[State, State], State]
    """(a, b) -> the state of both sets of images; no image may be in both."""
    compute: Callable[[State, State | None], dict[str, float]]
    """(state, reference) -> the numbers by name. Raises ValueError with too few images."""
    describe: Callable[[State, State | None], str] = lambda state, reference: ""
    """(state, reference) -> how many images, and the settings, in words for a protocol."""
    warning: Callable[[State, State | None], str | None] = lambda state, reference: None
    """(state, reference) -> a sentence that must be read with the numbers, or None."""
    needs_reference: bool = True
    """Whether there is a reference; else it is None."""
    prepare: Callable[[State], Any] = _as_it_is
    """(reference) -> what `compute` takes in its place, worked out once for many states."""


def check_features(name: str, features: Any, length: int | None = None) -> None:
    """Raise ValueError unless features, called `name`, are floats (N, D), N at least 1, finite."""
    check_vectors(name, features, length)
    if len(features) == 0:
        raise ValueError(f"{name} must hold one vector or more; got shape {features.shape}.")
    check_finite_features(name, features)


def check_finite_features(name: str, features: Any) -> None:
    """Raise ValueError if what features were made into holds NaN or infinity."""
    check_finite(
        name,
        features,
        "Check what they were made of: images of a sampler that diverged, or a feature network "
        "whose weights are NaN.",
    )


def column_name(number: Number, network: str) -> str:
    """What the number is called of the features of the network called `network`.

    Only Inception's have the published name: fid, kid. Others name the network: fd_pixels,
    kid_classifier.
    """
    if network == "inception":
        return number.inception_name or number.name
    return f"{number.name}_{network}"


def column_title(number: Number, network: str) -> str:
    """The same for headings: FID, but fd_pixels."""
    return number.title if network == "inception" else column_name(number, network)


# ---------------------------------------------------------------------------------------------
# States of several metrics at once, by the name of the state


def init_states(metrics: Iterable[Metric], dims: Mapping[str, int]) -> dict[str, State]:
    """The states of no images, for outputs of `dims` entries: {"pool": 2048, "logits": 1008}.

    Raises ValueError for a metric that reads another output.
    """
    states = {}
    for metric in _one_for_each_state(metrics):
        if metric.features not in dims:
            raise ValueError(
                f"{metric.name} reads {metric.features}; the feature network gives "
                f"{', '.join(dims)} only. Take another network, or leave the metric out."
            )
        states[metric.state] = metric.init(dims[metric.features])
    return states


def update_states(
    states: Mapping[str, State], metrics: Iterable[Metric], features: Mapping[str, Any], indices
) -> dict[str, State]:
    """The states after also seeing the images of these indices; `features` by output, on the host.

    Each state is updated once, however many metrics share it.
    """
    return {
        metric.state: metric.update(states[metric.state], features[metric.features], indices)
        for metric in _one_for_each_state(metrics)
    }


def merge_states(
    metrics: Iterable[Metric], a: Mapping[str, State], b: Mapping[str, State]
) -> dict[str, State]:
    """The states of both sets of images, such as two hosts have; no image may be in both."""
    return {
        metric.state: metric.merge(a[metric.state], b[metric.state])
        for metric in _one_for_each_state(metrics)
    }


def _one_for_each_state(metrics: Iterable[Metric]) -> list[Metric]:
    found: dict[str, Metric] = {}
    for metric in metrics:
        other = found.setdefault(metric.state, metric)
        if other.features != metric.features:
            raise ValueError(
                f"metrics that share a state must read the same output; {other.name} and "
                f"{metric.name} share {metric.state} and read {other.features} and "
                f"{metric.features}. Give one of the states another name."
            )
    return list(found.values())


def state_to_arrays(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The state's arrays by name, "prefix.field", as an .npz takes them."""
    return {f"{prefix}.{field}": np.asarray(x) for field, x in state._asdict().items()}


def state_from_arrays(metric: Metric, arrays: Mapping[str, np.ndarray], prefix: str) -> State:
    """What `state_to_arrays` took apart, bit for bit. Raises ValueError when a field is missing."""
    kind = type(metric.init(1))
    if missing := [f"{prefix}.{f}" for f in kind._fields if f"{prefix}.{f}" not in arrays]:
        raise ValueError(
            f"{', '.join(missing)} must be among the saved arrays, or they are not a state of "
            f"{metric.name}; got {', '.join(sorted(arrays))}."
        )
    return kind(*(arrays[f"{prefix}.{field}"] for field in kind._fields))
