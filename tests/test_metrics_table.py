"""Which images are kept, what numbers are called, and several metrics fed at once."""

import numpy as np
import pytest
from refusals import refused
from test_metrics_metric import COUNT, DIM, NUM_KEPT, brightness, features, whole

from ddim_jax.metrics.features import FEATURE_NETWORKS, feature_network
from ddim_jax.metrics.frechet import few_samples_warning
from ddim_jax.metrics.metric import (
    column_name,
    column_title,
    init_states,
    merge_states,
    update_states,
)
from ddim_jax.metrics.statistics import (
    compute_statistics,
    gather,
    load_statistics,
    save_statistics,
)
from ddim_jax.metrics.table import METRICS, named_metrics


def test_the_first_by_index_are_kept_in_whatever_order_they_come():
    metric, x = METRICS["kid"](10), features()
    order = np.random.default_rng(0).permutation(COUNT)
    state = metric.init(DIM)
    for places in np.split(order, 8):
        state = metric.update(state, x[places], places)
    np.testing.assert_array_equal(state.indices, np.arange(10))
    np.testing.assert_array_equal(state.features, x[:10])
    assert metric.describe(state, state).startswith("the first 10 images against 10")


def test_a_reference_that_keeps_more_counts_up_to_num_kept():
    x, y = features(), features(1)
    for name in ("kid", "precision_recall", "density_coverage"):
        few, many = METRICS[name](20), METRICS[name](COUNT)
        state = whole(few, x)
        got = few.compute(state, whole(many, y))
        assert got == few.compute(state, whole(few, y))
        assert few.describe(state, whole(many, y)).startswith("the first 20 images against 20")


def test_an_image_seen_twice_is_refused():
    metric = METRICS["precision_recall"](NUM_KEPT)
    state = whole(metric, features(count=10))
    with pytest.raises(ValueError, match="indices must name each image once; got 9 twice"):
        metric.update(state, features(count=3), np.arange(9, 12))
    with pytest.raises(ValueError, match="got 0 twice"):
        metric.merge(state, state)
    with pytest.raises(ValueError, match="num_kept must be the same on both sides"):
        metric.merge(state, METRICS["precision_recall"](9).init(DIM))
    with refused(r"indices must have shape \(3,\)"):
        metric.update(state, features(count=3), np.arange(2))
    with pytest.raises(ValueError, match="num_kept must be at least 1"):
        METRICS["kid"](0)


def test_only_inceptions_numbers_have_the_published_names():
    names = {
        network: [column_name(n, network) for m in named_metrics(METRICS) for n in m.numbers]
        for network in FEATURE_NETWORKS
    }
    published = [
        *("fid", "kid", "kid_std", "inception_score", "inception_score_std"),
        *("precision", "recall", "density", "coverage"),
    ]
    assert names["inception"] == published
    assert names["pixels"][:2] == ["fd_pixels", "kid_pixels"]
    assert not set(published) & {*names["pixels"], *names["classifier"]}
    (number,) = METRICS["frechet"](1).numbers
    assert column_title(number, "inception") == "FID"
    assert column_title(number, "pixels") == "fd_pixels"


def test_metrics_are_asked_for_by_name():
    assert [m.name for m in named_metrics(["kid", "frechet", "kid"])] == ["kid", "frechet"]
    assert int(named_metrics(["kid"], 7)[0].init(3).num_kept) == 7
    with pytest.raises(ValueError, match=r"metric must be one of frechet, kid, .*; got 'fid'"):
        named_metrics(["fid"])


def test_metrics_share_what_they_keep():
    metrics, x = named_metrics(METRICS, NUM_KEPT), features()
    states = init_states(metrics, {"pool": DIM, "logits": DIM})
    assert list(states) == ["moments", "kept_pool", "kept_logits"]
    both = [
        update_states(states, metrics, {"pool": x[part], "logits": 2 * x[part]}, part)
        for part in np.split(np.arange(COUNT), 2)
    ]
    merged = merge_states(metrics, *both)
    np.testing.assert_array_equal(merged["kept_logits"].features, 2 * x[:NUM_KEPT])
    assert merged["moments"].count == COUNT
    assert metrics[0].warning(merged["moments"], None) == few_samples_warning(COUNT, DIM)
    with pytest.raises(ValueError, match="inception_score reads logits; the feature network"):
        init_states(metrics, {"pool": DIM})
    other = brightness(1)._replace(features="logits")
    with pytest.raises(ValueError, match="brightness and brightness share total and read pool"):
        init_states([brightness(1), other], {"pool": DIM, "logits": DIM})


def test_a_metric_of_ones_own_is_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(METRICS, "brightness", brightness)
    rng = np.random.default_rng(0)
    real, drawn = rng.integers(0, 256, (2, 30, 2, 2, 1), dtype=np.uint8)
    pixels, metrics = feature_network("pixels"), named_metrics(["frechet", "brightness"])
    statistics = compute_statistics(
        pixels, [real[:20], real[20:]], num_samples=30, data={}, metrics=metrics
    )
    save_statistics(tmp_path / "stats.npz", statistics)
    states = gather(pixels, [drawn[:7], drawn[7:]], metrics)
    got = load_statistics(tmp_path / "stats.npz").compute(metrics[1], states)
    gap = (np.float64(real).mean(axis=0) - np.float64(drawn).mean(axis=0)) / 127.5
    assert got == {"gap_pixels": pytest.approx(np.sum(gap**2), rel=1e-5)}
