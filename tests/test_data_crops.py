"""Sets as their owners have them: aligned CelebA in a folder, LSUN's LMDB folders, JPEG files."""

import io
import json
import pathlib
import pickle
import shutil
import sys

import numpy as np
import PIL.Image
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))

import fid
import make_statistics
from refusals import refused

from ddim_jax.data import content_of, load_images
from ddim_jax.data.images import resize_and_crop
from ddim_jax.metrics.origin import Origin, origin_of, origin_warnings
from ddim_jax.metrics.statistics import load_statistics
from ddim_jax.runs.measure import crop_of


def aligned_faces(number=3):
    """Noise of CelebA's size, and the part that the paper's torch code cuts out of it.

    That crops around (cx, cy) = (89, 121): rows 121 - 64 to 121 + 64, columns 89 - 64 to 89 + 64.
    """
    images = np.random.default_rng(0).integers(0, 256, (number, 218, 178, 3), np.uint8)
    return images, images[:, 121 - 64 : 121 + 64, 89 - 64 : 89 + 64]


def folder_of(path, images, suffix="png", **options):
    path.mkdir()
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(path / f"{i:06d}.{suffix}", **options)
    return str(path)


def test_a_folder_of_aligned_celeba_gets_the_papers_crop(tmp_path):
    images, faces = aligned_faces()
    folder, npz = folder_of(tmp_path / "faces", images), tmp_path / "faces.npz"
    np.savez(npz, images=images)
    for name in (folder, str(npz)):
        for in_memory in (True, False):
            source = load_images(name, crop="celeba", image_size=128, in_memory=in_memory)
            np.testing.assert_array_equal([x["image"] for x in map(source.__getitem__, range(3))],
                                          faces)  # fmt: skip
            assert source.facts["crop"]["box"] == [25, 57, 153, 185]
        small = load_images(name, crop="celeba")[0]["image"]
        want = np.asarray(resize_and_crop(PIL.Image.fromarray(faces[0]), 64))
        np.testing.assert_array_equal(small, want)
        assert load_images(name)[0]["image"].shape == (218, 178, 3)


def test_a_crop_of_images_of_another_size_is_refused(tmp_path):
    _, faces = aligned_faces()
    folder, npz = folder_of(tmp_path / "faces", faces), tmp_path / "faces.npz"
    np.savez(npz, images=faces)
    for name in (folder, str(npz), "digits"):
        with refused(r"images must be 178x218 \(width x height\) for the crop celeba; .* is "):
            load_images(name, crop="celeba")
    with refused("crop must be one of celeba; got 'ffhq'"):
        load_images(folder, crop="ffhq")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------- LMDB


def lmdb_of(path, values):
    """LSUN's layout: one folder, the files of images by a key."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as txn:
        for key, value in values.items():
            txn.put(key, value)
    return str(path)


def file_of(image, kind, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def test_lsuns_lmdb_folder(tmp_path):
    rng = np.random.default_rng(1)
    images = {key: rng.integers(0, 256, (256, 300, 3), np.uint8) for key in (b"c", b"a", b"b")}
    values = {key: file_of(image, "WEBP", lossless=True) for key, image in images.items()}
    name = lmdb_of(tmp_path / "church_outdoor_train_lmdb", values)
    source = load_images(name, in_memory=False)
    assert (len(source), source.image_shape, source.num_classes) == (3, (256, 256, 3), None)
    again = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    for i, key in enumerate((b"a", b"b", b"c")):  # short side 256 already: the centre columns
        for opened in (source, again):
            np.testing.assert_array_equal(opened[i]["image"], images[key][:, 22:278])
    small = load_images(name, image_size=16)  # decoded, by threads
    want = resize_and_crop(PIL.Image.fromarray(images[b"a"]), 16)
    np.testing.assert_array_equal(small[0]["image"], np.asarray(want))

    shutil.copytree(name, tmp_path / "moved")
    moved = load_images(str(tmp_path / "moved"), in_memory=False)
    assert content_of(moved) == content_of(source)
    other = lmdb_of(tmp_path / "other", values | {b"c": values[b"a"]})
    assert content_of(load_images(other, in_memory=False)) != content_of(source)


def test_what_is_wrong_with_an_lmdb_folder_is_named(tmp_path, monkeypatch):
    good = file_of(np.zeros((256, 256, 3), np.uint8), "PNG")
    (tmp_path / "parent").mkdir()
    name = lmdb_of(tmp_path / "parent" / "bad",
                   {b"00": good, b"01": b"no image"})  # fmt: skip
    with refused("bad cannot be read as an image"):
        load_images(name, in_memory=False)
    with refused("bad has no image in it: its data.mdb is empty"):
        load_images(lmdb_of(tmp_path / "empty_bad", {}))
    with refused("split must be one of .'train'."):
        load_images(name, split="val")
    with refused(r"has no image in it or below it, but .*\.mdb\. Give one of its LMDB folders"):
        load_images(str(tmp_path / "parent"))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    shutil.copytree(name, tmp_path / "unread")
    with pytest.raises(ImportError, match=r"lmdb is needed to read .*pip install 'ddim_jax.lmdb.'"):
        load_images(str(tmp_path / "unread"))


# ------------------------------------------------------------------------------------ compression


def test_what_shows_compression(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3), np.uint8)
    png, jpeg = (folder_of(tmp_path / kind, images, kind) for kind in ("png", "jpg"))
    PIL.Image.fromarray(images[0]).save(pathlib.Path(jpeg) / "one.png")
    count = lambda *a, **k: load_images(*a, **k).facts["lossy_files"]  # noqa: E731  # pyright: ignore
    assert [count(png), count(jpeg), count(jpeg, image_size=32)] == [0, 3, 3]
    assert count(jpeg, image_size=16) == 0  # averaged away
    assert count(jpeg, image_size=16, in_memory=False) == 0
    values = {b"%d" % i: file_of(image, "JPEG") for i, image in enumerate(images)}
    name = lmdb_of(tmp_path / "lmdb", values)
    assert (count(name, image_size=32), count(name, image_size=8)) == (3, 0)


def test_statistics_say_how_their_images_came_to_be_and_who_measures_is_warned(tmp_path, capsys):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (80, 4, 4, 3), np.uint8)
    folders = {kind: folder_of(tmp_path / kind, images, kind) for kind in ("png", "jpg")}
    faces = folder_of(tmp_path / "faces", aligned_faces(2)[0], "jpg")

    def statistics(name, **options):
        out = str(tmp_path / f"{pathlib.Path(name).name}.npz")
        make_statistics.main(
            make_statistics.StatisticsConfig(data=name, out=out, features="pixels", **options)
        )
        return out

    def measured(name, stats):
        capsys.readouterr()
        fid.main(fid.FidConfig(images=name, stats=stats))
        return capsys.readouterr().out

    recipe = load_statistics(statistics(faces, crop="celeba", image_size=4)).data
    assert recipe["crop"] == {"name": "celeba", "of": [178, 218], "box": [25, 57, 153, 185]}
    assert recipe["lossy_files"] == 0 and json.loads(json.dumps(dict(recipe))) == recipe

    of = {kind: statistics(folders[kind]) for kind in folders}
    assert "100% of the statistics' images and 0% of the samples" in measured(
        folders["png"], of["jpg"]
    )
    text = measured(folders["jpg"], of["png"])
    assert "0% of the statistics' images and 100% of the samples were JPEG files" in text
    for kind, folder in folders.items():
        assert "JPEG" not in measured(folder, of[kind])
    # How many, not whether: one image of eighty is no reason, forty are.
    mixed = folder_of(tmp_path / "mixed", images[:40], "jpg")
    for i, image in enumerate(images[40:]):
        PIL.Image.fromarray(image).save(pathlib.Path(mixed) / f"png{i}.png")
    assert "100% of the statistics' images and 50% of the samples" in measured(mixed, of["jpg"])
    few = folder_of(tmp_path / "few", images[:1], "jpg")
    for i, image in enumerate(images[1:]):
        PIL.Image.fromarray(image).save(pathlib.Path(few) / f"png{i}.png")
    assert "JPEG" not in measured(few, of["png"])
    assert "JPEG" in measured(few, of["jpg"])
    np.savez(tmp_path / "samples.npz", images=images)  # of which nobody knows
    assert "JPEG" not in measured(str(tmp_path / "samples.npz"), of["jpg"])


def test_who_measures_another_crop_than_the_statistics_is_warned(tmp_path, capsys):
    """The same faces, cropped and not: another distance, and a sentence that says why."""
    faces = folder_of(tmp_path / "faces", aligned_faces(9)[0], "png")
    ready = folder_of(tmp_path / "ready", load_images(faces, crop="celeba", image_size=4).images,
                      "png")  # pyright: ignore  # fmt: skip
    stats = str(tmp_path / "cropped.npz")
    options = {"features": "pixels", "image_size": 4}
    make_statistics.main(
        make_statistics.StatisticsConfig(data=faces, out=stats, crop="celeba", **options)
    )

    def measured(name, **how):
        capsys.readouterr()
        fid.main(fid.FidConfig(images=name, stats=stats, **how))
        out = capsys.readouterr().out
        return float(out.split()[1].rstrip(":")), "--crop" in out

    number, warned = measured(faces, image_size=4)
    assert number > 1e-3 and warned
    number, warned = measured(faces, image_size=4, crop="celeba")
    assert number < 1e-6 and not warned
    number, warned = measured(ready)  # of their size already: nobody knows of what they were cut
    assert number < 1e-6 and not warned


@pytest.mark.parametrize(
    "config, crop",
    [
        ({"data": "celeb_a", "crop": None, "image_size": None}, "celeba"),
        ({"data": "celeb_a:2.0.1", "crop": None, "image_size": 32}, "celeba"),
        ({"data": "faces", "crop": "celeba", "image_size": None}, "celeba"),
        ({"data": "faces", "crop": None, "image_size": 64}, "none"),
        ({"data": "faces", "crop": None, "image_size": None}, None),
        ({"model": {}}, None),  # converted
    ],
)
def test_what_a_run_says_of_its_crop(config, crop):
    assert crop_of(config) == crop
    samples = Origin(0.0, crop)
    real = origin_of({"lossy_files": 0, "crop": {"name": "celeba"}}, 10)
    assert bool(origin_warnings(samples, real)) == (crop == "none")
    assert bool(origin_warnings(samples, origin_of({"lossy_files": 0}, 10))) == (crop == "celeba")
    assert not origin_warnings(samples, origin_of({}, None))  # a published file
