"""A folder of image files."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from jaxtyping import Int

from ddim_jax.data.content import files_content
from ddim_jax.data.crops import Crop
from ddim_jax.data.images import is_transparent, opened, pixels_of, shows_compression
from ddim_jax.data.source import Example, decoding_threads, make_example
from ddim_jax.paths import local_path

# fmt: off
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".pbm", ".pgm", ".ppm", ".pnm",
)
# fmt: on
OPTIONAL_SUFFIXES = (".avif", ".heic", ".heif", ".jxl")
"""Images too, which only some versions of Pillow read, or its plug-ins."""
ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
"""PIL's names of formats that hold several pictures of one thing."""
REDUCED, MASK = 1, 4
"""Bits of TIFF's tag 254: a page that is no picture of its own."""


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files, decoded when asked for."""

    paths: tuple[str, ...]
    """One for each image: a TIFF file stands there once for each of its pages."""
    labels: Int[np.ndarray, "N"] | None
    name: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    pages: tuple[int, ...]
    """Which page of its file each image is."""
    content: str
    """See `content_of`."""
    notes: tuple[str, ...] = ()
    """What a user should know about what became of the files."""
    crop: Crop | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How the pixels came to be: see source.py."""

    def __len__(self) -> int:  # noqa: D105
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:  # noqa: D105
        path = self.paths[index]
        with opened(path, path) as image:
            if self.pages[index]:
                image.seek(self.pages[index])
            upright = PIL.ImageOps.exif_transpose(image)
            part = upright if self.crop is None else self.crop(upright, path)
            pixels = pixels_of(part, self.image_shape)
        return make_example(pixels, None if self.labels is None else self.labels[index])


def image_folder(
    path: str | os.PathLike[str], image_size: int | None = None, crop: Crop | None = None
) -> FolderSource:
    """The image files below a folder, in the order of their names; links are followed.

    Grey if all files are, else RGB. What is transparent is laid over white, photos are turned
    upright, every page of a TIFF file is an image, and of an animation the first picture is. The
    top subfolders are the classes, unless a file lies in none. Without `image_size` all files must
    have one size; with it they become squares, see `images.resize_and_crop`. With a `crop` they
    must have the size it is for, and that part becomes the square, of the crop's own side without
    `image_size`.
    """
    path = local_path(path, "data", "folder")
    found = _find(path)
    if not found.images:
        raise ValueError(
            f"{path} has no image in it or below it{_but(found.others)}."
            f"{_lmdb(found.others)} Files that count end in "
            f"{' '.join(_readable())}, and neither they nor their folders start with a dot."
        )
    with decoding_threads() as pool:
        headers = list(pool.map(_headers, (str(path / file) for file in found.images)))
    files = [file for file, pages in zip(found.images, headers, strict=True) for _ in pages]
    pages = [page for of_file in headers for page in of_file]
    paths = tuple(str(path / file) for file in files)

    deep = [file for file, page in zip(paths, pages, strict=True) if page.mode[0] in "IF"]
    if deep:
        raise ValueError(
            f"images must have 8 bits a channel; {len(deep)} of {len(paths)} in {path} have more, "
            f"{deep[0]} is one. Convert them, choosing what becomes black and white."
        )
    if crop is not None:
        for file, page in zip(paths, pages, strict=True):
            crop.check_size(page.size, file)
        width = height = image_size or crop.default_size
    elif image_size is None:
        width, height = _one_size(path, paths, pages)
    else:
        width = height = image_size
    grey = all(page.mode in ("1", "L", "LA") for page in pages)
    labels, num_classes = _folder_labels(files)
    return FolderSource(
        paths,
        labels,
        str(path),
        (height, width, 1 if grey else 3),
        num_classes,
        tuple(page.number for page in pages),
        files_content(path, found.images),
        tuple(_notes(found, headers)),
        crop,
        _facts(pages, min(height, width), crop),
    )


# ---------------------------------------------------------------------------------------------
# Which files


class _Found(NamedTuple):
    images: list[pathlib.Path]  # below the folder, in order
    others: collections.Counter[str]  # suffix -> files that are no images
    loops: list[str]  # folders that are links to a folder above them


def _find(folder: pathlib.Path) -> _Found:
    loops: list[str] = []
    files = sorted(pathlib.Path(f).relative_to(folder) for f in _walk(str(folder), (), loops))
    readable = _readable()
    unread = [file for file in files if file.suffix.lower() in set(OPTIONAL_SUFFIXES) - {*readable}]
    if unread:
        kinds = _counted(collections.Counter(file.suffix.lower() for file in unread))
        raise ValueError(
            f"{folder} has images that the installed Pillow {PIL.__version__} does not read: "
            f"{kinds}, {folder / unread[0]} is one. Convert them to PNG (Pillow 11.3 and later "
            "read .avif), or move them away."
        )
    images = [file for file in files if file.suffix.lower() in readable]
    others = collections.Counter(
        f.suffix.lower() for f in files if f.suffix.lower() not in readable
    )
    return _Found(images, others, loops)


def _readable() -> tuple[str, ...]:
    known = PIL.Image.registered_extensions()
    return (*IMAGE_SUFFIXES, *(suffix for suffix in OPTIONAL_SUFFIXES if suffix in known))


def _walk(folder: str, above: tuple[str, ...], loops: list[str]) -> Iterator[str]:
    """The files below a folder, those behind links too; none whose name starts with a dot."""
    real = os.path.realpath(folder)
    if real in above:
        loops.append(folder)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, (*above, real), loops)
            else:
                yield entry.path


def _notes(found: _Found, headers: Sequence[Sequence[_Page]]) -> Iterator[str]:
    """What is not as one may think, with counts."""
    if found.others:
        yield f"passed over {_counted(found.others)}"
    if found.loops:
        yield (
            f"passed over {len(found.loops)} links to a folder above them, {found.loops[0]} is one"
        )
    if many := [len(pages) for pages in headers if len(pages) > 1]:
        yield f"{sum(many)} images are the pages of {len(many)} TIFF files"
    if animated := sum(page.animated for pages in headers for page in pages):
        yield f"the first picture is taken of {animated} animations"
    if transparent := sum(page.transparent for pages in headers for page in pages):
        yield f"{transparent} images with transparency are laid over white"


def _counted(kinds: collections.Counter[str]) -> str:
    return ", ".join(
        f"{count} {kind or 'without a suffix'}" for kind, count in sorted(kinds.items())
    )


def _lmdb(others: collections.Counter[str]) -> str:
    return " Give one of its LMDB folders, such as LSUN's." if ".mdb" in others else ""


def _but(others: collections.Counter[str]) -> str:
    return f", but {_counted(others)}" if others else ""


# ---------------------------------------------------------------------------------------------
# What is in them


class _Page(NamedTuple):
    number: int
    size: tuple[int, int]  # width, height as seen
    mode: str  # PIL's
    transparent: bool
    animated: bool
    format: str | None  # PIL's


def _headers(path: str) -> list[_Page]:
    """The pictures in a file, none of them decoded: those of a TIFF file, else the first."""
    with opened(path, path) as image:
        if image.format != "TIFF":
            return [_page(image, 0)]
        pages = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            kind = image.tag_v2.get(254, 0)  # pyright: ignore[reportAttributeAccessIssue]
            if number == 0 or not kind & (REDUCED | MASK):
                pages.append(_page(image, number))
        return pages


def _page(image: PIL.Image.Image, number: int) -> _Page:
    transparent = is_transparent(image)
    animated = image.format in ANIMATIONS and getattr(image, "is_animated", False)
    kind = image.format  # which an image that was turned has not
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) > 1:
        image = PIL.ImageOps.exif_transpose(image)
    return _Page(number, image.size, image.mode, transparent, animated, kind)


def _facts(pages: Sequence[_Page], side: int, crop: Crop | None) -> dict[str, Any]:
    sizes = (page.size if crop is None else crop.size for page in pages)
    lossy = sum(shows_compression(p.format, s, side) for p, s in zip(pages, sizes, strict=True))
    return {"lossy_files": lossy} | (crop.facts() if crop else {})


def _one_size(path: pathlib.Path, files: Sequence[str], pages: Sequence[_Page]) -> tuple[int, int]:
    """The width and height of all images."""
    sizes = collections.Counter(page.size for page in pages)
    if len(sizes) > 1:
        example = {page.size: file for file, page in zip(files, pages, strict=True)}
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
