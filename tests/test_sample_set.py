"""A folder of samples: killed and gone on with, grown, refused, and measured for what it is."""

import dataclasses
import os
import pathlib
import shutil

import edits
import jax
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")

import fid
import make_statistics
import sample
from refusals import refused
from small_runs import SMALL

from ddim_jax import files
from ddim_jax.files import only_one_process
from ddim_jax.runs import fit, load_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("model")
    fit(dataclasses.replace(SMALL, workdir=str(workdir)))
    return workdir


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("samples") / "whole"
    draw(trained, out)
    return out


@pytest.fixture
def own(finished, tmp_path) -> pathlib.Path:
    """A copy of the finished set to spoil."""
    return shutil.copytree(finished, tmp_path / "own")


def draw(workdir, out, **changes) -> None:
    """Five images in batches of 2, 2 and 1."""
    config = sample.SampleConfig(
        workdir=str(workdir), out=str(out), num_images=5, num_sample_steps=2, eta=1.0,
        batch_size=2, save_npz=True,
    )  # fmt: skip
    sample.main(dataclasses.replace(config, **changes))


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below the folder, the lock apart."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_set_is_what_the_library_draws_and_says_what_it_is(trained, finished):
    run = load_trained(trained)
    from ddim_jax import ddim

    want = run.sample(jax.random.key(0), 5, 2, sampler=ddim(1.0), batch_size=2)
    with np.load(finished / "samples.npz") as archive:
        assert archive.files == ["images"]
        np.testing.assert_array_equal(archive["images"], want)
    for i in range(5):
        image = PIL.Image.open(finished / "images" / f"{i:05d}.png")
        np.testing.assert_array_equal(np.asarray(image), want[i, ..., 0])
    said = edits.content(finished / "samples.json")
    assert said.pop("fingerprint") == run.fingerprint
    assert said == {
        "format": 1, "complete": True, "num_images": 5, "seed": 0, "num_sample_steps": 2,
        "spacing": "uniform", "sampler": "ddim", "eta": 1.0, "label": None, "guidance_scale": 1.0,
        "image_shape": [8, 8, 1], "batch_size": 2, "digits": 5,
        "fingerprint_id": run.fingerprint_id,
    }  # fmt: skip


@pytest.mark.parametrize("files_written", [0, 1, 2, 4, 6, 8])
def test_a_call_killed_anywhere_goes_on_to_the_same_folder(
    trained, finished, tmp_path, files_written, monkeypatch
):
    """Nine files in all: samples.json, five images, the grid, samples.npz, samples.json."""
    written = []

    def replace(old, new):
        if len(written) == files_written:
            raise KeyboardInterrupt
        written.append(new)
        os.rename(old, new)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(files.os, "replace", replace)
        draw(trained, tmp_path)
    images = [path for path in written if path.suffix == ".png" and path.parent != tmp_path]
    if images:
        (images[0].parent / "00003.png.0123abcd.new").write_bytes(b"half")  # as SIGKILL leaves it
        with refused(f"complete: {len(images)} of the 5 images .*samples.json says are there"):
            measure(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in images}
    draw(trained, tmp_path)
    assert content(tmp_path) == content(finished)
    assert before == {path: path.stat().st_mtime_ns for path in images}  # kept, not drawn again


def test_more_images_are_added_to_those_that_are_there(trained, own, tmp_path, capsys):
    before = content(own / "images")
    draw(trained, own, num_images=8, save_npz=False)
    assert "8 images" in (said := capsys.readouterr().out) and "5 of them were there" in said
    after = content(own / "images")
    assert {name: after[name] for name in before} == before and len(after) == 8
    assert not (own / "samples.npz").exists()  # it held five
    draw(trained, tmp_path / "anew", num_images=8, save_npz=False)
    assert content(own) == content(tmp_path / "anew")
    with refused("holds 3 more than the 5 images asked for, 00005.png is one"):
        draw(trained, own)
    draw(trained, own, num_images=8, save_npz=True)  # nothing is drawn for it
    with np.load(own / "samples.npz") as archive:
        assert len(archive["images"]) == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"eta": 0.0}, "eta is 1.0 there and 0.0 now"),
        ({"eta": 0.0, "sigma_hat": True}, "sampler is 'ddim' there and 'sigma_hat' now"),
        ({"num_sample_steps": 3}, "num_sample_steps is 2 there and 3 now"),
        ({"spacing": "quadratic"}, "spacing is 'uniform' there and 'quadratic' now"),
        ({"weights": "raw"}, "fingerprint.weights.kind is 'ema' there and 'raw' now"),
    ],
)
def test_other_settings_are_refused_by_name(trained, finished, changes, message):
    before = content(finished)
    with refused(f"holds samples of other settings: .*{message}.*another folder"):
        draw(trained, finished, **changes)
    assert content(finished) == before


def test_a_set_without_an_image_binds_nobody(trained, tmp_path):
    """eta = 9 gives NaN, which is refused; what was meant may then be drawn there."""
    with pytest.raises(FloatingPointError, match="2 of 2 images are not finite"):
        draw(trained, tmp_path, eta=9.0)
    draw(trained, tmp_path)


def test_images_of_unknown_origin_are_refused(trained, own):
    (own / "samples.json").unlink()
    before = content(own)
    with refused("holds 5 images or other files and there is no .*samples.json"):
        draw(trained, own)
    assert content(own) == before


def test_a_folder_is_drawn_into_by_one_process(trained, finished):
    with only_one_process(finished), refused("in use by another process"):
        draw(trained, finished)


@pytest.mark.parametrize("name", ["cat.png", "more/00001.png", "1.png", "00001.jpg"])
def test_a_stray_file_is_neither_drawn_beside_nor_measured(trained, own, name):
    stray = own / "images" / name
    stray.parent.mkdir(exist_ok=True)
    shutil.copy(own / "images" / "00001.png", stray)
    words = "holds 1 more than the 5 images" if name == "1.png" else f"it has {name}"
    for spoilt in (
        lambda: draw(trained, own),
        lambda: measure(own),
        lambda: measure(own / "images"),
    ):
        with refused(words):
            spoilt()


def measure(images, **changes) -> None:
    stats = pathlib.Path(images).parent / "stats.npz"
    if not stats.exists():
        make_statistics.main(
            make_statistics.StatisticsConfig(data="digits", out=str(stats), features="pixels")
        )
    fid.main(fid.FidConfig(images=str(images), stats=str(stats), **changes))


def test_a_lost_image_is_missed_and_drawn_again(trained, own, finished):
    (own / "images" / "00002.png").unlink()
    with refused("lacks 1 of the 5 images that .*samples.json says, 00002.png first"):
        measure(own)
    draw(trained, own)
    assert content(own) == content(finished)


def test_an_image_of_no_bytes_is_missed_and_drawn_again(trained, own, finished):
    """As a disk that lost power leaves it: its name is there."""
    (own / "images" / "00003.png").write_bytes(b"")
    with refused("lacks 1 of the 5 images that .*samples.json says, 00003.png first"):
        measure(own)
    draw(trained, own)
    assert content(own) == content(finished)


def test_the_number_names_the_set(trained, finished, capsys):
    for images in (finished, finished / "images", finished / "samples.npz"):
        measure(images)
    numbers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fd_")]
    assert len(set(numbers)) == 1 and len(numbers) == 3
    run = load_trained(trained)
    assert (
        "N = 5 images of seed 0, S 2 uniform, eta 1, ema weights of step 6, run "
        f"{run.fingerprint_id}," in numbers[0]
    )


def test_a_folder_without_samples_json_is_named_by_its_kinds(finished, tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    for i in range(4):
        picture = PIL.Image.open(finished / "images" / f"{i:05d}.png")
        picture.save(tmp_path / "plain" / f"{i}.{'JPG' if i == 2 else 'png'}")
    measure(tmp_path / "plain")
    assert "N = 4 images of" in (said := capsys.readouterr().out)
    assert "(3 png, 1 jpg, 8x8)" in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON, or damaged"),
        ('{"format": 2}', "must be of format 1.*got 2"),
        ('{"format": 1, "num_images": "5"}', "num_images must be a whole number; got '5'"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(trained, own, text, message):
    (own / "samples.json").write_text(text)
    for reader in (lambda: measure(own), lambda: draw(trained, own)):
        with refused(message):
            reader()
