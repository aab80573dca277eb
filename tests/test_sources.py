import io
import json
import subprocess
import sys

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from ddim_jax import data, sources

UINT8 = np.zeros((3, 4, 4, 3), np.uint8)


def save(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path, **options)


# Arrays, digits and .npz files


def test_digits_are_sklearns():
    from sklearn.datasets import load_digits

    digits = data.load_images("digits")
    assert len(digits) == 1797 and digits.image_shape == (8, 8, 1) and digits.num_classes == 10
    batch = digits.take(np.arange(1797))
    np.testing.assert_allclose(
        batch["image"][..., 0] / 255, load_digits().images / 16, atol=0.5 / 255
    )
    np.testing.assert_array_equal(batch["label"], load_digits().target)
    test = data.load_images("digits", split="test")
    np.testing.assert_array_equal(test.take(np.arange(360))["image"], batch["image"][-360:])
    with pytest.raises(ValueError, match=r"\['test', 'train'\] for digits; got 'all'"):
        data.load_images("digits", split="all")


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 1), (5, 4, 3, 3)])
def test_npz(tmp_path, keys, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **{keys[0]: images, keys[1]: np.array([0, 2, 1, 0, 2])})
    source = data.load_images(str(path))
    assert source.image_shape == (4, 3, shape[-1] if len(shape) == 4 else 1)
    assert source.num_classes == 3
    np.testing.assert_array_equal(source.images.reshape(shape), images)
    np.testing.assert_array_equal(source[1]["label"], 2)


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(images=UINT8.astype(np.float32)), "must be uint8.*float32.*to_uint8"),
        (dict(images=UINT8[0, 0]), r"\(N, H, W, C\).*shape \(4, 3\)"),
        (dict(images=UINT8.transpose(0, 3, 1, 2).repeat(2, -1)), r"transpose\(0, 2, 3, 1\)"),
        (dict(images=UINT8[:0]), r"shape \(0, 4, 4, 3\)"),
        (dict(pictures=UINT8), r"under \"images\".*\['pictures'\]"),
        (dict(images=np.array([None, "x"], object)), "plain arrays.*Object"),
        (dict(images=UINT8, labels=np.zeros(2, int)), r"labels.*\(3,\).*shape \(2,\)"),
        (dict(images=UINT8, labels=np.zeros(3)), "labels.*integers.*float64"),
        (dict(images=UINT8, labels=np.array(["a", "b", "a"])), "labels.*integers.*<U1"),
        (dict(images=UINT8, labels=np.array([0, -1, 2])), r"labels must lie.*-1 to 2"),
    ],
)
def test_npz_refused_by_name(tmp_path, arrays, words):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words) as error:
        data.load_images(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("compress", [False, True])
def test_a_broken_npz_is_named(tmp_path, compress):
    path = tmp_path / "set.npz"
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    (np.savez_compressed if compress else np.savez)(path, images=images)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in [whole[: len(whole) // 2], bytes(damaged), b"", b"no zip at all", UINT8.dumps()]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"set\.npz cannot be read"):
            data.load_images(str(path))
    with path.open("wb") as file:
        np.save(file, UINT8)  # a .npy under another name
    with pytest.raises(ValueError, match=r"set\.npz cannot be read"):
        data.load_images(str(path))
    with pytest.raises(ValueError, match=r"none\.npz does not exist"):
        data.load_images(str(tmp_path / "none.npz"))


def test_labels_and_num_classes_come_together():
    with pytest.raises(ValueError, match="labels and num_classes come together"):
        sources.ArraySource(UINT8, np.zeros(3, int))


# Sizes


def test_resize_is_the_torchvision_one():
    """Resize(6), CenterCrop(6) of torchvision: short side to 6, long side int(6 * 17 / 12) = 8."""
    ramp = np.arange(17, dtype=np.float64) * 15
    image = PIL.Image.fromarray(np.tile(np.uint8(ramp), (12, 1)))
    got = np.asarray(sources.resize_and_crop(image, 6))
    assert got.shape == (6, 6)
    # Bilinear keeps a ramp a ramp: output pixel i of 8 has its centre at (i + 0.5) * 17 / 8 - 0.5.
    centres = (np.arange(8) + 0.5) * 17 / 8 - 0.5
    np.testing.assert_allclose(got, np.tile(15 * centres[1:7], (6, 1)), atol=1.0)


@pytest.mark.parametrize("size, side, long", [((49, 98), 64, 128), ((322, 161), 256, 512)])
def test_a_long_side_that_comes_out_whole_is_not_cut(size, side, long, monkeypatch):
    """torchvision takes int(side * long / short); side / short * long can end just below it."""
    made = []
    resize = PIL.Image.Image.resize
    spy = lambda image, size, *args: made.append(size) or resize(image, size, *args)  # noqa: E731
    monkeypatch.setattr(PIL.Image.Image, "resize", spy)
    sources.resize_and_crop(PIL.Image.new("L", size), side)
    assert sorted(made[0]) == [side, long]


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (7, 7), (100, 99)])
def test_any_size_becomes_the_size_wanted(size):
    image = PIL.Image.new("RGB", size, (10, 20, 30))
    for side in (1, 7, 32, 64):
        got = np.asarray(sources.resize_and_crop(image, side))
        np.testing.assert_array_equal(got, np.broadcast_to(np.uint8([10, 20, 30]), (side, side, 3)))


def test_image_size_resizes_arrays_channel_by_channel():
    source = data.load_images("digits", image_size=16)
    assert source.image_shape == (16, 16, 1) and len(source) == 1797
    small = data.load_images("digits")
    means = [np.mean(s.take(np.arange(1797))["image"], axis=(1, 2, 3)) for s in (source, small)]
    np.testing.assert_allclose(*means, atol=6)
    assert data.load_images("digits", image_size=8).image_shape == (8, 8, 1)
    with pytest.raises(ValueError, match="image_size must be at least 1; got 0"):
        data.load_images("digits", image_size=0)


# Folders


def test_folder_in_sorted_order_whatever_the_format(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 6, 5, 3), np.uint8)
    for name, image in zip(["b.png", "a.bmp", "sub/z.PNG", "c.tiff"], images, strict=True):
        save(image, tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._b.png").write_text("what macOS leaves behind")
    source = data.load_images(str(tmp_path))
    assert source.name == str(tmp_path) and source.num_classes is None
    np.testing.assert_array_equal(source.take(np.arange(4))["image"], images[[1, 0, 3, 2]])
    streamed = data.load_images(str(tmp_path), in_memory=False)
    assert isinstance(streamed, sources.FolderSource)
    for i in range(4):
        np.testing.assert_array_equal(streamed[i]["image"], images[[1, 0, 3, 2][i]])


def test_subfolders_are_classes(tmp_path):
    for name in ["dog/1.png", "cat/x/2.png", "cat/1.png"]:
        save(UINT8[0], tmp_path / name)
    source = data.load_images(str(tmp_path))
    assert source.num_classes == 2
    assert [int(source[i]["label"]) for i in range(3)] == [0, 0, 1]


def test_grey_and_colour(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)
    save(grey, tmp_path / "1.png")
    assert data.load_images(str(tmp_path)).image_shape == (4, 4, 1)
    np.testing.assert_array_equal(data.load_images(str(tmp_path))[0]["image"][..., 0], grey)
    save(UINT8[0], tmp_path / "2.png")
    mixed = data.load_images(str(tmp_path))
    assert mixed.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(mixed[0]["image"], np.repeat(grey[..., None], 3, -1))


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be seen turned clockwise by 90 degrees
    for suffix in ("png", "tiff"):
        save(pixels, tmp_path / suffix / f"1.{suffix}", exif=exif)
        source = data.load_images(str(tmp_path / suffix))
        np.testing.assert_array_equal(source[0]["image"], np.rot90(pixels, -1))


def test_mixed_sizes_are_refused_with_counts_or_resized(tmp_path):
    for i in range(3):
        save(np.full((8, 6, 3), 200, np.uint8), tmp_path / f"a{i}.png")
    save(np.full((9, 20, 3), 200, np.uint8), tmp_path / "wide.png")
    with pytest.raises(
        ValueError, match=r"6x8: 3, .*a2\.png is one; 20x9: 1, .*wide\.png"
    ) as error:
        data.load_images(str(tmp_path))
    assert "image_size" in str(error.value)
    source = data.load_images(str(tmp_path), image_size=4)
    np.testing.assert_array_equal(source.take(np.arange(4))["image"], np.full((4, 4, 4, 3), 200))


def test_folders_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"has no image.*\.png"):
        data.load_images(str(tmp_path))
    save(np.zeros((4, 4), np.uint16), tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"8 bits a channel; 1 of 1.*deep\.png"):
        data.load_images(str(tmp_path))
    (tmp_path / "deep.png").unlink()
    save(UINT8[0], tmp_path / "good.png")
    with pytest.raises(ValueError, match="split must be one of"):
        data.load_images(str(tmp_path), split="test")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unreadable_file_is_named(tmp_path, suffix, in_memory):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path = tmp_path / f"bad.{suffix}"
    save(noise, path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, 3, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"bad\.{suffix} cannot be read as an image"):
            data.load_images(str(tmp_path), in_memory=in_memory)[0]


# TFDS


def encoded(pixels, form="PNG"):
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels).save(file, form)
        return file.getvalue()


def write_tfds(root, name, images, shape, labels=None, file_format="array_record"):
    """A prepared TFDS set, written by hand since TFDS writes with TensorFlow only."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    builder = tfds.builder(name, data_dir=root)
    folder = root / builder.info.full_name
    folder.mkdir(parents=True)
    features = {"image": tfds.features.Image(shape=shape)}
    if labels is not None:
        features["label"] = tfds.features.ClassLabel(num_classes=10)
    tfds.features.FeaturesDict(features).save_metadata(str(folder))
    tfds.features.FeaturesDict(features).save_config(str(folder))
    splits = [{"name": "train", "shardLengths": [str(len(images))], "numBytes": "1"}]
    info = {"name": builder.name, "version": str(builder.version), "splits": splits}
    info |= {"fileFormat": file_format, "moduleName": "none"}
    if "/" in name:
        info["configName"] = name.split("/")[1]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    writer = ArrayRecordWriter(
        str(folder / f"{builder.name}-train.{file_format}-00000-of-00001"), "group_size:1"
    )
    for i, image in enumerate(images):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(image)
        if labels is not None:
            example.features.feature["label"].int64_list.value.append(labels[i])
        writer.write(example.SerializeToString())
    writer.close()
    return root


def test_mnist_by_name(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    labels = [3, 1, 4, 1, 5, 9, 2]
    write_tfds(tmp_path, "mnist", [*map(encoded, pixels)], (28, 28, 1), labels)
    source = data.load_images("mnist", data_dir=tmp_path)
    assert isinstance(source, sources.ArraySource) and source.num_classes == 10
    batch = source.take(np.arange(7))
    np.testing.assert_array_equal(batch["image"][..., 0], pixels)
    np.testing.assert_array_equal(batch["label"], labels)

    assert len(data.load_images("mnist", data_dir=tmp_path, split="train[2:5]")) == 3
    with pytest.raises(ValueError, match=r"one of \['train'\] for mnist; got 'test'"):
        data.load_images("mnist", data_dir=tmp_path, split="test")
    with pytest.raises(ValueError, match=r"'train\[:0\]' of mnist has none"):
        data.load_images("mnist", data_dir=tmp_path, split="train[:0]")


def test_celeb_a_has_the_papers_crop(tmp_path):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[57 : 57 + 128, 25 : 25 + 128] = np.repeat(
        np.arange(128, dtype=np.uint8)[:, None, None], 3, -1
    )
    write_tfds(tmp_path, "celeb_a", [encoded(pixels)], (218, 178, 3))
    whole = data.load_images("celeb_a", data_dir=tmp_path, image_size=128)[0]["image"]
    np.testing.assert_array_equal(whole, pixels[57 : 57 + 128, 25 : 25 + 128])
    small = data.load_images("celeb_a", data_dir=tmp_path)[0]["image"]
    assert small.shape == (64, 64, 3)  # row i averages around rows 2i and 2i + 1
    np.testing.assert_allclose(small[1:-1, :, 0].mean(1), 2 * np.arange(1, 63) + 0.5, atol=0.51)


def test_lsun_has_its_short_side_scaled_and_its_centre_kept(tmp_path):
    wide, tall = np.zeros((300, 500, 3), np.uint8), np.zeros((512, 256, 3), np.uint8)
    wide[:, 100:400] = 90  # the centre square
    tall[128:384] = 70
    files = [encoded(wide), encoded(tall, "JPEG")]
    write_tfds(tmp_path, "lsun/church_outdoor", files, (None, None, 3))
    source = data.load_images("lsun/church_outdoor", data_dir=tmp_path, in_memory=False)
    assert source.image_shape == (256, 256, 3) and source.num_classes is None
    np.testing.assert_array_equal(source[0]["image"][:, 2:-2], np.full((256, 252, 3), 90))
    np.testing.assert_allclose(source[1]["image"][8:-8], np.full((240, 256, 3), 70), atol=2)


def test_a_record_that_is_no_image_is_named(tmp_path):
    files = [encoded(np.zeros((28, 28), np.uint8)), b"no image"]
    write_tfds(tmp_path, "mnist", files, (28, 28, 1), labels=[0, 1])
    with pytest.raises(ValueError, match=r"record 1 of mnist.* cannot be read as an image"):
        data.load_images("mnist", data_dir=tmp_path)


def test_what_is_not_prepared_comes_with_the_command(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError) as error:
        data.load_images("mnist", data_dir=tmp_path)
    message = str(error.value)
    assert "ddim_jax[prepare]" in message and str(tmp_path) in message
    (command,) = [line for line in message.splitlines() if "download_and_prepare" in line]
    compile(command.split('"')[1], "command", "exec")  # what python -c is given


def test_tfrecord_files_are_refused_with_the_command(tmp_path):
    write_tfds(tmp_path, "mnist", [encoded(UINT8[0])], (28, 28, 1), file_format="tfrecord")
    with pytest.raises(ValueError, match=r"(?s)stored as tfrecord.*file_format='array_record'"):
        data.load_images("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["no_such_set", "lsun/nothing", "cifar10:9.9.9", "./none", "/n"])
def test_unknown_names_are_refused(tmp_path, name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=f"name must be .*{name}"):
        data.load_images(name, data_dir=tmp_path)


def test_a_name_that_is_nearly_one_gets_the_right_one(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="perhaps you meant cifar10 or"):
        data.load_images("cifar_10", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"perhaps you meant .*lsun/church_outdoor"):
        data.load_images("lsun/church", data_dir=tmp_path)


def test_a_tfds_name_is_not_taken_for_a_folder_of_that_name(tmp_path, monkeypatch):
    """A run's own `cifar10/` folder of sample grids must not become its training set."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.chdir(tmp_path)
    save(UINT8[0], tmp_path / "cifar10" / "samples.png")
    with pytest.raises(ValueError, match="not prepared"):
        data.load_images("cifar10", data_dir=tmp_path / "tfds")
    assert data.load_images("./cifar10").image_shape == (4, 4, 3)


@pytest.mark.slow
def test_cifar10_facts_without_tensorflow(shared):
    program = f"""
import sys
import numpy as np
from ddim_jax import data
train = data.load_images("cifar10", data_dir={str(shared("tfds"))!r})
test = data.load_images("cifar10", data_dir={str(shared("tfds"))!r}, split="test")
assert "tensorflow" not in sys.modules
assert (len(train), len(test)) == (50000, 10000)
means = train.images.mean((0, 1, 2)) / 255
np.testing.assert_allclose(means, [0.49139968, 0.48215841, 0.44653091], atol=1e-8)
assert np.array_equal(np.bincount(train.labels), [5000] * 10)
assert np.array_equal(np.bincount(test.labels), [1000] * 10)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
