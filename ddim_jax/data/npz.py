"""A .npz file of images."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from ddim_jax.data.source import ArraySource
from ddim_jax.files import npz_names, read_npz


def npz_file(path: str | os.PathLike[str]) -> ArraySource:
    """The uint8 (N, H, W[, C]) called "images", "x" or "arr_0" in a .npz file.

    Integers called "labels", "y" or "arr_1" are its labels.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of a .npz file of uint8 images.")
    what = "images"
    way_out = "Copy it again, or write it with np.savez(path, images=images)."
    names = npz_names(path, what, way_out=way_out)
    images_name = _first(names, ("images", "x", "arr_0"))
    labels_name = _first(names, ("labels", "y", "arr_1"))
    if images_name is None:
        raise ValueError(
            f'{path} must hold the images under "images", "x" or "arr_0"; it has {names}. '
            "Write it with np.savez(path, images=images)."
        )
    wanted = [name for name in (images_name, labels_name) if name is not None]
    arrays = read_npz(path, what, wanted, way_out=way_out)
    images = arrays[images_name]
    labels = None if labels_name is None else arrays[labels_name]
    if images.ndim == 3:
        images = images[..., None]
    num_classes = None
    if labels is not None:  # those that are no numbers are ArraySource's to refuse
        numbers = np.issubdtype(labels.dtype, np.number)
        num_classes = int(labels.max(initial=0)) + 1 if numbers else 1
    return ArraySource(images, labels, str(path), num_classes)


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)
