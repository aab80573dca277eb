"""Real images for a model: those that it was trained on, or others of their shape."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from ddim_jax.data.load import load_images
from ddim_jax.data.source import ImageSource
from ddim_jax.runs import RunSpec, read_config


class Real(NamedTuple):
    """Images of a data set and their classes; zeros if the data has none."""

    image: UInt8[np.ndarray, "N H W C"]
    label: Int[np.ndarray, "N"]


def open_source(
    workdir: str, spec: RunSpec, data: str | None, split: str, data_dir: str | None
) -> ImageSource:
    """The split of a data set, or of the one the model was trained on if `data` is None.

    Raises ValueError if it is unknown or empty, or if its images are not of the model's shape.
    """
    config = read_config(workdir)
    data = data or config.get("data")
    if data is None:
        raise ValueError(f"data must be given: {workdir} does not say what it was trained on.")
    own = pathlib.Path(data) == pathlib.Path(config.get("data") or "")  # a/ is a
    image_size = config.get("image_size") if own else None
    data_dir = data_dir or (config.get("data_dir") if own else None)
    source = load_images(data, split=split, data_dir=data_dir, image_size=image_size)
    if len(source) == 0:
        raise ValueError(f"split must hold images; {split!r} of {source.name} is empty.")
    if tuple(source.image_shape) != spec.image_shape:
        raise ValueError(
            f"data must hold images of the network's shape {spec.image_shape}; {source.name} "
            f"has {tuple(source.image_shape)}. Resize them first."
        )
    if spec.num_classes is not None and source.num_classes is None:
        raise ValueError(f"data must have labels for a conditional network; {source.name} has not.")
    return source


def take(source: ImageSource, indices: Sequence[int]) -> Real:
    """The images with these indices; raises ValueError for an index the source has not."""
    for index in indices:
        if not 0 <= index < len(source):
            raise ValueError(
                f"images must lie in [0, {len(source) - 1}], those of {source.name}; got {index}."
            )
    examples = [source[index] for index in indices]
    return Real(
        np.stack([np.asarray(example["image"]) for example in examples]),
        np.array([example.get("label", 0) for example in examples], np.int32),
    )


def first(source: ImageSource, num_images: int | None) -> Real:
    """The first images of a source, all of them if None; ValueError if it has not as many."""
    if num_images is None:
        num_images = len(source)
    if not 1 <= num_images <= len(source):
        raise ValueError(
            f"num_images must be in [1, {len(source)}], the images of {source.name}; "
            f"got {num_images}."
        )
    return take(source, range(num_images))
