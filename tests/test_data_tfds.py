import io
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from ddim_jax.data.load import load_images
from ddim_jax.data.source import ArraySource

PIXELS = np.zeros((4, 4, 3), np.uint8)


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
    source = load_images("mnist", data_dir=tmp_path)
    assert isinstance(source, ArraySource) and source.num_classes == 10
    batch = source.take(np.arange(7))
    np.testing.assert_array_equal(batch["image"][..., 0], pixels)
    np.testing.assert_array_equal(batch["label"], labels)

    assert len(load_images("mnist", data_dir=tmp_path, split="train[2:5]")) == 3
    with pytest.raises(ValueError, match=r"one of \['train'\] for mnist; got 'test'"):
        load_images("mnist", data_dir=tmp_path, split="test")
    with pytest.raises(ValueError, match=r"'train\[:0\]' of mnist has none"):
        load_images("mnist", data_dir=tmp_path, split="train[:0]")


def test_celeb_a_has_the_papers_crop(tmp_path):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[57 : 57 + 128, 25 : 25 + 128] = np.repeat(
        np.arange(128, dtype=np.uint8)[:, None, None], 3, -1
    )
    write_tfds(tmp_path, "celeb_a", [encoded(pixels)], (218, 178, 3))
    whole = load_images("celeb_a", data_dir=tmp_path, image_size=128)[0]["image"]
    np.testing.assert_array_equal(whole, pixels[57 : 57 + 128, 25 : 25 + 128])
    small = load_images("celeb_a", data_dir=tmp_path)[0]["image"]
    assert small.shape == (64, 64, 3)  # row i averages around rows 2i and 2i + 1
    np.testing.assert_allclose(small[1:-1, :, 0].mean(1), 2 * np.arange(1, 63) + 0.5, atol=0.51)


def test_lsun_has_its_short_side_scaled_and_its_centre_kept(tmp_path):
    wide, tall = np.zeros((300, 500, 3), np.uint8), np.zeros((512, 256, 3), np.uint8)
    wide[:, 100:400] = 90  # the centre square
    tall[128:384] = 70
    files = [encoded(wide), encoded(tall, "JPEG")]
    write_tfds(tmp_path, "lsun/church_outdoor", files, (None, None, 3))
    source = load_images("lsun/church_outdoor", data_dir=tmp_path, in_memory=False)
    assert source.image_shape == (256, 256, 3) and source.num_classes is None
    np.testing.assert_array_equal(source[0]["image"][:, 2:-2], np.full((256, 252, 3), 90))
    np.testing.assert_allclose(source[1]["image"][8:-8], np.full((240, 256, 3), 70), atol=2)


def test_a_record_that_is_no_image_is_named(tmp_path):
    files = [encoded(np.zeros((28, 28), np.uint8)), b"no image"]
    write_tfds(tmp_path, "mnist", files, (28, 28, 1), labels=[0, 1])
    with pytest.raises(ValueError, match=r"record 1 of mnist.* cannot be read as an image"):
        load_images("mnist", data_dir=tmp_path)


def test_what_is_not_prepared_comes_with_the_command(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError) as error:
        load_images("mnist", data_dir=tmp_path)
    message = str(error.value)
    assert "ddim_jax[prepare]" in message and str(tmp_path) in message
    (command,) = [line for line in message.splitlines() if "download_and_prepare" in line]
    compile(command.split('"')[1], "command", "exec")  # what python -c is given


def test_tfrecord_files_are_refused_with_the_command(tmp_path):
    write_tfds(tmp_path, "mnist", [encoded(PIXELS)], (28, 28, 1), file_format="tfrecord")
    with pytest.raises(ValueError, match=r"(?s)stored as tfrecord.*file_format='array_record'"):
        load_images("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["no_such_set", "lsun/nothing", "cifar10:9.9.9", "./none", "/n"])
def test_unknown_names_are_refused(tmp_path, name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=f"name must be .*{name}"):
        load_images(name, data_dir=tmp_path)


def test_a_name_that_is_nearly_one_gets_the_right_one(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="perhaps you meant cifar10 or"):
        load_images("cifar_10", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"perhaps you meant .*lsun/church_outdoor"):
        load_images("lsun/church", data_dir=tmp_path)


def test_a_tfds_name_is_not_taken_for_a_folder_of_that_name(tmp_path, monkeypatch):
    """A run's own `cifar10/` folder of sample grids must not become its training set."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    PIL.Image.fromarray(PIXELS).save(tmp_path / "cifar10" / "samples.png")
    with pytest.raises(ValueError, match="not prepared"):
        load_images("cifar10", data_dir=tmp_path / "tfds")
    assert load_images("./cifar10").image_shape == (4, 4, 3)


@pytest.mark.slow
def test_cifar10_facts_without_tensorflow(shared):
    program = f"""
import sys
import numpy as np
from ddim_jax.data.load import load_images
train = load_images("cifar10", data_dir={str(shared("tfds"))!r})
test = load_images("cifar10", data_dir={str(shared("tfds"))!r}, split="test")
assert "tensorflow" not in sys.modules
assert (len(train), len(test)) == (50000, 10000)
means = train.images.mean((0, 1, 2)) / 255
np.testing.assert_allclose(means, [0.49139968, 0.48215841, 0.44653091], atol=1e-8)
assert np.array_equal(np.bincount(train.labels), [5000] * 10)
assert np.array_equal(np.bincount(test.labels), [1000] * 10)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
