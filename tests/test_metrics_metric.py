"""Every entry of METRICS, and one of the test's own, keeps the protocol."""

import inspect
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from ddim_jax.metrics.frechet import (
    FeatureMoments,
    Gaussian,
    finalize_moments,
    frechet_distance_from_features,
)
from ddim_jax.metrics.inception_score import inception_score
from ddim_jax.metrics.kept import KeptFeatures, fair_indices
from ddim_jax.metrics.kid import kid
from ddim_jax.metrics.metric import (
    Metric,
    Number,
    state_from_arrays,
    state_to_arrays,
)
from ddim_jax.metrics.precision_recall import density_coverage, precision_recall
from ddim_jax.metrics.table import METRICS

DIM, COUNT = 5, 40
NUM_KEPT = 25  # fewer than there are


class Total(NamedTuple):
    """A sum of vectors and their number."""

    count: np.ndarray
    total: np.ndarray


def brightness(num_kept):
    """Squared distance of the mean features: a metric as a user would write it."""
    del num_kept

    def update(state, features, indices):
        del indices
        count = np.array(state.count + len(features))
        return Total(count, state.total + np.float64(features).sum(axis=0))

    def compute(state, reference):
        means = (x.total / x.count for x in (state, reference))
        return {"gap": float(np.sum(np.subtract(*means) ** 2))}

    return Metric(
        name="brightness",
        features="pool",
        state="total",
        numbers=(Number("gap", "Gap", "lower", "linear"),),
        init=lambda dim: Total(np.array(0), np.zeros(dim)),
        update=update,
        merge=lambda a, b: Total(np.array(a.count + b.count), a.total + b.total),
        compute=compute,
    )


TABLE = {**METRICS, "brightness": brightness}
every_metric = pytest.mark.parametrize("name", TABLE)


def features(seed=0, count=COUNT):
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32) + 0.3 * seed


def whole(metric, x, indices=None):
    return metric.update(metric.init(DIM), x, np.arange(len(x)) if indices is None else indices)


def reference_of(metric, x):
    return whole(metric, x) if metric.needs_reference else None


def assert_same(got, want, exact=True):
    assert type(got) is type(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def is_exact(metric):
    """Whether the state is the same to the last bit however it came about."""
    return isinstance(metric.init(DIM), KeptFeatures)


# ------------------------------------------------------------------------------- one for all


@every_metric
def test_a_metric_is_its_record(name):
    metric = TABLE[name](NUM_KEPT)
    assert metric.name == name and metric.features in ("pool", "logits")
    assert next(iter(inspect.signature(metric.init).parameters)) == "dim"
    for function, arguments in (
        (metric.update, ["state", "features", "indices"]),
        (metric.merge, ["a", "b"]),
        (metric.compute, ["state", "reference"]),
        (metric.warning, ["state", "reference"]),
        (metric.describe, ["state", "reference"]),
    ):
        assert list(inspect.signature(function).parameters) == arguments
    state, reference = whole(metric, features()), reference_of(metric, features(1))
    assert all(isinstance(x, np.ndarray) for x in state)
    numbers = metric.compute(state, reference)
    assert list(numbers) == [number.name for number in metric.numbers]
    assert all(type(x) is float and np.isfinite(x) for x in numbers.values())
    assert isinstance(metric.describe(state, reference), str)
    assert isinstance(metric.warning(state, reference), str | None)
    for number in metric.numbers:
        assert number.direction in ("lower", "higher") and number.axis in ("log", "linear")
        assert number.std_of is None or number.std_of in numbers


@every_metric
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, COUNT), max_size=6).map(sorted), hosts=st.integers(1, 3))
def test_any_batches_on_any_hosts_are_the_whole(name, cuts, hosts):
    metric = TABLE[name](NUM_KEPT)
    x, indices = features(), np.arange(COUNT)
    want = whole(metric, x)
    states = [metric.init(DIM) for _ in range(hosts)]
    batches = zip(np.split(x, cuts), np.split(indices, cuts), strict=True)
    for number, (batch, places) in enumerate(batches):
        host = number % hosts
        states[host] = metric.update(states[host], batch, places)
    merged = states[0]
    for state in states[1:]:
        merged = metric.merge(merged, state)
    assert_same(merged, want, is_exact(metric))
    if not is_exact(metric):  # the same bits give the same numbers
        reference = reference_of(metric, features(1))
        got, wanted = (metric.compute(state, reference) for state in (merged, want))
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@every_metric
def test_a_saved_state_goes_on_bit_for_bit(name, tmp_path):
    metric = TABLE[name](NUM_KEPT)
    batches = list(zip(np.split(features(), 4), np.split(np.arange(COUNT), 4), strict=True))
    straight = metric.init(DIM)
    for batch in batches:
        straight = metric.update(straight, *batch)
    state = metric.init(DIM)
    for batch in batches:
        np.savez(tmp_path / "state.npz", **state_to_arrays(state, "fd_pixels"))
        with np.load(tmp_path / "state.npz") as file:
            state = state_from_arrays(metric, file, "fd_pixels")
        state = metric.update(state, *batch)
    assert_same(state, straight)


@every_metric
def test_update_and_merge_leave_their_arguments_alone(name):
    metric = TABLE[name](NUM_KEPT)
    a, b = whole(metric, features()), whole(metric, features(1), np.arange(COUNT) + COUNT)
    before = [np.copy(x) for state in (a, b) for x in state]
    metric.merge(a, b)
    metric.update(a, features(2), np.arange(COUNT) + COUNT)
    for x, y in zip([*a, *b], before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", METRICS)
def test_bad_arguments_are_named(name):
    metric = METRICS[name](NUM_KEPT)
    with refused("dim must be at least 1"):
        metric.init(0)
    with refused(rf"features must have shape \(N, {DIM}\); got \(3, 4\)"):
        metric.update(metric.init(DIM), np.zeros((3, 4)), np.arange(3))
    with refused("features must be finite"):
        metric.update(metric.init(DIM), np.full((3, DIM), np.nan), np.arange(3))
    with refused(r"^is\.(count|indices), .* must be among the saved arrays"):
        state_from_arrays(metric, {}, "is")
    if metric.needs_reference:
        with refused(f"{name} needs a reference"):
            metric.compute(whole(metric, features()), None)


# ---------------------------------------------------------------- the numbers are the functions'

FUNCTIONS = {
    "frechet": lambda x, y: (frechet_distance_from_features(x, y),),
    "kid": lambda x, y: kid(x, y, subset_size=COUNT),
    "inception_score": lambda x, y: inception_score(x),
    "precision_recall": lambda x, y: precision_recall(y, x, k=3),
    "density_coverage": lambda x, y: density_coverage(y, x, k=5),
}


@pytest.mark.parametrize("name", METRICS)
def test_the_numbers_are_those_of_the_pure_function(name):
    metric, x, y = METRICS[name](1000), features(), features(1)
    got = metric.compute(whole(metric, x), reference_of(metric, y))
    assert tuple(got.values()) == tuple(FUNCTIONS[name](x, y))


def test_frechet_of_two_gaussians():
    # Rows +-a_i e_i have mean 0 and unbiased covariance diag(2 a_i^2 / (2 D - 1)).
    metric, a = METRICS["frechet"](1), np.array([1.0, 2.0, 0.5])
    x = np.concatenate([np.diag(a), -np.diag(a)])
    state = metric.update(metric.init(3), x, np.arange(6))
    mean, std = np.array([1.0, -2.0, 0.0]), np.array([0.3, 1.0, 2.0])
    want = np.sum(mean**2) + np.sum((a * np.sqrt(2 / 5) - std) ** 2)
    reference = Gaussian(mean, np.diag(std**2))
    assert metric.compute(state, reference)["fd"] == pytest.approx(want, rel=1e-12)
    moments = FeatureMoments(np.array(8), mean, 7 * np.diag(std**2))
    assert metric.compute(state, moments)["fd"] == pytest.approx(want, rel=1e-12)
    assert finalize_moments(reference) is reference


def test_kid_of_small_sets_is_the_double_sum_over_all_images():
    metric, x, y = METRICS["kid"](1000), features(), features(1)

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / DIM + 1) ** 3

    def mean_of_pairs(a):
        return np.mean([k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j])

    a, b = np.float64(x), np.float64(y)
    want = mean_of_pairs(a) + mean_of_pairs(b) - 2 * np.mean([k(p, q) for p in a for q in b])
    state, reference = whole(metric, x), whole(metric, y)
    got = metric.compute(state, reference)
    assert got["kid"] == pytest.approx(want, rel=1e-10) and got["kid_std"] < 1e-12
    assert metric.describe(state, reference) == "40 images against 40, 100 subsets of 40"
    assert "N = 40 images on the smaller side" in metric.warning(state, reference)
    with pytest.raises(ValueError, match="kid needs at least 2 images on each side"):
        metric.compute(whole(metric, x[:1]), reference)


def test_inception_score_of_sure_and_even_answers_is_the_number_of_classes():
    metric = METRICS["inception_score"](1000)
    state = whole(metric, 1e4 * np.tile(np.eye(DIM, dtype=np.float32), (20, 1)))
    got = metric.compute(state, None)
    assert got["inception_score"] == pytest.approx(DIM, rel=1e-5)
    assert got["inception_score_std"] < 1e-4
    assert metric.describe(state, None) == "100 images in 10 splits"
    assert "fewer than the 50000 of published scores" in metric.warning(state, None)
    few = whole(metric, features(count=4))
    assert metric.describe(few, None) == "4 images in 4 splits"
    assert metric.compute(few, None) == pytest.approx(
        {"inception_score": 1, "inception_score_std": 0}, abs=1e-6
    )


def test_half_of_the_modes_is_half_of_recall_and_coverage():
    # Two far clusters; the samples are the points of one. Each of its balls holds k + 1 of them.
    cluster = np.array([0, 1, 3, 7, 12, 20, 30, 47], np.float32)
    real = np.concatenate([cluster, cluster + 1024])[:, None]
    numbers = {}
    for name in ("precision_recall", "density_coverage"):
        metric = METRICS[name](1000)
        state, reference = (
            metric.update(metric.init(1), x, np.arange(len(x))) for x in (cluster[:, None], real)
        )
        numbers |= metric.compute(state, reference)
        assert "N = 8 images against 16" in metric.warning(state, reference)
        assert metric.warning(state, state) is None
    assert numbers == {"precision": 1, "recall": 0.5, "density": 6 / 5, "coverage": 0.5}


def test_of_a_sorted_set_a_fair_draw_is_kept():
    """Of 1000 images in ten classes, one class after the other, a tenth keeps some of each."""
    indices = fair_indices(1000, 100)
    np.testing.assert_array_equal(np.sort(indices), np.arange(1000))
    kept = np.flatnonzero(indices < 100)
    assert len(kept) == 100 and len(np.unique(kept // 100)) == 10
    np.testing.assert_array_equal(fair_indices(100, 100), np.arange(100))
