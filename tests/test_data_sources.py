import numpy as np
import PIL.Image
import pytest

from ddim_jax.data.content import content_of
from ddim_jax.data.images import resize_and_crop
from ddim_jax.data.load import load_images
from ddim_jax.data.source import ArraySource

UINT8 = np.zeros((3, 4, 4, 3), np.uint8)


# Arrays, digits and .npz files


def test_digits_are_sklearns():
    from sklearn.datasets import load_digits

    digits = load_images("digits", split="all")
    assert len(digits) == 1797 and digits.image_shape == (8, 8, 1) and digits.num_classes == 10
    batch = digits.take(np.arange(1797))
    np.testing.assert_allclose(
        batch["image"][..., 0] / 255, load_digits().images / 16, atol=0.5 / 255
    )
    np.testing.assert_array_equal(batch["label"], load_digits().target)
    with pytest.raises(ValueError, match=r"\['all', 'test', 'train'\] for digits; got 'both'"):
        load_images("digits", split="both")


def test_the_digits_test_is_no_part_of_train():
    train, test, both = (load_images("digits", split=s) for s in ("train", "test", "all"))
    assert (len(train), len(test)) == (1437, 360)
    for key in ("image", "label"):
        parts = [source.take(np.arange(len(source)))[key] for source in (train, test)]
        np.testing.assert_array_equal(np.concatenate(parts), both.take(np.arange(1797))[key])
    assert content_of(train) != content_of(both) == content_of(load_images("digits", split="all"))


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 1), (5, 4, 3, 3)])
def test_npz(tmp_path, keys, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **{keys[0]: images, keys[1]: np.array([0, 2, 1, 0, 2])})
    source = load_images(str(path))
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
        load_images(str(path))
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
            load_images(str(path))
    with path.open("wb") as file:
        np.save(file, UINT8)  # a .npy under another name
    with pytest.raises(ValueError, match=r"set\.npz cannot be read"):
        load_images(str(path))
    with pytest.raises(ValueError, match=r"none\.npz does not exist"):
        load_images(str(tmp_path / "none.npz"))


def test_npy(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    np.save(tmp_path / "set.npy", images)
    source = load_images(str(tmp_path / "set.npy"))
    assert source.image_shape == (4, 3, 1) and source.num_classes is None
    np.testing.assert_array_equal(source.images[..., 0], images)
    np.savez(tmp_path / "set.npz", images=images)
    assert content_of(source) == content_of(load_images(str(tmp_path / "set.npz")))
    whole = (tmp_path / "set.npy").read_bytes()
    pickled = np.array([None, "x"], object).dumps()
    for content in (whole[:-1], whole + b"x", whole[:4], b"", b"no array", pickled):
        (tmp_path / "set.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"set\.npy cannot be read as images"):
            load_images(str(tmp_path / "set.npy"))


def test_a_reference_batch_of_guided_diffusion_is_its_images(tmp_path):
    path = tmp_path / "VIRTUAL_cifar10.npz"
    moments = {"mu": np.zeros(8), "sigma": np.eye(8), "mu_s": np.zeros(8), "sigma_s": np.eye(8)}
    np.savez(path, arr_0=UINT8 + 7, **moments)
    source = load_images(str(path))
    np.testing.assert_array_equal(source.images, UINT8 + 7)
    assert source.num_classes is None


@pytest.mark.parametrize(
    "name, arrays, words",
    [
        ("stats.npz", dict(mu=np.zeros(4), sigma=np.eye(4)), "it has .*feature statistics"),
        ("act.npz", dict(pool_3=np.zeros((9, 4)), spatial=np.eye(4)), "features of images"),
        ("arr.npz", dict(arr_0=np.zeros((9, 4))), r"\(9, 4\), which look like the features of 9"),
        ("set.zip", None, "is an archive. Unpack it into a folder of images"),
        ("set.tar.gz", None, "is an archive. Unpack it"),
        ("one.png", None, "is one image. Give the folder"),
        ("set.h5", None, r"is neither. Write its images to a folder, or with np\.savez"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused_by_what_it_is(tmp_path, name, arrays, words):
    path = tmp_path / name
    path.write_bytes(b"")
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words) as error:
        load_images(str(path))
    assert str(path) in str(error.value)


def test_labels_and_num_classes_come_together():
    with pytest.raises(ValueError, match="labels and num_classes come together"):
        ArraySource(UINT8, np.zeros(3, int))


# Sizes


def test_resize_is_the_torchvision_one():
    """Resize(6), CenterCrop(6) of torchvision: short side to 6, long side int(6 * 17 / 12) = 8."""
    ramp = np.arange(17, dtype=np.float64) * 15
    image = PIL.Image.fromarray(np.tile(np.uint8(ramp), (12, 1)))
    got = np.asarray(resize_and_crop(image, 6))
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
    resize_and_crop(PIL.Image.new("L", size), side)
    assert sorted(made[0]) == [side, long]


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (7, 7), (100, 99)])
def test_any_size_becomes_the_size_wanted(size):
    image = PIL.Image.new("RGB", size, (10, 20, 30))
    for side in (1, 7, 32, 64):
        got = np.asarray(resize_and_crop(image, side))
        np.testing.assert_array_equal(got, np.broadcast_to(np.uint8([10, 20, 30]), (side, side, 3)))


def test_image_size_resizes_arrays_channel_by_channel():
    source = load_images("digits", image_size=16)
    assert source.image_shape == (16, 16, 1) and len(source) == 1437
    small = load_images("digits")
    means = [np.mean(s.take(np.arange(1437))["image"], axis=(1, 2, 3)) for s in (source, small)]
    np.testing.assert_allclose(*means, atol=6)
    assert load_images("digits", image_size=8).image_shape == (8, 8, 1)
    with pytest.raises(ValueError, match="image_size must be at least 1; got 0"):
        load_images("digits", image_size=0)
