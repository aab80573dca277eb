"""Images by name: the one place that knows every kind of set."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from ddim_jax.data.digits import digits
from ddim_jax.data.npz import npz_file
from ddim_jax.data.source import ArraySource, ImageSource, check_split, decoded

MAX_BYTES_IN_MEMORY = 3 * 2**29
"""Sets of at most this many bytes once decoded, 1.5 GiB, are held in memory."""


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
      (N, H, W[, C]); a folder of images; or a TFDS name such as "cifar10", "celeb_a" (cropped as
      in the paper, 64x64) or "lsun/bedroom" (256x256). digits.py, npz.py, folder.py and tfds.py
      have more about each.
    split: TFDS's split, slices such as "train[:1000]" included. A file or a folder is all "train".
      The "test" digits, the last 360, are NOT held out from "train", which is all of them.
    data_dir: where TFDS sets stand; TFDS's own default if None.
    image_size: side of the images wanted, see `images.resize_and_crop`; None keeps theirs.
    in_memory: whether a folder or TFDS set is decoded now; None decides by MAX_BYTES_IN_MEMORY.

    Raises ValueError, naming the way out, for a set that is absent, empty, unreadable, or of mixed
    sizes without `image_size`.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1; got {image_size}.")
    source = _open(name, split, data_dir, image_size)
    if isinstance(source, ArraySource):
        return source if image_size is None else _resized(source, image_size)
    if in_memory is None:
        in_memory = len(source) * int(np.prod(source.image_shape)) <= MAX_BYTES_IN_MEMORY
    return decoded(source) if in_memory else source


# What decodes images is imported when asked for, so that arrays need no PIL.


def _open(
    name: str, split: str, data_dir: str | os.PathLike[str] | None, image_size: int | None
) -> ImageSource:
    """The set as it stands: an array of any size, or images still to be decoded."""
    path = pathlib.Path(name).expanduser()
    if name == "digits":
        return digits(split)
    if path.suffix == ".npz":
        check_split(split, ("train",), name)
        return npz_file(path)

    from ddim_jax.data.folder import image_folder
    from ddim_jax.data.tfds import is_tfds_name, tfds_set

    # A set's name wins, or a run's own folder cifar10/ of sample grids could become its data.
    if path.is_dir() and not is_tfds_name(name):
        check_split(split, ("train",), f"the folder {name}")
        return image_folder(path, image_size)
    return tfds_set(name, split, data_dir, image_size)


def _resized(source: ArraySource, size: int) -> ArraySource:
    from ddim_jax.data.images import resized

    return resized(source, size)
