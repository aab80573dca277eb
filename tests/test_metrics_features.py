import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from ddim_jax.hashing import content_hash
from ddim_jax.metrics.classifier import (
    Classifier,
    apply_classifier,
    init_classifier,
    save_classifier,
)
from ddim_jax.metrics.features import (
    FEATURE_NETWORKS,
    FeatureNetwork,
    feature_batches,
    feature_network,
)
from ddim_jax.metrics.frechet import frechet_metric
from ddim_jax.metrics.metric import column_name
from ddim_jax.metrics.statistics import compute_statistics

SHAPE = (4, 4, 1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (103, *SHAPE), dtype=np.uint8)


def batched(images, size=20):
    return [images[i : i + size] for i in range(0, len(images), size)]


def test_pixel_features_are_data_units(images):
    pixels = feature_network("pixels")
    features = pixels(images)
    assert features.shape == (103, 16) and features.dtype == np.float32
    assert pixels.dim(SHAPE) == 16
    want = images.reshape(103, 16) / 127.5 - 1
    np.testing.assert_allclose(features, want, atol=1e-6)


def test_one_program_serves_a_short_last_batch(images):
    traces = []

    @jax.jit
    def apply_fn(params, images):
        traces.append(images.shape)
        return {"pool": images.reshape(images.shape[0], -1).astype(np.float32)}

    network = FeatureNetwork("pixels", {}, apply_fn, "")
    features = [batch["pool"] for batch in feature_batches(network, batched(images))]
    assert traces == [(20, *SHAPE)]
    assert [len(x) for x in features] == [20] * 5 + [3]
    np.testing.assert_array_equal(np.concatenate(features), images.reshape(103, 16))


def test_classifier_network_is_the_saved_one(images, tmp_path):
    path, model = tmp_path / "classifier.safetensors", Classifier(num_classes=3, width=8)
    params = init_classifier(jax.random.key(0), model, SHAPE)
    save_classifier(path, model, params, {})
    network = feature_network("classifier", path)
    want = apply_classifier(model, params, images).features
    np.testing.assert_allclose(network(images), want, rtol=1e-5, atol=1e-6)
    logits = network.apply_fn(network.params, images)["logits"]
    want = apply_classifier(model, params, images).logits
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)
    assert network.dims(SHAPE) == {"pool": 32, "logits": 3}
    assert network.dim(SHAPE) == 32 and network.content_hash == content_hash(params)


def test_only_inceptions_distance_is_called_fid():
    (number,) = frechet_metric().numbers
    names = {network: column_name(number, network) for network in FEATURE_NETWORKS}
    assert names == {"inception": "fid", "classifier": "fd_classifier", "pixels": "fd_pixels"}


def test_a_network_of_ones_own_is_one_entry(monkeypatch, images):
    def grey(weights):
        assert weights is None
        apply_fn = jax.jit(lambda params, x: {"pool": x.mean(axis=(1, 2), dtype=jnp.float32)})
        return FeatureNetwork("grey", {}, apply_fn, "")

    monkeypatch.setitem(FEATURE_NETWORKS, "grey", grey)
    network = feature_network("grey")
    made = compute_statistics(network, batched(images), num_samples=103, data={})
    np.testing.assert_allclose(made.mean, [images.mean()], rtol=1e-5)


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
