"""Images by name: the one place that knows every kind of set."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ddim_jax.checks import check_count, check_is
from ddim_jax.data.digits import SPLITS as DIGITS_SPLITS
from ddim_jax.data.digits import digits
from ddim_jax.data.npz import npy_file, npz_file
from ddim_jax.data.source import ArraySource, ImageSource, check_split, decoded
from ddim_jax.paths import expanded, local_path

if TYPE_CHECKING:
    from ddim_jax.data.crops import Crop

CropName = Literal["celeba"]

MAX_BYTES_IN_MEMORY = 3 * 2**29
"""Sets of at most this many bytes once decoded, 1.5 GiB, are held in memory."""

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def load_images(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    crop: CropName | None = None,
    in_memory: bool | None = None,
) -> ImageSource:
    """The images called `name`.

    name: "digits" (scikit-learn's 1797 digits, 8x8, no download); a .npz or .npy file of uint8
      (N, H, W[, C]); a folder of images; or a TFDS name such as "cifar10", "celeb_a" (cropped as
      in the paper, 64x64) or "lsun/bedroom" (256x256); or an LMDB folder, as LSUN's own are
      (256x256). digits.py, npz.py, folder.py, tfds.py and lmdb_folder.py have more about each. A
      path may begin with ~.
    split: TFDS's split, slices such as "train[:1000]" included. A file or a folder is all "train".
      Of the digits "train" is the first 1437, "test" the last 360, and "all" both.
    data_dir: where TFDS sets stand; TFDS's own default if None.
    image_size: side of the images wanted, see `images.resize_and_crop`; None keeps theirs.
    crop: "celeba" for the paper's crop of aligned CelebA, 178x218 images, which are then 64x64
      unless `image_size` is given; None for none, but that TFDS's celeb_a always has it.
    in_memory: whether a folder or TFDS set is decoded now; None decides by MAX_BYTES_IN_MEMORY.

    Prints what became of files that are no plain images: passed over, transparent, animated.
    Raises ValueError, naming the way out, for a set that is absent, empty, unreadable, or of mixed
    sizes without `image_size`.
    """
    if image_size is not None:
        check_count("image_size", image_size)
    check_is("split", split, str, "the name of a split")
    source = _open(expanded(name, "data"), split, data_dir, image_size, crop)
    for note in getattr(source, "notes", ()):
        print(f"{source.name}: {note}", flush=True)
    if isinstance(source, ArraySource):
        return _fitted(source, image_size, crop)
    if in_memory is None:
        in_memory = len(source) * int(np.prod(source.image_shape)) <= MAX_BYTES_IN_MEMORY
    return decoded(source) if in_memory else source


def splits_of(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The splits that the set called `name` has; of a file or a folder "train" alone."""
    name = expanded(name, "data")
    kind = _kind(name)
    if kind == "digits":
        return tuple(DIGITS_SPLITS)
    if kind != "tfds":
        return ("train",)

    from ddim_jax.data.tfds import tfds_splits

    return tfds_splits(name, data_dir)


HELD_OUT = ("test", "validation")


def held_out_split(splits: Sequence[str], trained_on: str = "") -> str | None:
    """The split that is by its name held out, of those of a set; None where training saw each."""
    if trained_on == "all":
        return None
    # A sum or a slice of splits names them: train+test[:10].
    return next((name for name in HELD_OUT if name in splits and name not in trained_on), None)


def _kind(name: str) -> Literal["digits", "npz", "npy", "folder", "lmdb", "tfds"]:
    """What the name is of, its `~` expanded. Raises ValueError for a file of no kind we read."""
    if name == "digits":
        return "digits"
    path = pathlib.Path(name)
    suffix = path.suffix.lower()
    if path.is_dir():
        from ddim_jax.data.lmdb_folder import is_lmdb
        from ddim_jax.data.tfds import is_tfds_name

        if is_lmdb(path):
            return "lmdb"
        # A set's name wins, or a run's own folder cifar10/ of sample grids could become its data.
        return "tfds" if is_tfds_name(name) else "folder"
    if suffix == ".npz":
        return "npz"
    if suffix == ".npy":
        return "npy"
    if path.is_file():
        raise ValueError(f"data must be a .npz or .npy file, or a folder; {path} is {_what(path)}")
    return "tfds"


def _what(path: pathlib.Path) -> str:
    """What a file is that holds no data set, and the way out."""
    from ddim_jax.data.folder import IMAGE_SUFFIXES, OPTIONAL_SUFFIXES

    suffix = path.suffix.lower()
    if suffix in ARCHIVES:
        return "an archive. Unpack it into a folder of images, and give the folder."
    if suffix in IMAGE_SUFFIXES + OPTIONAL_SUFFIXES:
        return f"one image. Give the folder of all of them, such as {path.parent}."
    return "neither. Write its images to a folder, or with np.savez(path, images=images)."


# What decodes images is imported when asked for, so that arrays need no PIL.


def _open(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None,
    image_size: int | None,
    crop: CropName | None,
) -> ImageSource:
    """The set as it stands: an array of any size, or images still to be decoded."""
    kind = _kind(name)
    if kind == "digits":
        return digits(split)
    if kind == "tfds":
        from ddim_jax.data.tfds import tfds_set

        data_dir = None if data_dir is None else local_path(data_dir, "data_dir", "folder")
        return tfds_set(name, split, data_dir, image_size, _named_crop(crop))
    check_split(split, ("train",), f"the folder {name}" if kind in ("folder", "lmdb") else name)
    if kind == "folder":
        from ddim_jax.data.folder import image_folder

        return image_folder(name, image_size, _named_crop(crop))
    if kind == "lmdb":
        from ddim_jax.data.lmdb_folder import lmdb_folder

        return lmdb_folder(name, image_size, _named_crop(crop))
    return npz_file(name) if kind == "npz" else npy_file(name)


def _named_crop(name: CropName | None) -> Crop | None:
    if name is None:
        return None
    from ddim_jax.data.crops import named_crop

    return named_crop(name)


def _fitted(source: ArraySource, size: int | None, name: CropName | None) -> ArraySource:
    """The arrays cropped and resized, where that is asked for."""
    crop = _named_crop(name)
    if size is None and crop is None:
        return source
    from ddim_jax.data.images import cropped, resized

    if crop is not None:
        source, size = cropped(source, crop), size or crop.default_size
    return source if size is None else resized(source, size)
