"""Grids and strips of images, as PNG and GIF files a person can see."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from ddim_jax.files import written_whole


def tile(
    images: UInt8[np.ndarray, "N H W C"], columns: int, gap: int = 1, background: int = 255
) -> UInt8[np.ndarray, "height width C"]:
    """The images as one picture, row by row, with `gap` pixels between them."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), background, np.uint8
    )
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return canvas


def beside(
    left: UInt8[np.ndarray, "H W C"], right: UInt8[np.ndarray, "H W2 C"], gap: int = 6
) -> UInt8[np.ndarray, "H width C"]:
    """Two pictures of one height, side by side."""
    space = np.full((left.shape[0], gap, left.shape[2]), 255, np.uint8)
    return np.concatenate([left, space, right], axis=1)


def enlarge(
    picture: UInt8[np.ndarray, "H W C"], shortest: int = 256
) -> UInt8[np.ndarray, "height width C"]:
    """The picture with each pixel repeated, so that its shorter side has `shortest` or more."""
    factor = max(1, -(-shortest // min(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def save_png(path: pathlib.Path, picture: UInt8[np.ndarray, "H W C"]) -> None:
    """Write a grey (C = 1) or colour (C = 3) picture."""
    _save(path, _to_pil(picture), "PNG")


def save_gif(
    path: pathlib.Path, frames: Sequence[UInt8[np.ndarray, "H W C"]], frame_ms: int
) -> None:
    """Write pictures of one size as an endless animation, `frame_ms` milliseconds each."""
    first, *others = map(_to_pil, frames)
    _save(path, first, "GIF", save_all=True, append_images=others, duration=frame_ms, loop=0)


def _save(path: pathlib.Path, image: PIL.Image.Image, kind: str, **options: Any) -> None:
    """Write the file, and its folder where there is none. A kill leaves no half of a picture."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as whole:
        whole.write(file.getvalue())


def _to_pil(picture: UInt8[np.ndarray, "H W C"]) -> PIL.Image.Image:
    return PIL.Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def save_grid(
    path: pathlib.Path, images: UInt8[np.ndarray, "N H W C"], columns: int | None = None
) -> None:
    """Write the images as one grid, as square as can be unless told otherwise."""
    columns = columns or max(1, round(len(images) ** 0.5))
    save_png(path, enlarge(tile(images, columns)))
