import shutil

import numpy as np
import PIL.ExifTags
import PIL.features
import PIL.Image
import pytest

from ddim_jax.data.content import content_of
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


# What a folder may hold beside plain files


def images_of(path, **options):
    source = load_images(str(path), **options)
    return source.take(np.arange(len(source)))["image"], source


def test_links_are_followed_with_the_labels_of_plain_folders(tmp_path):
    """cat, dog and fox, fox and half of dog by a link: the same images under the same labels."""
    rng = np.random.default_rng(0)
    plain, linked, elsewhere = (tmp_path / name for name in ("plain", "linked", "elsewhere"))
    for name in ("cat/1", "dog/1", "dog/more/2", "fox/1"):
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        save(pixels, plain / f"{name}.png")
        save(pixels, (linked if name in ("cat/1", "dog/1") else elsewhere) / f"{name}.png")
    (linked / "fox").symlink_to(elsewhere / "fox", target_is_directory=True)
    (linked / "dog" / "more").symlink_to(elsewhere / "dog" / "more", target_is_directory=True)
    (tmp_path / "root").symlink_to(linked, target_is_directory=True)
    want, one = images_of(plain)
    for folder in (linked, tmp_path / "root"):
        got, other = images_of(folder)
        np.testing.assert_array_equal(got, want)
        assert other.labels.tolist() == one.labels.tolist() == [0, 1, 1, 2]
        assert content_of(other) == content_of(one)


def test_a_link_to_a_folder_above_is_no_endless_loop_and_is_said(tmp_path, capsys):
    save(PIXELS, tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert len(load_images(str(tmp_path))) == 1
    assert "passed over 1 links to a folder above" in capsys.readouterr().out


def test_what_is_transparent_is_laid_over_white_and_counted(tmp_path, capsys):
    """alpha x + (1 - alpha) 255, for RGBA, grey with alpha, a palette and a transparent colour."""
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (6, 6, 3), np.uint8), rng.integers(0, 256, (6, 6, 1))
    alpha[0], alpha[1] = 0, 255
    rgba = np.concatenate([colour, alpha.astype(np.uint8)], axis=-1)
    over = np.float64(alpha) / 255
    save(rgba, tmp_path / "colour" / "1.png")
    save(colour, tmp_path / "colour" / "2.png")
    got, _ = images_of(tmp_path / "colour")
    np.testing.assert_allclose(got[0], over * colour + (1 - over) * 255, atol=1)
    assert (got[0, 0] == 255).all() and (got[0, 1] == colour[1]).all()
    assert "1 images with transparency are laid over white" in capsys.readouterr().out
    save(rgba[..., [0, 3]], tmp_path / "grey" / "1.png")
    got, source = images_of(tmp_path / "grey")
    assert source.image_shape == (6, 6, 1)
    np.testing.assert_allclose(got[0], over * colour[..., :1] + (1 - over) * 255, atol=1)
    (tmp_path / "palette").mkdir()
    palette = PIL.Image.fromarray(np.uint8([[0, 1]]), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette" / "1.png", transparency=0)
    PIL.Image.fromarray(np.uint8([[[1, 2, 3], [40, 50, 60]]])).save(
        tmp_path / "palette" / "2.png", transparency=(1, 2, 3)
    )
    for image in images_of(tmp_path / "palette")[0]:
        assert image.tolist() == [[[255] * 3, [40, 50, 60]]]


def test_every_page_of_a_tiff_is_an_image_but_no_thumbnail(tmp_path, capsys):
    pages = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
    first, *others = map(PIL.Image.fromarray, pages[:3])
    thumbnail = others[-1]
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}  # a reduced version of another page
    (tmp_path / "a").mkdir()
    first.save(tmp_path / "a" / "1.tif", save_all=True, append_images=others)
    save(pages[3], tmp_path / "b" / "2.png")
    got, source = images_of(tmp_path)
    np.testing.assert_array_equal(got, pages[[0, 1, 3]])
    assert source.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(load_images(str(tmp_path), in_memory=False)[1]["image"], pages[1])
    assert "2 images are the pages of 1 TIFF files" in capsys.readouterr().out


def test_jfif_and_avif_are_read(tmp_path):
    ramp = np.uint8(np.linspace(0, 255, 32 * 32)).reshape(32, 32, 1).repeat(3, -1)
    formats = {"1.jfif": "JPEG", "2.jpe": "JPEG"}
    formats |= {"3.AVIF": "AVIF"} if PIL.features.check("avif") else {}
    for name, kind in formats.items():
        save(ramp, tmp_path / name, format=kind)
    got, _ = images_of(tmp_path)
    assert len(got) == len(formats)
    np.testing.assert_allclose(got, np.broadcast_to(ramp, got.shape), atol=8)


def test_images_that_pillow_cannot_read_are_refused_by_kind(tmp_path, monkeypatch):
    save(PIXELS, tmp_path / "1.png")
    for name in ("a.heic", "b.HEIC", "c.avif"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(PIL.Image, "registered_extensions", dict)
    with pytest.raises(ValueError, match=r"does not read: 1 \.avif, 2 \.heic, .*a\.heic is one"):
        load_images(str(tmp_path))


def test_what_is_passed_over_is_said_by_kind(tmp_path, capsys):
    save(PIXELS, tmp_path / "1.png")
    still, moved = PIL.Image.fromarray(PIXELS), PIL.Image.fromarray(255 - PIXELS)
    still.save(tmp_path / "2.gif", save_all=True, append_images=[moved])
    for name in ("a.txt", "b.TXT", "c.json", "Thumbs", ".hidden"):
        (tmp_path / name).write_text("")
    got, _ = images_of(tmp_path)
    assert len(got) == 2 and not got.any()
    said = capsys.readouterr().out
    assert "passed over 1 without a suffix, 1 .json, 2 .txt\n" in said
    assert "the first picture is taken of 1 animations" in said
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.gif").unlink()
    with pytest.raises(ValueError, match=r"has no image in it or below it, but 1 without a suffix"):
        load_images(str(tmp_path))
    assert not capsys.readouterr().out


def test_content_is_of_names_sizes_and_bytes_and_not_of_the_place(tmp_path):
    """A copy is the same; a name, a byte of an uncompressed file, or a class changes it."""
    one = tmp_path / "one"
    for name in ("a/1.bmp", "a/2.bmp", "b/3.bmp"):
        save(PIXELS, one / name)
    content = content_of(load_images(str(one)))
    assert content == content_of(load_images(str(one), in_memory=False))
    changes = {
        "copy": lambda there: None,
        "renamed": lambda there: (there / "a/1.bmp").rename(there / "a/0.bmp"),
        "class": lambda there: (there / "b").rename(there / "c"),
        "pixels": lambda there: save(PIXELS + 1, there / "a/2.bmp"),
        "more": lambda there: save(PIXELS, there / "b/4.bmp"),
    }
    for name, change in changes.items():
        there = shutil.copytree(one, tmp_path / name)
        change(there)
        assert (content_of(load_images(str(there))) == content) == (name == "copy"), name
