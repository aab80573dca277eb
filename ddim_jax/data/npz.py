"""A .npz file of images, or the .npy file of one array of them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection, Sequence

import numpy as np

from ddim_jax.data.source import ArraySource
from ddim_jax.files import check_array_size, npz_names, read_npz
from ddim_jax.paths import local_path

# fmt: off
KINDS_OF_ARRAYS = {
    "feature statistics, which samples are measured against": ("mu", "sigma"),
    "statistics of spatial features alone, for sFID": ("mu_s", "sigma_s"),
    "features of images": ("pool_3", "pool", "features", "feats", "activations", "spatial"),
    "images": ("images", "x", "arr_0"),
    "a codec's or network's weights": ("params",),
    "a sweep's cell under way": ("cell", "count"),
}
# fmt: on
"""What a file of arrays is -> names that give it away."""
WAY_OUT = "Copy it again, or write it with np.savez(path, images=images)."


def npz_file(path: str | os.PathLike[str]) -> ArraySource:
    """The uint8 (N, H, W[, C]) called "images", "x" or "arr_0" in a .npz file.

    Integers called "labels", "y" or "arr_1" are its labels. Other arrays are left alone, such as
    the statistics in the reference batches of guided-diffusion.
    """
    path = local_path(path, "data", "file")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of a .npz file of uint8 images.")
    names = npz_names(path, "images", way_out=WAY_OUT)
    images_name = _first(names, ("images", "x", "arr_0"))
    labels_name = _first(names, ("labels", "y", "arr_1"))
    if images_name is None:
        kind = kind_of_arrays(names)
        raise ValueError(
            f'{path} must hold the images under "images", "x" or "arr_0"; it has {names}'
            f"{f': {kind}' if kind else ''}. Write it with np.savez(path, images=images)."
        )
    wanted = [name for name in (images_name, labels_name) if name is not None]
    arrays = read_npz(path, "images", wanted, way_out=WAY_OUT)
    return _source(path, arrays[images_name], arrays.get(labels_name or ""))


def npy_file(path: str | os.PathLike[str]) -> ArraySource:
    """The uint8 (N, H, W[, C]) that a .npy file is, without labels."""
    path = local_path(path, "data", "file")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of a .npy file of uint8 images.")
    try:
        with path.open("rb") as file:
            check_array_size(file, path.stat().st_size)
            file.seek(0)
            images = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError(f"more bytes than its shape {images.shape} says")
    # Damage in a header reaches Python's parser, which promises none of its errors.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as images, one plain array in a .npy file ({error}). Copy it "
            "again, or write it with np.save(path, images)."
        ) from error
    return _source(path, images, None)


def _source(path: pathlib.Path, images: np.ndarray, labels: np.ndarray | None) -> ArraySource:
    if images.ndim == 2 and np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{path} must hold images, uint8 of shape (N, H, W, C); it has {images.dtype} of shape "
            f"{images.shape}, which look like the features of {len(images)} images."
        )
    if images.ndim == 3:
        images = images[..., None]
    num_classes = None
    if labels is not None:  # those that are no numbers are ArraySource's to refuse
        numbers = np.issubdtype(labels.dtype, np.number)
        num_classes = int(labels.max(initial=0)) + 1 if numbers else 1
    return ArraySource(images, labels, str(path), num_classes)


def kind_of_arrays(names: Collection[str]) -> str | None:
    """What a .npz file with arrays of these names is, in words for a message; None if unknown."""
    likely = (kind for kind, telling in KINDS_OF_ARRAYS.items() if {*telling} & {*names})
    return next(likely, None)


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)
