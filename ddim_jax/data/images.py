"""Image files: opened, decoded, and brought to one size, by PIL."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from ddim_jax.checks import check_count, check_is
from ddim_jax.data.content import content_of
from ddim_jax.data.crops import Crop
from ddim_jax.data.source import ArraySource

MAX_PIXELS = 2**26
"""Of one image: some formats pack gigabytes of one colour into a thousand bytes."""


@contextlib.contextmanager
def opened(file: str | io.BytesIO, name: str) -> Iterator[PIL.Image.Image]:
    """The image in a file; what fails in the block too is a ValueError, which calls it `name`."""
    # A pipe would be waited for.
    if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
        raise ValueError(f"{name} is no file that could hold an image. Remove it.")
    try:
        with PIL.Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(
                    f"it claims {image.width} x {image.height} pixels, above {MAX_PIXELS}"
                )
            yield image
    except MemoryError:
        raise
    # Damage reaches PIL's readers anywhere: they raise a dozen kinds and promise none.
    except Exception as error:
        if isinstance(error, ValueError) and name in str(error):
            raise  # said already
        why = "it is of no known kind" if "BytesIO object" in str(error) else error
        raise ValueError(
            f"{name} cannot be read as an image ({why}). Remove it or replace it."
        ) from error


LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
"""PIL's names of formats that change pixels, as a rule."""


def shows_compression(format: str | None, size: tuple[int, int], side: int) -> bool:
    """Whether an image of a format, by PIL's name, shows that once its short side is `side`.

    Scaling down by a half, say, averages away what a JPEG file adds.
    """
    return format in LOSSY and min(size) < 1.5 * side


def resize_and_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The centre (size, size) square after scaling the short side to `size`.

    Bilinear with antialiasing, and rounded as torchvision's Resize and CenterCrop round, which is
    what the paper's code prepares CelebA and LSUN with.
    """
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def is_transparent(image: PIL.Image.Image) -> bool:
    """Whether the image has a channel or a colour of transparency."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def over_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """The RGB image as a page shows it: what is transparent hides its colour."""
    page = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")


def pixels_of(image: PIL.Image.Image, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "H W C"]:
    """The pixels of an image as `shape`: grey or RGB, and of another size resized and cropped.

    What is transparent is laid over white.
    """
    height, width, channels = shape
    mode = "L" if channels == 1 else "RGB"
    if is_transparent(image):
        image = over_white(image)
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = resize_and_crop(image, height)
    return np.asarray(image).reshape(shape)


def cropped(source: ArraySource, crop: Crop) -> ArraySource:
    """The same with that part of each image. Raises ValueError for images of another size."""
    check_is("source", source, ArraySource, "an ArraySource")
    height, width = source.image_shape[:2]
    crop.check_size((width, height), source.name)
    left, top, right, bottom = crop.box
    images = source.images[:, top:bottom, left:right]
    facts = {**source.facts, **crop.facts()}
    return dataclasses.replace(source, images=images, facts=facts, content=content_of(source))


def resized(source: ArraySource, size: int) -> ArraySource:
    """The same with square images of that side, channel by channel; see `resize_and_crop`."""
    check_is("source", source, ArraySource, "an ArraySource")
    check_count("size", size)
    if source.image_shape[:2] == (size, size):
        return source

    def resize(channel: np.ndarray) -> np.ndarray:
        return np.asarray(resize_and_crop(PIL.Image.fromarray(channel), size))

    channels_first = np.moveaxis(source.images, -1, 1)
    images = np.stack([np.stack([*map(resize, image)], axis=-1) for image in channels_first])
    return dataclasses.replace(source, images=images, content=content_of(source))
