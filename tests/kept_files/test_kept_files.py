"""Files that earlier versions wrote are opened, and gone on with."""

import json
import pathlib
import tarfile

import keep
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")

from ddim_jax.metrics.statistics import load_statistics
from ddim_jax.runs import load_trained

KEPT = sorted(keep.HERE.glob("*.tar.xz"))


@pytest.fixture(params=KEPT, ids=lambda path: path.name)
def kept(request, tmp_path) -> pathlib.Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def lines(folder: pathlib.Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "sweep" / "results.jsonl").read_text().splitlines()]


def images(folder: pathlib.Path) -> np.ndarray:
    return np.stack([np.asarray(PIL.Image.open(p)) for p in sorted(folder.glob("*.png"))])


def test_there_are_some():
    assert KEPT


def test_a_run_is_the_weights_that_drew_its_images(kept):
    run = load_trained(kept / "run")
    (weights,) = {line["weights"]["hash"] for line in lines(kept)}
    assert (run.weights_hash, run.step) == (weights, 20)
    said = json.loads((kept / "samples" / "samples.json").read_text())
    from ddim_jax.keys import seed_key

    drawn = run.sample(seed_key(said["seed"]), 4, said["num_sample_steps"], spacing="uniform")
    there = images(kept / "samples" / "images").astype(int)
    assert np.abs(drawn[..., 0] - there).max() <= 1
    statistics = load_statistics(kept / "pixels.npz")
    hashes = {line["measures"]["fd_pixels"]["statistics_hash"] for line in lines(kept)}
    assert (hashes, statistics.num_samples) == ({statistics.content_hash[:16]}, 360)


@pytest.mark.slow
def test_what_was_begun_goes_on(kept):
    before = images(kept / "samples" / "images")
    assert "6 images" in keep.run(kept, "sample.py", *keep.SAMPLES, "--num-images", "6")
    np.testing.assert_array_equal(images(kept / "samples" / "images")[:4], before)
    old = lines(kept)
    keep.run(kept, "fid_sweep.py", *keep.SWEEP, "--steps", "2", "3", "4")
    assert lines(kept)[:2] == old and [line["S"] for line in lines(kept)] == [2, 3, 4]
    assert "step 30 is in run" in keep.run(kept, "train.py", *keep.TRAIN, "--max-steps", "30")
    assert [json.loads(x)["step"] for x in (kept / "run/metrics.jsonl").open()][-1] == 30
