"""Scripts on real images: any workdir, held-out images where there are some, files and folders."""

import json
import pathlib

import edits
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import interpolate
import likelihood
import reconstruct
import tyro
from common import real
from common.options import RealImageOptions
from refusals import refused
from test_latent_scripts import captured_drawing, make_model

from ddim_jax.data.load import load_images
from ddim_jax.data.source import ArraySource
from ddim_jax.runs import load_spec


def model_of(workdir: pathlib.Path, **config) -> str:
    """A network of zeros: what it encodes, it decodes to the same pixels."""
    make_model(workdir, std=0.0)
    path = workdir / "config.json"
    path.write_text(json.dumps(edits.content(path) | config))
    return str(workdir)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pathlib.Path:
    """Three colour images of three sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, shape in enumerate([(8, 8, 3), (12, 9, 3), (30, 40, 3)]):
        PIL.Image.fromarray(np.full(shape, 60 * i + 40, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_every_script_runs_on_a_workdir_of_a_folder_or_an_array(kind, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    data = tmp_path / "data.npz"
    np.savez(data, images=images)
    if kind == "folder":
        data = tmp_path / "data"
        data.mkdir()
        for i, image in enumerate(images):
            PIL.Image.fromarray(image[..., 0]).save(data / f"{i:02d}.png")
    workdir = model_of(tmp_path / "model", data=str(data), split="train")
    few = {"workdir": workdir, "batch_size": 16}
    reconstruct.main(
        reconstruct.ReconstructConfig(**few, out=str(tmp_path / "r"), num_images=3, steps=(2,))
    )
    assert f"first 3 images of {data}, split train, which the model was trained on" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "r/results.json").read_text())["split"] == "train"
    likelihood.main(
        likelihood.LikelihoodConfig(
            **few, out=str(tmp_path / "l"), num_images=3, num_sample_steps=3, etas=(0.5,)
        )
    )
    assert "split train, which the model was trained on" in capsys.readouterr().out
    assert json.loads((tmp_path / "l/results.json").read_text())["split"] == "train"
    interpolate.main(
        interpolate.InterpolateConfig(
            **few,
            out=str(tmp_path / "i"),
            images=(0, 1),
            num_points=2,
            grid_size=2,
            num_sample_steps=2,
        )
    )
    assert f"real images: 0 and 1 of {data}, split train, which" in capsys.readouterr().out


@pytest.mark.parametrize(
    "splits, trained_on, own, want",
    [
        (("train", "test"), "train", True, "test"),
        (("train", "validation"), "train", True, "validation"),
        (("train", "test", "validation"), "test", True, "validation"),
        (("train", "test"), "train+test[:10]", True, "train+test[:10]"),
        (("train",), "train[:9]", True, "train[:9]"),
        (("train", "test", "all"), "all", True, "all"),
        (("train", "test"), "train", False, "test"),
        (("train",), "all", False, "train"),
    ],
)
def test_the_split_is_one_held_out_where_there_is_one(splits, trained_on, own, want):
    assert real._default_split(splits, trained_on, own) == want


def test_what_was_seen_in_training_is_said(tmp_path):
    def of(workdir, **options):
        return str(real.open_source(workdir, load_spec(workdir), RealImageOptions(**options)))

    seen = ", which the model was trained on"
    model = model_of(tmp_path / "train", data="digits", split="train")
    assert of(model) == of(model, data="digits") == "split test"
    assert of(model, split="train") == "split train" + seen
    assert of(model, split="all") == "split all" + seen
    both = model_of(tmp_path / "all", data="digits", split="all")
    assert of(both) == "split all" + seen and of(both, split="test") == "split test" + seen
    gone = model_of(tmp_path / "gone", data=str(tmp_path / "gone"))
    (tmp_path / "gone").rename(tmp_path / "away")
    gone = str(tmp_path / "away")
    with refused("trained on; where it stands elsewhere now, give data"):
        of(gone)


def line_between(monkeypatch, tmp_path, **options):
    drawn = captured_drawing(monkeypatch, interpolate)
    interpolate.main(
        interpolate.InterpolateConfig(
            out=str(tmp_path), num_points=2, grid_size=2, num_sample_steps=2, **options
        )
    )
    return drawn[0][1]


def test_files_and_folders_of_any_size_are_brought_to_the_models(tmp_path, monkeypatch, photos):
    """Images of one grey each stay that grey, at 8x8 and with one channel; the line ends there."""
    workdir = model_of(tmp_path / "model", data="digits", split="train")
    files = (str(photos / "1.png"), str(photos / "2.png"))
    for options in ({"images": files}, {"images": (1, 2), "data": str(photos)}):
        ends = line_between(monkeypatch, tmp_path, workdir=workdir, **options)
        assert ends.shape == (2, 8, 8, 1)
        np.testing.assert_array_equal(ends[:, 0, 0, 0], [100, 160])
        assert (ends == ends[:, :1, :1]).all()


def test_a_photo_is_cropped_as_the_data_are(tmp_path, photos):
    picture = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
    PIL.Image.fromarray(picture).save(tmp_path / "1.png")
    want = load_images(str(tmp_path), image_size=8)[0]["image"]
    np.testing.assert_array_equal(real.read_files([str(tmp_path / "1.png")], (8, 8, 3))[0], want)
    np.testing.assert_array_equal(real.in_shape(picture[None], (8, 8, 3))[0], want)


def test_two_indices_or_two_files(tmp_path, photos):
    workdir = model_of(tmp_path / "model", data="digits", split="train")
    file = str(photos / "0.png")

    def of(*arguments):
        return tyro.cli(interpolate.InterpolateConfig, args=["--workdir", workdir, *arguments])

    assert of("--images", "0", "1").images == (0, 1)
    assert of("--images", file, file).images == (file, file)
    with refused("images must be two indices or two files"):
        interpolate.main(of("--images", "0", file))
    with refused("data and split must be left out where images are files"):
        interpolate.main(of("--images", file, file, "--data", "digits"))
    with refused(r"no\.png cannot be read as an image"):
        interpolate.main(of("--images", file, str(photos / "no.png")))


def test_fewer_images_than_a_script_takes_are_all_taken_unless_more_are_asked_for():
    source = ArraySource(np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2, 1), None, "three", None)
    assert len(real.first(source, None, 16).image) == 3
    assert len(real.first(source, None, 2).image) == 2
    assert (real.first(source, 1, 16).image == source.images[:1]).all()
    with refused(r"num_images must be in \[1, 3\]"):
        real.first(source, 16, 16)
