import dataclasses
import json

import jax
import numpy as np
import pytest

from ddim_jax.metrics.classifier import Classifier, init_classifier, save_classifier
from ddim_jax.metrics.features import FeatureNetwork, feature_network
from ddim_jax.metrics.frechet import frechet_distance_from_features
from ddim_jax.metrics.kid import kid
from ddim_jax.metrics.precision_recall import precision_recall
from ddim_jax.metrics.statistics import (
    FeatureStatistics,
    compute_statistics,
    gather,
    gather_moments,
    load_statistics,
    save_statistics,
)
from ddim_jax.metrics.table import named_metrics

SHAPE = (4, 4, 1)
DATA = {"name": "random", "split": "train", "image_shape": [4, 4, 1], "crop": None}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (103, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def pixels():
    return feature_network("pixels")


@pytest.fixture(scope="module")
def statistics(pixels, images):
    return compute_statistics(pixels, batched(images), num_samples=103, data=DATA)


def batched(images, size=20):
    return [images[i : i + size] for i in range(0, len(images), size)]


def test_the_halves_of_the_digits_are_as_far_apart_as_known(pixels):
    # 0.28 between interleaved halves: the floor that issue-time prototypes measured, in [-1, 1].
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    images = np.round(digits[..., None] * 255 / 16).astype(np.uint8)
    a, b = (np.asarray(pixels(images[half::2])) for half in range(2))
    np.testing.assert_allclose(frechet_distance_from_features(a, b), 0.28, atol=0.005)


def test_statistics_are_numpys_over_every_image_once(statistics, images):
    x = images.reshape(103, 16) / 127.5 - 1
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(statistics.cov, np.cov(x, rowvar=False), atol=1e-6)
    assert statistics.num_samples == 103


@pytest.mark.parametrize("num_samples", [102, 104, 120])
def test_another_number_of_images_is_refused(pixels, images, num_samples):
    with pytest.raises(ValueError, match=f"number of images, {num_samples}.*held 103"):
        compute_statistics(pixels, batched(images), num_samples=num_samples, data=DATA)


def test_no_images_are_refused(pixels):
    with pytest.raises(ValueError, match="at least one image"):
        gather_moments(pixels, [])


def test_distance_to_the_same_images_is_zero_and_to_others_is_not(statistics, pixels, images):
    assert statistics.distance(gather_moments(pixels, batched(images, 50))) < 1e-9
    dark = images // 2
    want = frechet_distance_from_features(
        dark.reshape(103, 16) / 127.5 - 1, images.reshape(103, 16) / 127.5 - 1
    )
    got = statistics.distance(gather_moments(pixels, batched(dark)))
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_saved_and_loaded_the_same(statistics, tmp_path):
    save_statistics(tmp_path / "stats.npz", statistics)
    loaded = load_statistics(tmp_path / "stats.npz")
    np.testing.assert_array_equal(loaded.mean, statistics.mean)
    np.testing.assert_array_equal(loaded.cov, statistics.cov)
    for name in ("features", "network_hash", "num_samples", "data", "rounding", "content_hash"):
        assert getattr(loaded, name) == getattr(statistics, name), name
    with np.load(tmp_path / "stats.npz") as file:  # what other tools look for
        assert set(file) == {"mu", "sigma", "metadata"}
        assert json.loads(str(file["metadata"]))["data"]["name"] == "random"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_files_hold_only_mu_and_sigma(tmp_path, dtype):
    np.savez(tmp_path / "fid.npz", mu=np.arange(3, dtype=dtype), sigma=np.eye(3, dtype=dtype))
    loaded = load_statistics(tmp_path / "fid.npz")
    assert loaded.mean.dtype == loaded.cov.dtype == np.float64
    assert loaded.features == "inception" and loaded.network_hash is loaded.num_samples is None


def test_cut_short_and_foreign_metadata_are_refused_by_name(statistics, tmp_path):
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.npz cannot be read as feature statistics"):
        load_statistics(tmp_path / "empty.npz")
    arrays = {"mu": statistics.mean, "sigma": statistics.cov}
    np.savez(tmp_path / "new.npz", **arrays, metadata='{"features": "pixels", "colour": 3}')
    with pytest.raises(ValueError, match=r"new\.npz holds metadata that this version cannot read"):
        load_statistics(tmp_path / "new.npz")


def test_bad_files_are_refused_by_name(statistics, tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(FileNotFoundError, match=r"stats\.npz is not a file; give the path"):
        load_statistics(path)
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match="must hold mu and sigma; mu and sigma missing"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(D, D\); got \(3,\) and \(2, 2\)"):
        load_statistics(path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"stats\.npz cannot be read as feature statistics"):
        load_statistics(path)
    save_statistics(path, statistics)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"mu": arrays["mu"] + 1e-9}))
    with pytest.raises(ValueError, match="was altered"):
        load_statistics(path)


@pytest.fixture(scope="module")
def with_states(pixels, images):
    metrics = named_metrics(["kid", "precision_recall"], num_kept=50)
    return compute_statistics(pixels, batched(images), num_samples=103, data=DATA, metrics=metrics)


def test_other_metrics_states_are_saved_and_compared_with(with_states, pixels, images, tmp_path):
    path = tmp_path / "stats.npz"
    save_statistics(path, with_states)
    loaded = load_statistics(path)
    assert loaded.state_hashes == with_states.state_hashes
    with np.load(path) as file:
        fields = {f"kept_pool.{field}" for field in ("indices", "features", "num_kept")}
        assert set(file) == {"mu", "sigma", "metadata", *fields}
        assert json.loads(str(file["metadata"]))["format"] == 2
    metrics = named_metrics(["frechet", "kid", "precision_recall"], num_kept=50)
    real, drawn = np.asarray(pixels(images)), np.asarray(pixels(images // 2))
    states = gather(pixels, batched(images // 2, 30), metrics)
    np.testing.assert_array_equal(loaded.reference(metrics[1]).features, real[:50])
    got = {}
    for metric in metrics:
        got |= loaded.compute(metric, states)
    assert got["fd_pixels"] == with_states.distance(states["moments"])
    assert got["kid_pixels"] == kid(drawn[:50], real[:50], subset_size=50).mean
    assert got["precision_pixels"] == precision_recall(real[:50], drawn[:50]).precision
    hashes = [loaded.reference_hash(metric) for metric in metrics]
    assert hashes == [loaded.content_hash, *2 * [loaded.state_hashes["kept_pool"]]]


def test_states_leave_the_hash_of_mean_and_covariance_alone(with_states, statistics):
    assert with_states.content_hash == statistics.content_hash


def test_a_state_that_is_not_there_is_refused_with_the_way_out(statistics):
    (metric,) = named_metrics(["kid"])
    for ask in (statistics.reference, statistics.reference_hash):
        with pytest.raises(ValueError, match=r"lack; they hold moments\. Make them anew with kid"):
            ask(metric)
    (score,) = named_metrics(["inception_score"])
    assert statistics.reference(score) is None and statistics.reference_hash(score) is None


def test_a_metric_of_what_the_network_does_not_give_is_refused(pixels, images):
    with pytest.raises(ValueError, match=r"inception_score reads logits; .* gives pool only"):
        gather(pixels, batched(images), named_metrics(["inception_score"]))


def test_altered_states_and_newer_formats_are_refused(with_states, tmp_path):
    path = tmp_path / "stats.npz"
    save_statistics(path, with_states)
    with np.load(path) as file:
        arrays = dict(file)
    changes = (
        {"kept_pool.features": arrays["kept_pool.features"] + 1e-3},
        {"kept_pool.more": np.zeros(1)},
    )
    for change in changes:
        np.savez(path, **(arrays | change))
        with pytest.raises(ValueError, match="was altered"):
            load_statistics(path)
    metadata = json.loads(str(arrays["metadata"])) | {"format": 3, "colour": "blue"}
    np.savez(path, **(arrays | {"metadata": json.dumps(metadata)}))
    with pytest.raises(ValueError, match=r"is of format 3; .* reads formats up to 2\. Install"):
        load_statistics(path)


def test_what_is_not_finite_is_refused_when_it_is_opened(with_states, tmp_path):
    """Not after the first cell of a sweep is drawn."""
    path, spoilt = tmp_path / "stats.npz", {}
    for name, state in with_states.states.items():
        spoilt[name] = {key: np.array(array) for key, array in state.items()}
    spoilt["kept_pool"]["kept_pool.features"][3, 2] = np.inf
    save_statistics(path, dataclasses.replace(with_states, states=spoilt))
    with pytest.raises(ValueError, match=r"stats\.npz must hold finite numbers; kept_pool\.feat"):
        load_statistics(path)


def test_files_without_a_format_number_open_as_they_did(statistics, tmp_path):
    # As the first version wrote them: no format, no states.
    metadata = {
        "features": "pixels",
        "network_hash": statistics.network_hash,
        "num_samples": 103,
        "data": DATA,
        "rounding": "uint8 as stored",
        "content_hash": statistics.content_hash,
    }
    path = tmp_path / "old.npz"
    np.savez(path, mu=statistics.mean, sigma=statistics.cov, metadata=json.dumps(metadata))
    loaded = load_statistics(path)
    assert loaded.content_hash == statistics.content_hash and loaded.states == {}
    assert (loaded.features, loaded.num_samples, loaded.data) == ("pixels", 103, DATA)


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    model = Classifier(num_classes=3, width=8)
    params = init_classifier(jax.random.key(0), model, SHAPE)
    save_classifier(path, model, params, {})
    return path, model, params


def test_statistics_go_with_their_network_only(statistics, pixels, classifier_file, images):
    classifier = feature_network("classifier", classifier_file[0])
    statistics.check_network(pixels, SHAPE)
    with pytest.raises(ValueError, match="of pixels features; got a classifier network"):
        statistics.check_network(classifier, SHAPE)
    with pytest.raises(ValueError, match=r"of 16 features; pixels gives 64"):
        statistics.check_network(pixels, (8, 8, 1))
    of_classifier = compute_statistics(classifier, batched(images), num_samples=103, data=DATA)
    retrained = FeatureNetwork("classifier", classifier.params, classifier.apply_fn, "0" * 64)
    of_classifier.check_network(classifier, SHAPE)
    with pytest.raises(ValueError, match="got 000000000000"):
        of_classifier.check_network(retrained, SHAPE)


def test_a_reference_is_factorised_once_for_all_that_is_compared_with_it(monkeypatch):
    """By hand: between N(0, diag(a)) and N(m, diag(b)) it is m^2 + sum (sqrt a - sqrt b)^2."""
    from ddim_jax.metrics import frechet

    of = FeatureStatistics(np.array([3.0, 0]), np.diag([4.0, 0]), "pixels")
    roots, root = [], frechet._root
    monkeypatch.setattr(frechet, "_root", lambda cov: roots.append(cov) or root(cov))
    (metric,) = named_metrics(["frechet"])
    for scale in (1.0, 2.0, 5.0):
        x = np.sqrt(1.5) * scale * np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) / np.sqrt(2)
        moments = frechet.update_moments(frechet.init_moments(2), x)  # covariance scale^2 I
        want = 9 + (scale - 2) ** 2 + scale**2
        assert of.compute(metric, {"moments": moments})["fd_pixels"] == pytest.approx(want)
        assert of.distance(moments) == pytest.approx(want)
    assert len(roots) == 1
