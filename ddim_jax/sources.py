"""Where images come from: arrays, .npz files, folders, scikit-learn's digits, TFDS sets by name.

A source has a length, and its item i is {"image": uint8 (H, W, C)[, "label": int32 ()]}. Arrays
live in memory; the others decode an image each time it is asked for, and `decoded` turns them into
arrays. Everything that can be wrong with a set is a ValueError that names it, when it is opened if
that is cheap, else when the image is read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from jaxtyping import Int, UInt8

Example: TypeAlias = dict[str, np.ndarray]
"""One example or one batch: "image" uint8 (..., H, W, C) and, where there are classes, "label"."""


@runtime_checkable
class ImageSource(Protocol):
    """Random access to images of one size. Must pickle, for decoding in other processes."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # noqa: D102

    @property
    def num_classes(self) -> int | None: ...  # noqa: D102

    def __len__(self) -> int: ...  # noqa: D105

    def __getitem__(self, index: int, /) -> Example: ...  # noqa: D105


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory: uint8 (N, H, W, C) with C in 1..4, and one label below num_classes each."""

    # Checked below, for users too; so no shape here, which only tests would check, and earlier.
    images: np.ndarray
    labels: np.ndarray | None = None
    name: str = "array"
    num_classes: int | None = None

    def __post_init__(self):  # noqa: D105
        images, labels = self.images, self.labels
        if images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8, 0 to 255; {self.name} has {images.dtype}. From floats in "
                "[-1, 1]: ddim_jax.data.to_uint8(x); from floats in [0, 1]: to_uint8(2 * x - 1)."
            )
        if images.ndim != 4 or images.shape[-1] > 4 or 0 in images.shape:
            raise ValueError(
                "images must have shape (N, H, W, C), none of them 0 and C at most 4; "
                f"{self.name} has shape {images.shape}. From (N, C, H, W): "
                "images.transpose(0, 2, 3, 1)."
            )
        if (labels is None) != (self.num_classes is None):
            raise ValueError(f"labels and num_classes come together; {self.name} has one of them.")
        if labels is None or self.num_classes is None:
            return
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be integers of shape ({len(images)},), one for each image; "
                f"{self.name} has {labels.dtype} of shape {labels.shape}."
            )
        if not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}), num_classes; {self.name} has labels "
                f"{labels.min()} to {labels.max()}."
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:  # noqa: D102
        return self.images.shape[1:]

    def __len__(self) -> int:  # noqa: D105
        return len(self.images)

    def __getitem__(self, index: int) -> Example:  # noqa: D105
        return self.take(index)

    def take(self, indices: Int[np.ndarray, "B"] | int) -> Example:
        """The batch of these examples."""
        label = None if self.labels is None else self.labels[indices]
        return _example(self.images[indices], label)

    def resized(self, size: int) -> ArraySource:
        """The same with square images of that side; see `resize_and_crop`."""
        if self.image_shape[:2] == (size, size):
            return self

        def resize(channel: np.ndarray) -> np.ndarray:
            return np.asarray(resize_and_crop(PIL.Image.fromarray(channel), size))

        channels_first = np.moveaxis(self.images, -1, 1)
        images = np.stack([np.stack([*map(resize, image)], axis=-1) for image in channels_first])
        return dataclasses.replace(self, images=images)


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
        with _opened(path, path) as image:
            pixels = _pixels(PIL.ImageOps.exif_transpose(image), self.image_shape)
        return _example(pixels, None if self.labels is None else self.labels[index])


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """A prepared TFDS set in array_record files, decoded when asked for, without TensorFlow."""

    records: Any  # records[i] is a tf.train.Example message; its "image" is a PNG or JPEG file
    name: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom

    def __len__(self) -> int:  # noqa: D105
        return len(self.records)

    def __getitem__(self, index: int) -> Example:  # noqa: D105
        # Parsed here, since TFDS's own parser takes a third of the time that small images need.
        features = _record_message().FromString(self.records[index]).features.feature
        file = io.BytesIO(features["image"].bytes_list.value[0])
        with _opened(file, f"record {index} of {self.name}") as image:
            pixels = _pixels(image.crop(self.crop) if self.crop else image, self.image_shape)
        labelled = self.num_classes is not None
        return _example(pixels, features["label"].int64_list.value[0] if labelled else None)


@functools.cache
def _record_message() -> Any:
    return importlib.import_module("tensorflow_datasets.proto").tf_example_pb2.Example


def decoded(source: ImageSource) -> ArraySource:
    """The same source in memory, as one array."""
    images = np.empty((len(source), *source.image_shape), np.uint8)
    labels = None if source.num_classes is None else np.empty(len(source), np.int32)

    def decode(span: range) -> None:
        for index in span:
            example = source[index]
            images[index] = example["image"]
            if labels is not None:
                labels[index] = example["label"]

    spans = [range(len(source))[start : start + 256] for start in range(0, len(source), 256)]
    with decoding_threads() as pool:
        for _ in pool.map(decode, spans):
            pass  # an error of a thread is raised here
    return ArraySource(images, labels, source.name, source.num_classes)


def decoding_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads for decoding: PIL works outside the interpreter's lock, what is around it does not.

    So more than a few threads only wait for each other.
    """
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))


# ---------------------------------------------------------------------------------------------
# Pixels


def resize_and_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The centre (size, size) square after scaling the short side to `size`.

    Bilinear with antialiasing, and rounded as torchvision's Resize and CenterCrop round, which is
    what the paper's code prepares CelebA and LSUN with.
    """
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


@contextlib.contextmanager
def _opened(file: str | io.BytesIO, name: str) -> Iterator[PIL.Image.Image]:
    try:
        with PIL.Image.open(file) as image:
            yield image
    # What PIL raises for a truncated or foreign file; SyntaxError is its word for a broken PNG.
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} cannot be read as an image ({error}). Remove it or replace it."
        ) from error


def _pixels(image: PIL.Image.Image, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "H W C"]:
    height, width, channels = shape
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = resize_and_crop(image, height)
    return np.asarray(image).reshape(shape)


def _example(pixels: np.ndarray, label: Any) -> Example:
    example = {"image": pixels}
    if label is not None:
        example["label"] = np.asarray(label, np.int32)
    return example


# ---------------------------------------------------------------------------------------------
# Digits, and a .npz file


def digits(split: str = "train") -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8x8, with labels.

    "train" is all of them; "test", the last 360, is NOT held out from it.
    """
    check_split(split, ("train", "test"), "digits")
    stored = import_extra("sklearn.datasets", "for the digits").load_digits()
    images = np.round(stored.images * (255 / 16)).astype(np.uint8)[..., None]  # stored as 0..16
    rows = slice(None) if split == "train" else slice(-360, None)
    return ArraySource(images[rows], stored.target[rows], "digits", 10)


def npz_file(path: str | os.PathLike[str]) -> ArraySource:
    """The uint8 (N, H, W[, C]) called "images", "x" or "arr_0" in a .npz file.

    Integers called "labels", "y" or "arr_1" are its labels.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of a .npz file of uint8 images.")
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("not a whole zip archive")
        with np.load(path, allow_pickle=False) as file:
            images = _first(file, ("images", "x", "arr_0"))
            labels = _first(file, ("labels", "y", "arr_1"))
            names = file.files
    # What NumPy raises for truncated, damaged and pickled content.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as a .npz file of plain arrays ({error}). Copy it again, or "
            "write it with np.savez(path, images=images)."
        ) from error
    if images is None:
        raise ValueError(
            f'{path} must hold the images under "images", "x" or "arr_0"; it has {names}. '
            "Write it with np.savez(path, images=images)."
        )
    if images.ndim == 3:
        images = images[..., None]
    num_classes = None
    if labels is not None:  # those that are no numbers are ArraySource's to refuse
        numbers = np.issubdtype(labels.dtype, np.number)
        num_classes = int(labels.max(initial=0)) + 1 if numbers else 1
    return ArraySource(images, labels, str(path), num_classes)


def _first(arrays: np.lib.npyio.NpzFile, names: Sequence[str]) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)


# ---------------------------------------------------------------------------------------------
# A folder

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


def image_folder(path: str | os.PathLike[str], image_size: int | None = None) -> FolderSource:
    """The image files below a folder, in the order of their names.

    Grey if all files are, else RGB (transparency is dropped, photos are turned upright). The top
    subfolders are the classes, unless a file lies in none. Without `image_size` all files must
    have one size; with it they become squares, see `resize_and_crop`.
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
    with _opened(path, path) as image:
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


# ---------------------------------------------------------------------------------------------
# TFDS

CELEB_A_CROP = (25, 57, 153, 185)  # left, top, right, bottom: the paper's 128x128 of 178x218
DEFAULT_SIZES = {"celeb_a": 64, "lsun": 256}


def tfds_set(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> RecordSource:
    """A TFDS set prepared as array_record, read without TensorFlow.

    celeb_a has the paper's crop, and 64 for its size if none is given; lsun has 256. Other sets
    keep their size, or are squares of `image_size`; see `resize_and_crop`.
    """
    tfds = import_extra("tensorflow_datasets", f"for the data set {name!r}")
    data_dir = None if data_dir is None else str(pathlib.Path(data_dir).expanduser())
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:  # not found; a version that is not offered
        near = difflib.get_close_matches(name, ["digits", *_tfds_names(tfds, name)])
        raise ValueError(
            f"name must be digits, a .npz file, a folder of images or a TFDS name; got {name!r}"
            + (
                f", perhaps you meant {' or '.join(near)}."
                if near
                else ", which is no such name, and no file or folder of that name exists."
            )
        ) from error
    prepare = (
        f"pip install 'ddim_jax[prepare]' && python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}, data_dir={data_dir!r}, file_format='array_record')"
        '.download_and_prepare()"'
    )
    if not builder.is_prepared():
        raise ValueError(
            f"{name} is not prepared in {builder.data_path}. If it stands elsewhere, give its "
            f"data_dir; else prepare it once with\n  {prepare}\nor give a .npz or a folder of "
            f"images (./{name} if that is its name)."
        )
    features = dict(builder.info.features)
    image: Any = features.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(
            f'{name} must have a feature "image" of uint8 images; it has {features}. '
            "Write what you need of it to a folder or .npz of images."
        )
    check_split(re.split(r"[\[+]", split)[0], builder.info.splits, name)
    if builder.info.splits[split].num_examples == 0:
        raise ValueError(f"split must have at least one image; {split!r} of {name} has none.")
    try:
        records = builder.as_data_source(split).data_source  # undecoded
    except NotImplementedError as error:
        raise ValueError(
            f"{name} in {builder.data_path} is stored as {builder.info.file_format.value}, which "
            f"only TensorFlow reads. Prepare it as array_record, in another data_dir:\n  {prepare}"
        ) from error
    height, width, channels = image.shape
    size = DEFAULT_SIZES.get(builder.name) if image_size is None else image_size
    if size is not None:
        height = width = size
    elif height is None or width is None:
        raise ValueError(f"{name} has images of several sizes; give image_size, such as 64.")
    label: Any = features.get("label")
    return RecordSource(
        records,
        name=f"{builder.info.full_name}:{split}",
        image_shape=(height, width, channels),
        num_classes=label.num_classes if isinstance(label, tfds.features.ClassLabel) else None,
        crop=CELEB_A_CROP if builder.name == "celeb_a" else None,
    )


def is_tfds_name(name: str) -> bool:
    """Whether TFDS knows a set of this name; False where TFDS is not installed."""
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ModuleNotFoundError:
        return False
    return re.split("[/:]", name)[0] in tfds.list_builders(with_community_datasets=False)


def _tfds_names(tfds: Any, near: str) -> list[str]:
    """All sets, and the configurations of the one that `near` starts with."""
    names = tfds.list_builders(with_community_datasets=False)
    first = re.split("[/:]", near)[0]
    if first not in names:
        return names
    return names + [f"{first}/{config}" for config in tfds.builder_cls(first).builder_configs]


# ---------------------------------------------------------------------------------------------


def check_split(split: str, valid: Iterable[str], name: str) -> None:
    """Raise ValueError unless `split` is one of those that the set called `name` has."""
    if split not in valid:
        raise ValueError(f"split must be one of {sorted(valid)} for {name}; got {split!r}.")


def import_extra(module: str, purpose: str) -> Any:
    """A module that only some uses need, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is needed {purpose}: pip install 'ddim_jax[experiments]'"
        ) from error
