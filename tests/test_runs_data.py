"""A run goes on with the images it has seen, wherever they stand, and with no others."""

import dataclasses
import json
import pathlib
import shutil

import edits
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("sklearn")

from refusals import refused
from small_runs import SMALL, assert_same_bits, newest_step

from ddim_jax.runs import fit, read_config

TINY = dataclasses.replace(SMALL, max_steps=1)


def write_folder(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """Twenty images of two classes, without compression, so that all folders have equal sizes."""
    images = np.random.default_rng(seed).integers(0, 256, (20, 8, 8), np.uint8)
    for i, image in enumerate(images):
        path = folder / "ab"[i % 2] / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module")
def began(tmp_path_factory) -> pathlib.Path:
    """A folder with images, and a run of one step on them."""
    root = tmp_path_factory.mktemp("runs")
    write_folder(root / "data", seed=0)
    fit(dataclasses.replace(TINY, workdir=str(root / "model"), data=str(root / "data")))
    return root


@pytest.fixture
def copy(began, tmp_path) -> pathlib.Path:
    return shutil.copytree(began, tmp_path / "copy")


def go_on(workdir, data, **changes):
    fit(dataclasses.replace(TINY, workdir=str(workdir), data=str(data), max_steps=2, **changes))


def test_a_run_goes_on_wherever_its_data_stand(copy, began, monkeypatch):
    straight = copy / "straight"
    fit(dataclasses.replace(TINY, workdir=str(straight), data=str(copy / "data"), max_steps=2))
    moved = (copy / "data").rename(copy / "photos")
    (copy / "link").symlink_to(moved, target_is_directory=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(copy))
    go_on(copy / "model", "./link")
    assert_same_bits(copy / "model", straight)
    go_on(copy / "model", "~/photos/")  # nothing is left to do, and nothing to refuse
    assert pathlib.Path(read_config(copy / "model")["data"]).samefile(moved)  # where it is now
    npz = copy / "one.npz"
    np.savez(npz, images=np.zeros((4, 8, 8), np.uint8))
    fit(dataclasses.replace(TINY, workdir=str(copy / "npz"), data=str(npz)))
    go_on(copy / "npz", npz.rename(copy / "other.npz"))


def test_as_many_other_images_are_another_run(copy):
    """In place, and elsewhere; of equal names, number, shape and size in bytes."""
    shutil.rmtree(copy / "data")
    for data in (write_folder(copy / "data", seed=1), write_folder(copy / "else", seed=2)):
        with refused(r"another configuration: data_content is 'files .*Its images were others"):
            go_on(copy / "model", data)
    assert newest_step(copy / "model") == 1
    npz = copy / "one.npz"
    np.savez(npz, images=np.zeros((4, 8, 8), np.uint8))
    fit(dataclasses.replace(TINY, workdir=str(copy / "npz"), data=str(npz)))
    np.savez(npz, images=np.ones((4, 8, 8), np.uint8))
    with refused("data_content is 'arrays "):
        go_on(copy / "npz", npz)


def forget_content(workdir, **changes):
    """config.json as a version wrote it that did not compare content."""
    config = edits.content(workdir / "config.json")
    del config["data_content"]
    (workdir / "config.json").write_text(json.dumps(config | changes))


def test_an_older_run_goes_on_by_what_it_wrote_down(copy, monkeypatch):
    """Its number, shape and path; and its path may be spelt otherwise, now that one can tell."""
    forget_content(copy / "model", data=str(copy / "data"))
    with refused(r"data is '.*/data' there and '.*/else' now"):
        go_on(copy / "model", write_folder(copy / "else", seed=1))
    monkeypatch.chdir(copy)
    go_on(copy / "model", "data/../data")
    assert "data_content" in read_config(copy / "model")  # from now on
    forget_content(copy / "model", num_images=19)
    with refused("num_images is 19 there and 20 now"):
        go_on(copy / "model", "data")


def test_a_run_on_all_digits_goes_on_as_such_and_says_so(tmp_path):
    """The digits' "train" was all 1797; the same images are the split "all" now."""
    fit(dataclasses.replace(TINY, workdir=str(tmp_path), split="all"))
    forget_content(tmp_path, split="train")
    assert read_config(tmp_path)["split"] == "all"
    with refused(r"num_images is 1797 there and 1437 now.*which is the split \"all\" now"):
        go_on(tmp_path, "digits")
    go_on(tmp_path, "digits", split="all")
    assert newest_step(tmp_path) == 2


def test_weights_to_start_from_may_be_spelt_otherwise(began, copy, monkeypatch):
    started = dataclasses.replace(
        TINY, workdir=str(copy / "new"), data=str(copy / "data"), init_from=str(copy / "model")
    )
    fit(started)
    monkeypatch.setenv("HOME", str(copy))
    fit(dataclasses.replace(started, init_from="~/model/", max_steps=2))
    with refused("init_from is"):
        fit(dataclasses.replace(started, init_from=str(began / "model"), max_steps=3))
