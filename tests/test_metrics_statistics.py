import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from ddim_jax.metrics.classifier import (
    Classifier,
    apply_classifier,
    init_classifier,
    save_classifier,
)
from ddim_jax.metrics.content_hash import content_hash
from ddim_jax.metrics.frechet import frechet_distance_from_features
from ddim_jax.metrics.statistics import (
    DISTANCE_NAMES,
    FeatureNetwork,
    compute_statistics,
    feature_batches,
    feature_network,
    gather_moments,
    load_statistics,
    save_statistics,
)

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


def test_pixel_features_are_data_units(pixels, images):
    features = pixels(images)
    assert features.shape == (103, 16) and features.dtype == np.float32
    assert pixels.dim(SHAPE) == 16
    want = images.reshape(103, 16) / 127.5 - 1
    np.testing.assert_allclose(features, want, atol=1e-6)


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


def test_one_program_serves_a_short_last_batch(images):
    traces = []

    @jax.jit
    def apply_fn(params, images):
        traces.append(images.shape)
        return images.reshape(images.shape[0], -1).astype(np.float32)

    network = FeatureNetwork("pixels", {}, apply_fn, "")
    features = list(feature_batches(network, batched(images)))
    assert traces == [(20, *SHAPE)]
    assert [len(x) for x in features] == [20] * 5 + [3]
    np.testing.assert_array_equal(np.concatenate(features), images.reshape(103, 16))


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
    with pytest.raises(ValueError, match=r"empty\.npz is not a \.npz file, or damaged"):
        load_statistics(tmp_path / "empty.npz")
    arrays = {"mu": statistics.mean, "sigma": statistics.cov}
    np.savez(tmp_path / "new.npz", **arrays, metadata='{"features": "pixels", "colour": 3}')
    with pytest.raises(ValueError, match=r"new\.npz holds metadata that this version cannot read"):
        load_statistics(tmp_path / "new.npz")


def test_bad_files_are_refused_by_name(statistics, tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(FileNotFoundError, match=r"experiments/statistics\.py"):
        load_statistics(path)
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match="must hold mu and sigma; mu and sigma missing"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(D, D\); got \(3,\) and \(2, 2\)"):
        load_statistics(path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"stats\.npz is not a \.npz file"):
        load_statistics(path)
    save_statistics(path, statistics)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"mu": arrays["mu"] + 1e-9}))
    with pytest.raises(ValueError, match="was altered"):
        load_statistics(path)


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    model = Classifier(num_classes=3, width=8)
    params = init_classifier(jax.random.key(0), model, SHAPE)
    save_classifier(path, model, params, {})
    return path, model, params


def test_classifier_network_is_the_saved_one(classifier_file, images):
    path, model, params = classifier_file
    network = feature_network("classifier", path)
    want = apply_classifier(model, params, images).features
    np.testing.assert_allclose(network(images), want, rtol=1e-5, atol=1e-6)
    assert network.dim(SHAPE) == 32 and network.content_hash == content_hash(params)


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


def test_only_inceptions_distance_is_called_fid():
    assert [name for name, distance in DISTANCE_NAMES.items() if distance == "fid"] == ["inception"]


def test_networks_are_named_and_asked_for_what_they_need(tmp_path):
    with pytest.raises(ValueError, match="classifier features need weights"):
        feature_network("classifier")
    with pytest.raises(ValueError, match="without weights"):
        feature_network("pixels", tmp_path)
    with refused("name must be one of inception, classifier, pixels; got 'resnet'"):
        feature_network("resnet")


def test_inception_network_reads_its_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth is not a file"):
        feature_network("inception", tmp_path / "absent.pth")


def test_content_hash_sees_every_bit_name_dtype_and_shape():
    x = np.arange(6.0)
    trees = [{"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": np.float32(x)}, {"a": -x}]
    assert len({content_hash(tree) for tree in trees}) == 5


def test_content_hash_does_not_see_order_or_device():
    x, y = np.float32([[1, 2], [3, 4]])
    assert content_hash({"a": x, "b": y}) == content_hash({"b": jnp.array(y), "a": jnp.array(x)})
