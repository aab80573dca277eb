"""Files of other tools that hold statistics or something else: read, or refused by name."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from refusals import refused

from ddim_jax.data.load import load_images
from ddim_jax.metrics.statistics import load_statistics

FEATURES = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
MU, SIGMA = FEATURES.mean(axis=0), np.cov(FEATURES, rowvar=False)
IMAGES = np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)


def test_a_reference_batch_of_guided_diffusion_is_both(tmp_path):
    path = tmp_path / "VIRTUAL_imagenet64.npz"
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(path, arr_0=IMAGES, mu=MU, sigma=SIGMA, **spatial)
    statistics = load_statistics(path)
    np.testing.assert_array_equal(statistics.mean, MU)
    np.testing.assert_array_equal(statistics.cov, SIGMA)
    assert statistics.features == "inception" and statistics.states == {}
    images = np.stack([example["image"] for example in load_images(str(path))])
    np.testing.assert_array_equal(images, IMAGES)


def test_the_images_beside_statistics_are_not_read(tmp_path):
    # Gigabytes in the published ones. Damaged here, so that reading them would fail.
    np.savez(tmp_path / "whole.npz", mu=MU, sigma=SIGMA)
    with (
        zipfile.ZipFile(tmp_path / "whole.npz") as whole,
        zipfile.ZipFile(tmp_path / "batch.npz", "w") as batch,
    ):
        batch.writestr("arr_0.npy", b"no array")
        for name in whole.namelist():
            batch.writestr(name, whole.read(name))
    np.testing.assert_array_equal(load_statistics(tmp_path / "batch.npz").mean, MU)


@pytest.mark.parametrize("shape", [(20, 5), (20, 1, 1, 5)])
def test_inception_features_become_their_mean_and_covariance(shape, tmp_path):
    np.savez(tmp_path / "act.npz", pool_3=FEATURES.reshape(shape), spatial=np.zeros((20, 7)))
    statistics = load_statistics(tmp_path / "act.npz")
    np.testing.assert_allclose(statistics.mean, np.float64(FEATURES).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.cov, np.cov(FEATURES, rowvar=False), rtol=1e-9)
    assert (statistics.features, statistics.num_samples) == ("inception", 20)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"pool_3": FEATURES[0]}, r"pool_3 the features .* got float32 of shape \(5,\)"),
        ({"pool_3": IMAGES}, r"pool_3 the features .* got uint8"),
        ({"pool_3": FEATURES[:1]}, "at least 2 images"),
        ({"pool_3": FEATURES * np.nan}, "pool_3: features must be finite"),
        ({"pool_3": FEATURES, "mu": MU}, r"sigma missing"),
        ({"mu_s": MU, "sigma_s": SIGMA}, r"statistics of spatial features alone, for sFID"),
        ({"feats": FEATURES}, r"mu and sigma missing\. It has feats \(features of images\)"),
        ({"arr_0": IMAGES}, r"It has arr_0 \(images\)\. Images .* by compute_statistics"),
        ({"colour": IMAGES}, r"It has colour\. Images"),
        ({}, "It has nothing"),
    ],
)
def test_arrays_of_another_kind_are_named(arrays, message, tmp_path):
    np.savez(tmp_path / "stats.npz", **arrays)
    with refused(rf"stats\.npz.*{message}"):
        load_statistics(tmp_path / "stats.npz")


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


OTHER_FILES = {
    "stats.npy": (saved(SIGMA), r"one array, a \.npy file\. Write both into one file"),
    "edm.pkl": (pickle.dumps({"fid": {"mu": MU}}), "a pickle, which could run code"),
    "renamed.npz": (pickle.dumps({"mu": MU}, protocol=2), "a pickle, which could run code"),
    "torch.pt": (zipped(**{"stats/data.pkl": b"", "stats/data/0": b""}), "a file of torch.save"),
    "images.zip": (zipped(**{"0.png": b"", "1.png": b""}), "an archive of 2 files. Unpack it; im"),
    "stats.zip": (zipped(**{"a/fid.npz": b""}), r"an archive of 1 files\. .* give a/fid\.npz"),
    "stats.tar": (b"a tar", "an archive. Unpack it"),
    "stats.npz": (b"PK\x03\x04", "cannot be read as feature statistics"),
    "stats.json": (b"{}", "cannot be read as feature statistics"),
    "short.npz": (b"\x80", "cannot be read as feature statistics"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused_by_what_they_are(name, tmp_path):
    content, message = OTHER_FILES[name]
    (tmp_path / name).write_bytes(content)
    with refused(f"{name}.*{message}"):
        load_statistics(tmp_path / name)


@pytest.mark.parametrize(
    "changed", [{"features": 3}, {"num_samples": "many"}, {"data": []}, {"network_hash": 1}]
)
def test_metadata_of_another_type_is_refused(changed, tmp_path):
    metadata = json.dumps({"features": "pixels"} | changed)
    np.savez(tmp_path / "stats.npz", mu=MU, sigma=SIGMA, metadata=metadata)
    with refused(rf"stats\.npz: {next(iter(changed))} must be "):
        load_statistics(tmp_path / "stats.npz")
