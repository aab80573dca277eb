import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from ddim_jax.data.folder import FolderSource
from ddim_jax.data.load import load_images

PIXELS = np.zeros((4, 4, 3), np.uint8)


def save(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path, **options)


def test_folder_in_sorted_order_whatever_the_format(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 6, 5, 3), np.uint8)
    for name, image in zip(["b.png", "a.bmp", "sub/z.PNG", "c.tiff"], images, strict=True):
        save(image, tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._b.png").write_text("what macOS leaves behind")
    source = load_images(str(tmp_path))
    assert source.name == str(tmp_path) and source.num_classes is None
    np.testing.assert_array_equal(source.take(np.arange(4))["image"], images[[1, 0, 3, 2]])
    streamed = load_images(str(tmp_path), in_memory=False)
    assert isinstance(streamed, FolderSource)
    for i in range(4):
        np.testing.assert_array_equal(streamed[i]["image"], images[[1, 0, 3, 2][i]])


def test_subfolders_are_classes(tmp_path):
    for name in ["dog/1.png", "cat/x/2.png", "cat/1.png"]:
        save(PIXELS, tmp_path / name)
    source = load_images(str(tmp_path))
    assert source.num_classes == 2
    assert [int(source[i]["label"]) for i in range(3)] == [0, 0, 1]


def test_grey_and_colour(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)
    save(grey, tmp_path / "1.png")
    assert load_images(str(tmp_path)).image_shape == (4, 4, 1)
    np.testing.assert_array_equal(load_images(str(tmp_path))[0]["image"][..., 0], grey)
    save(PIXELS, tmp_path / "2.png")
    mixed = load_images(str(tmp_path))
    assert mixed.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(mixed[0]["image"], np.repeat(grey[..., None], 3, -1))


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be seen turned clockwise by 90 degrees
    for suffix in ("png", "tiff"):
        save(pixels, tmp_path / suffix / f"1.{suffix}", exif=exif)
        source = load_images(str(tmp_path / suffix))
        np.testing.assert_array_equal(source[0]["image"], np.rot90(pixels, -1))


def test_mixed_sizes_are_refused_with_counts_or_resized(tmp_path):
    for i in range(3):
        save(np.full((8, 6, 3), 200, np.uint8), tmp_path / f"a{i}.png")
    save(np.full((9, 20, 3), 200, np.uint8), tmp_path / "wide.png")
    with pytest.raises(
        ValueError, match=r"6x8: 3, .*a2\.png is one; 20x9: 1, .*wide\.png"
    ) as error:
        load_images(str(tmp_path))
    assert "image_size" in str(error.value)
    source = load_images(str(tmp_path), image_size=4)
    np.testing.assert_array_equal(source.take(np.arange(4))["image"], np.full((4, 4, 4, 3), 200))


def test_folders_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"has no image.*\.png"):
        load_images(str(tmp_path))
    save(np.zeros((4, 4), np.uint16), tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"8 bits a channel; 1 of 1.*deep\.png"):
        load_images(str(tmp_path))
    (tmp_path / "deep.png").unlink()
    save(PIXELS, tmp_path / "good.png")
    with pytest.raises(ValueError, match="split must be one of"):
        load_images(str(tmp_path), split="test")


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
            load_images(str(tmp_path), in_memory=in_memory)[0]
