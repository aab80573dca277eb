"""A folder of image files."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.ImageOps
from jaxtyping import Int

from ddim_jax.data.images import opened, pixels_of
from ddim_jax.data.source import Example, decoding_threads, make_example

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files, decoded when asked for."""

    paths: tuple[str, ...]
    labels: Int[np.ndarray, "N"] | None
    name: str
    image_shape: tuple[int, int, int]
    num_classes: int | None

    def __len__(self) -> int:  # noqa: D105
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:  # noqa: D105
        path = self.paths[index]
        with opened(path, path) as image:
            pixels = pixels_of(PIL.ImageOps.exif_transpose(image), self.image_shape)
        return make_example(pixels, None if self.labels is None else self.labels[index])


def image_folder(path: str | os.PathLike[str], image_size: int | None = None) -> FolderSource:
    """The image files below a folder, in the order of their names.

    Grey if all files are, else RGB (transparency is dropped, photos are turned upright). The top
    subfolders are the classes, unless a file lies in none. Without `image_size` all files must
    have one size; with it they become squares, see `images.resize_and_crop`.
    """
    path = pathlib.Path(path)
    relative = sorted(file.relative_to(path) for file in path.rglob("*"))
    files = [
        file
        for file in relative
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.parts)
    ]
    if not files:
        raise ValueError(
            f"{path} has no image in it or below it. Files that count end in "
            f"{' '.join(IMAGE_SUFFIXES)}, and neither they nor their folders start with a dot."
        )
    paths = tuple(str(path / file) for file in files)
    with decoding_threads() as pool:
        headers = dict(zip(paths, pool.map(_header, paths), strict=True))

    deep = [file for file, header in headers.items() if header.mode[0] in "IF"]
    if deep:
        raise ValueError(
            f"images must have 8 bits a channel; {len(deep)} of {len(paths)} in {path} have more, "
            f"{deep[0]} is one. Convert them, choosing what becomes black and white."
        )
    if image_size is None:
        width, height = _one_size(path, headers)
    else:
        width = height = image_size
    grey = all(header.mode in ("1", "L", "LA") for header in headers.values())
    labels, num_classes = _folder_labels(files)
    shape = (height, width, 1 if grey else 3)
    return FolderSource(paths, labels, str(path), shape, num_classes)


class _Header(NamedTuple):
    size: tuple[int, int]  # width, height as seen
    mode: str  # PIL's


def _header(path: str) -> _Header:
    with opened(path, path) as image:
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) > 1:
            image = PIL.ImageOps.exif_transpose(image)
        return _Header(image.size, image.mode)


def _one_size(path: pathlib.Path, headers: dict[str, _Header]) -> tuple[int, int]:
    """The width and height of all files."""
    sizes = collections.Counter(header.size for header in headers.values())
    if len(sizes) > 1:
        example = {header.size: file for file, header in headers.items()}
        listing = "; ".join(
            f"{width}x{height}: {count}, {example[width, height]} is one"
            for (width, height), count in sizes.most_common(3)
        )
        raise ValueError(
            f"images of a folder must have one size, or image_size must be given to scale and crop "
            f"them; {path} has {len(sizes)} sizes (width x height): {listing}."
        )
    return next(iter(sizes))


def _folder_labels(files: Sequence[pathlib.Path]) -> tuple[np.ndarray | None, int | None]:
    """The place of each file's top subfolder among their sorted names; None if a file has none."""
    if any(len(file.parts) == 1 for file in files):
        return None, None
    classes, labels = np.unique([file.parts[0] for file in files], return_inverse=True)
    return labels.astype(np.int32), len(classes)
