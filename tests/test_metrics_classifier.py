import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from ddim_jax.metrics.classifier import (
    Classifier,
    apply_classifier,
    classifier_loss,
    init_classifier,
    load_classifier,
    save_classifier,
)

MODEL = Classifier(num_classes=10, width=8)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8), labels


@pytest.fixture(scope="module")
def params():
    return init_classifier(jax.random.key(0), MODEL, (8, 8, 1))


@pytest.fixture(scope="module")
def rgb_params():
    return init_classifier(jax.random.key(0), MODEL, (32, 32, 3))


@pytest.mark.parametrize("size", [(32, 32), (65, 47), (1, 1)])
def test_any_image_size_gives_features_of_one_length(rgb_params, size):
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    features, logits = jax.jit(lambda x: apply_classifier(MODEL, rgb_params, x))(images)
    assert features.shape == (3, 32) and logits.shape == (3, 10)
    assert np.isfinite(logits).all() and (features >= 0).all()


def test_each_image_alone_decides_its_features(params, digits):
    apply_fn = jax.jit(lambda images: apply_classifier(MODEL, params, images).features)
    images = digits[0][:6]
    np.testing.assert_allclose(apply_fn(images)[4:5], apply_fn(images[4:5]), rtol=1e-5, atol=1e-6)


def test_features_see_contrast(params, digits):
    # A network with normalisation layers could hide it; a washed-out sampler must be seen.
    images = digits[0][:50]
    faded = (127.5 + 0.5 * (images - 127.5)).astype(np.uint8)
    features, faded_features = (
        apply_classifier(MODEL, params, x).features for x in (images, faded)
    )
    assert jnp.abs(features - faded_features).mean() > 0.1 * features.mean()


def test_loss_is_cross_entropy_and_accuracy_by_hand(params, digits):
    images, labels = digits[0][:9], digits[1][:9]
    logits = np.float64(apply_classifier(MODEL, params, images).logits)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, accuracy = classifier_loss(params, MODEL, images, labels)
    np.testing.assert_allclose(loss, -np.mean([np.log(p[i, y]) for i, y in enumerate(labels)]))
    assert accuracy == np.mean([p[i].argmax() == y for i, y in enumerate(labels)])


def test_learns_the_digits(digits, params):
    images, labels = digits
    tx = optax.adam(3e-3)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        gradient = jax.value_and_grad(classifier_loss, has_aux=True)
        _, grads = gradient(params, MODEL, images, labels)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    for _ in range(100):
        batch = rng.integers(0, 1437, 32)
        params, opt_state = train_step(params, opt_state, images[batch], labels[batch])
    _, accuracy = classifier_loss(params, MODEL, images[1437:], labels[1437:])
    assert accuracy > 0.85  # unseen writers; chance is 0.1


def test_saved_and_loaded_the_same(params, digits, tmp_path):
    path = tmp_path / "classifier.safetensors"
    metadata = {"data": "digits", "split": "train", "accuracy": 0.97}
    saved_hash = save_classifier(path, MODEL, params, metadata)
    trained = load_classifier(path)
    assert trained.content_hash == saved_hash and trained.metadata == metadata
    assert dataclasses.asdict(trained.model) == dataclasses.asdict(MODEL)
    got = apply_classifier(trained.model, trained.params, digits[0][:5])
    want = apply_classifier(MODEL, params, digits[0][:5])
    np.testing.assert_array_equal(got.logits, want.logits)


def test_the_hash_is_of_the_weights_alone(params, tmp_path):
    other = jax.tree.map(lambda x: x, params)
    other["logits"] = dict(params["logits"], bias=params["logits"]["bias"].at[0].add(1e-6))
    hashes = [
        save_classifier(tmp_path / "a.safetensors", MODEL, params, {"step": 1}),
        save_classifier(tmp_path / "b.safetensors", MODEL, params, {"step": 2}),
        save_classifier(tmp_path / "c.safetensors", MODEL, other, {"step": 1}),
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_altered_weights_are_refused(params, tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, MODEL, params, {})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must hold the weights"):
        load_classifier(path)


def test_other_files_are_refused_by_name(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a classifier"):
        load_classifier(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a classifier"):
        load_classifier(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent.* train a classifier .* save_classifier"):
        load_classifier(tmp_path / "absent.safetensors")


def test_weights_that_are_not_finite_are_refused_by_file_and_name(params, tmp_path):
    path = tmp_path / "classifier.safetensors"
    other = dict(params, logits=dict(params["logits"], bias=params["logits"]["bias"] * np.nan))
    save_classifier(path, MODEL, other, {})
    with pytest.raises(ValueError, match=r"classifier\.safetensors: .*finite; 1 of .* logits/bias"):
        load_classifier(path)
