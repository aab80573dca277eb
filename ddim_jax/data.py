"""Images as uint8 on the host: where they come from, and in which order they are seen.

A source is anything with a length whose item i is {"image": uint8 (H, W, C)[, "label": int32 ()]}.
`load_images` makes one from a name. Sets that fit in memory live there as one array; larger ones
are decoded while they stream. Both give the same batches for the same seed, since the order is one
pure function: the example at position p of the stream (batch p // B, row p % B) is

    source[permutation(seed, p // N)[p % N]],    N = len(source),

so epochs follow each other without a dropped remainder, a batch may straddle two of them, and a
run resumes from its step count alone. Flips are not here: the train step does them on the device.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import io
import itertools
import os
import pathlib
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax.numpy as jnp
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from jaxtyping import Array, Float, Int, UInt8

Example: TypeAlias = dict[str, np.ndarray]
"""One example or one batch: "image" uint8 (..., H, W, C) and, where there are classes, "label"."""

MAX_BYTES_IN_MEMORY = 3 * 2**29
"""Sets of at most this many bytes once decoded, 1.5 GiB, are held in memory."""


@runtime_checkable
class ImageSource(Protocol):
    """Random access to images of one size; pickles, so that worker processes can hold it."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # noqa: D102

    @property
    def num_classes(self) -> int | None: ...  # noqa: D102

    def __len__(self) -> int: ...  # noqa: D105

    def __getitem__(self, index: int, /) -> Example: ...  # noqa: D105


# ---------------------------------------------------------------------------------------------
# Values on the device


def to_model_range(
    image: UInt8[Array, "*shape"] | UInt8[np.ndarray, "*shape"],
) -> Float[Array, "*shape"]:
    """The float32 images in [-1, 1] of uint8 ones: x / 127.5 - 1, no dequantisation."""
    # A sum of whole numbers, then one product: the ends are exact and jit changes no bit.
    return (2 * jnp.asarray(image, jnp.float32) - 255) * (1 / 255)


def to_uint8(x: Float[Array, "*shape"] | Float[np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """The uint8 images nearest to x in [-1, 1]; values outside are clipped.

    Rounds to nearest, so it inverts `to_model_range`. Tools that truncate instead give darker
    images and another Frechet distance.
    """
    levels = (jnp.asarray(x, jnp.float32) + 1) * 127.5
    return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)


# ---------------------------------------------------------------------------------------------
# Order and batches


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def shuffled_indices(
    num_examples: int, seed: int, positions: Int[np.ndarray, "B"]
) -> Int[np.ndarray, "B"]:
    """Which example stands at each position of the endless stream; see the module's top."""
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(num_examples, seed, int(epoch))[offsets[here]]
    return indices


def batches(
    source: ImageSource,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    num_workers: int = 0,
) -> Iterator[Example]:
    """Endless shuffled batches from step `start_step` on: this shard's rows of each global batch.

    `batch_size` is global; shard k of n gets rows [k B/n, (k + 1) B/n) of it, so the shards
    together give the same batch whatever n is (one shard for each process: jax.process_index()).
    Sources outside memory are decoded by grain, in `num_workers` processes, or in threads if 0.
    The same arguments give the same batches, so a run goes on from its step count alone.
    """
    if len(source) == 0:
        raise ValueError(f"source must have at least one image; {source.name} is empty.")
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index must be in [0, shard_count); got {shard_index} of {shard_count}."
        )
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(
            f"batch_size must be a positive multiple of shard_count, {shard_count}, the number of "
            f"processes; got {batch_size}."
        )
    for name, value in [("seed", seed), ("start_step", start_step), ("num_workers", num_workers)]:
        if value < 0:
            raise ValueError(f"{name} must be at least 0; got {value}.")

    rows = range(shard_index * (batch_size // shard_count), batch_size)[: batch_size // shard_count]
    stream = _Stream(source, batch_size, seed, start_step, rows)
    if isinstance(source, ArraySource):
        return map(stream.__getitem__, itertools.count())
    return _decoded_batches(stream, num_workers)


@dataclasses.dataclass(frozen=True)
class _Stream:
    """One shard's batches, numbered from 0 at start_step."""

    source: ImageSource
    batch_size: int  # of all shards together
    seed: int
    start_step: int
    rows: range  # this shard's, of each batch

    def __len__(self) -> int:
        return sys.maxsize  # endless

    def __getitem__(self, step: int) -> Example:
        positions = (self.start_step + step) * self.batch_size + np.asarray(self.rows)
        indices = shuffled_indices(len(self.source), self.seed, positions)
        if isinstance(self.source, ArraySource):
            return self.source.take(indices)
        return _stacked([self.source[int(index)] for index in indices])


def _stacked(examples: list[Example]) -> Example:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _decoded_batches(stream: _Stream, num_workers: int) -> Iterator[Example]:
    # Grain deals its items out to processes and puts them together in order, so its items must be
    # whole batches: batching after the deal would mix the order.
    grain = _import_extra("grain", "to stream images that do not fit in memory")
    ahead = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
    dataset = grain.MapDataset.source(stream).to_iter_dataset(ahead)
    if num_workers:
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():  # grain's processes read flags, and need no absl.app otherwise
            flags.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)


def sequential_batches(source: ImageSource, batch_size: int) -> Iterator[Example]:
    """Every image once, in the source's order; the last batch may be smaller. For statistics."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    spans = _spans(len(source), batch_size)
    if isinstance(source, ArraySource):
        return (source.take(np.asarray(span)) for span in spans)
    return _decoded_spans(source, spans)


def _spans(length: int, size: int) -> list[range]:
    return [range(length)[start : start + size] for start in range(0, length, size)]


def _decoded_spans(source: ImageSource, spans: Sequence[range]) -> Iterator[Example]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for span in spans:
            yield _stacked(list(pool.map(source.__getitem__, span)))


HostBatch = TypeVar("HostBatch")
DeviceBatch = TypeVar("DeviceBatch")


def prefetch_to_device(
    iterator: Iterable[HostBatch], put_fn: Callable[[HostBatch], DeviceBatch], size: int = 2
) -> Iterator[DeviceBatch]:
    """The same batches after `put_fn`, which was called up to `size` batches ahead.

    JAX's transfers return before they are done, so a batch already called for arrives while the
    device computes on the one before.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}.")
    batches = map(put_fn, iterator)
    ready = collections.deque(itertools.islice(batches, size))
    while ready:
        yield ready.popleft()
        ready.extend(itertools.islice(batches, 1))


# ---------------------------------------------------------------------------------------------
# Sources


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
        if labels is not None and (
            labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)
        ):
            raise ValueError(
                f"labels must be integers of shape ({len(images)},), one for each image; "
                f"{self.name} has {labels.dtype} of shape {labels.shape}."
            )
        if (labels is None) != (self.num_classes is None) or (
            labels is not None and not 0 <= labels.min() <= labels.max() < self.num_classes
        ):
            span = "none" if labels is None else f"{labels.min()} to {labels.max()}"
            raise ValueError(
                f"labels must lie in [0, num_classes), and both or none be given; {self.name} has "
                f"labels {span} and num_classes {self.num_classes}."
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
        if self.labels is None:
            return {"image": self.images[indices]}
        return {"image": self.images[indices], "label": np.asarray(self.labels[indices], np.int32)}


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

    records: Sequence[Any]  # mappings; "image" holds the bytes of a PNG or JPEG file
    name: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom

    def __len__(self) -> int:  # noqa: D105
        return len(self.records)

    def __getitem__(self, index: int) -> Example:  # noqa: D105
        record = self.records[index]
        with _opened(io.BytesIO(record["image"]), f"record {index} of {self.name}") as image:
            pixels = _pixels(image.crop(self.crop) if self.crop else image, self.image_shape)
        return _example(pixels, None if self.num_classes is None else record["label"])


def _example(pixels: np.ndarray, label: Any) -> Example:
    return (
        {"image": pixels}
        if label is None
        else {"image": pixels, "label": np.asarray(label, np.int32)}
    )


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


def resize_and_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The centre (size, size) square after scaling the short side to `size`.

    Bilinear with antialiasing, and rounded as torchvision's Resize and CenterCrop round, which is
    what the paper's code prepares CelebA and LSUN with.
    """
    scale = size / min(image.size)
    width, height = (max(size, int(scale * side)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


# ---------------------------------------------------------------------------------------------
# Named sets


def load_images(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    in_memory: bool | None = None,
) -> ImageSource:
    """The images called `name`.

    name: "digits" (scikit-learn's 1797 digits, 8x8, no download); a .npz file of uint8
      (N, H, W[, C]) under "images", "x" or "arr_0", with labels under "labels", "y" or "arr_1";
      a folder of images, one subfolder for each class or none; or a TFDS name such as "cifar10",
      "celeb_a" (cropped as in the paper, 64x64) or "lsun/bedroom" (256x256).
    split: TFDS's split, slices such as "train[:1000]" included. A file or a folder is all "train".
      The "test" digits, the last 360, are NOT held out from "train", which is all of them.
    data_dir: where TFDS sets stand; TFDS's own default if None.
    image_size: side of the images wanted, see `resize_and_crop`; None keeps theirs.
    in_memory: whether a folder or TFDS set is decoded now; None decides by MAX_BYTES_IN_MEMORY.

    Raises ValueError, naming the way out, for a set that is absent, empty, unreadable, or of mixed
    sizes without `image_size`.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1; got {image_size}.")
    path = pathlib.Path(name).expanduser()
    if name == "digits":
        source = _digits(split)
    elif path.suffix == ".npz":
        source = _npz(path, split)
    elif path.is_dir() and not _is_tfds_name(name):
        source = _folder(path, split, image_size)
    else:
        source = _tfds(name, split, data_dir, image_size)

    if isinstance(source, ArraySource):
        return source if image_size is None else _resized(source, image_size)
    num_bytes = len(source) * int(np.prod(source.image_shape))
    if num_bytes <= MAX_BYTES_IN_MEMORY if in_memory is None else in_memory:
        return _decoded(source)
    return source


def _decoded(source: ImageSource) -> ArraySource:
    """The same source as one array, decoded by threads (PIL releases the interpreter's lock)."""
    images = np.empty((len(source), *source.image_shape), np.uint8)
    labels = None if source.num_classes is None else np.empty(len(source), np.int32)

    def decode(span: range) -> None:
        for index in span:
            example = source[index]
            images[index] = example["image"]
            if labels is not None:
                labels[index] = example["label"]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, _spans(len(source), 256)):
            pass  # an error of a thread is raised here
    return ArraySource(images, labels, source.name, source.num_classes)


def _resized(source: ArraySource, size: int) -> ArraySource:
    def resize(channel: np.ndarray) -> np.ndarray:
        return np.asarray(resize_and_crop(PIL.Image.fromarray(channel), size))

    if source.image_shape[:2] == (size, size):
        return source
    channels = np.moveaxis(source.images, -1, 1)
    images = np.stack([np.stack([*map(resize, image)], axis=-1) for image in channels])
    return dataclasses.replace(source, images=images)


def _check_split(split: str, valid: Iterable[str], name: str) -> None:
    if split not in valid:
        raise ValueError(f"split must be one of {sorted(valid)} for {name}; got {split!r}.")


def _digits(split: str) -> ArraySource:
    _check_split(split, ("train", "test"), "digits")
    datasets = _import_extra("sklearn.datasets", "for the digits")
    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # stored as 0..16
    labels = digits.target.astype(np.int32)
    rows = slice(None) if split == "train" else slice(-360, None)
    return ArraySource(images[rows], labels[rows], "digits", 10)


def _npz(path: pathlib.Path, split: str) -> ArraySource:
    _check_split(split, ("train",), str(path))
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of a .npz file of uint8 images.")
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("not a whole zip archive")
        with np.load(path, allow_pickle=False) as file:
            images = _first(file, ("images", "x", "arr_0"))
            labels = _first(file, ("labels", "y", "arr_1"))
            names = file.files
    # What numpy raises for truncated, damaged and pickled content.
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
    num_classes = None if labels is None else int(labels.max(initial=0)) + 1
    return ArraySource(images, labels, str(path), num_classes)


def _first(arrays: np.lib.npyio.NpzFile, names: Sequence[str]) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)


# A folder

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


class _Header(NamedTuple):
    size: tuple[int, int]  # width, height as seen
    mode: str  # PIL's


def _header(path: str) -> _Header:
    with _opened(path, path) as image:
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) > 1:
            image = PIL.ImageOps.exif_transpose(image)
        return _Header(image.size, image.mode)


def _folder(path: pathlib.Path, split: str, image_size: int | None) -> FolderSource:
    _check_split(split, ("train",), f"the folder {path}")
    files = (file.relative_to(path) for file in path.rglob("*"))
    relative = sorted(
        file
        for file in files
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.parts)
    )
    paths = tuple(str(path / file) for file in relative)
    if not paths:
        raise ValueError(
            f"{path} has no image in it or below it. Files that count end in "
            f"{' '.join(IMAGE_SUFFIXES)}, and neither they nor their folders start with a dot."
        )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        headers = list(pool.map(_header, paths))

    deep = [file for file, header in zip(paths, headers, strict=True) if header.mode[0] in "IF"]
    if deep:
        raise ValueError(
            f"images must have 8 bits a channel; {len(deep)} of {len(paths)} in {path} have more, "
            f"{deep[0]} is one. Convert them, choosing what becomes black and white."
        )
    sizes = collections.Counter(header.size for header in headers)
    if image_size is None and len(sizes) > 1:
        example = {header.size: file for file, header in zip(paths, headers, strict=True)}
        listing = "; ".join(
            f"{width}x{height}: {count}, {example[width, height]} is one"
            for (width, height), count in sizes.most_common(3)
        )
        raise ValueError(
            f"images of a folder must have one size, or image_size must be given to scale and crop "
            f"them; {path} has {len(sizes)} sizes (width x height): {listing}."
        )
    width, height = (image_size, image_size) if image_size else headers[0].size
    channels = 1 if all(header.mode in ("1", "L", "LA") for header in headers) else 3
    labels, num_classes = _folder_labels(relative)
    return FolderSource(paths, labels, str(path), (height, width, channels), num_classes)


def _folder_labels(files: Sequence[pathlib.Path]) -> tuple[np.ndarray | None, int | None]:
    """The index of each file's top subfolder among their sorted names; None if one has none."""
    if any(len(file.parts) == 1 for file in files):
        return None, None
    classes, labels = np.unique([file.parts[0] for file in files], return_inverse=True)
    return labels.astype(np.int32), len(classes)


# TFDS

CELEB_A_CROP = (25, 57, 153, 185)  # left, top, right, bottom; the paper's, 128x128
DEFAULT_SIZES = {"celeb_a": 64, "lsun": 256}


def _is_tfds_name(name: str) -> bool:
    """Whether TFDS has a set of this name; without TFDS installed a folder is just a folder."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        return False
    tfds = importlib.import_module("tensorflow_datasets")
    return re.split("[/:]", name)[0] in tfds.list_builders(with_community_datasets=False)


def _tfds(
    name: str, split: str, data_dir: str | os.PathLike[str] | None, image_size: int | None
) -> RecordSource:
    tfds = _import_extra("tensorflow_datasets", f"for the data set {name!r}")
    data_dir = None if data_dir is None else str(pathlib.Path(data_dir).expanduser())
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:  # not found; a version that is not offered
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, ["digits", *known])
        raise ValueError(
            f"name must be digits, a .npz file, a folder of images or a TFDS name; got {name!r}"
            + (f", perhaps you meant {' or '.join(near)}." if near else ", which is none of them.")
        ) from error
    prepare = (
        f"pip install 'ddim_jax[prepare]' && python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}, data_dir={data_dir!r}, file_format='array_record')"
        '.download_and_prepare()"'
    )
    if not builder.is_prepared():
        raise ValueError(
            f"{name} is not prepared in {builder.data_path}. If it stands elsewhere, give its "
            f"data_dir; else prepare it once with\n  {prepare}\nor give a folder or .npz of images."
        )
    features = builder.info.features
    images = {key for key, feature in features.items() if isinstance(feature, tfds.features.Image)}
    if "image" not in images or features["image"].np_dtype != np.uint8:
        raise ValueError(
            f'{name} must have a feature "image" of uint8 images; it has {dict(features)}. '
            "Write what you need of it to a folder or .npz of images."
        )
    _check_split(re.split(r"[\[+]", split)[0], builder.info.splits, name)
    if builder.info.splits[split].num_examples == 0:
        raise ValueError(f"split must have at least one image; {split!r} of {name} has none.")
    try:
        records = builder.as_data_source(
            split, decoders={key: tfds.decode.SkipDecoding() for key in images}
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{name} in {builder.data_path} is stored as {builder.info.file_format.value}, which "
            f"only TensorFlow reads. Prepare it as array_record, in another data_dir:\n  {prepare}"
        ) from error
    height, width, channels = features["image"].shape
    size = DEFAULT_SIZES.get(builder.name) if image_size is None else image_size
    if size is not None:
        height = width = size
    elif height is None or width is None:
        raise ValueError(f"{name} has images of several sizes; give image_size, such as 64.")
    label = dict(features).get("label")
    return RecordSource(
        records,
        name=f"{builder.info.full_name}:{split}",
        image_shape=(height, width, channels),
        num_classes=getattr(label, "num_classes", None),
        crop=CELEB_A_CROP if builder.name == "celeb_a" else None,
    )


def _import_extra(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is needed {purpose}: pip install 'ddim_jax[experiments]'"
        ) from error
