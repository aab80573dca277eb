"""Real images for a trained network, and programs run over any number of them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, UInt8
from workdir import Network, read_config

from ddim_jax.data import ImageSource, load_images


class Real(NamedTuple):
    """Images of a data set and their classes; zeros if the data has none."""

    image: UInt8[np.ndarray, "N H W C"]
    label: Int[np.ndarray, "N"]


def open_source(
    workdir: str, network: Network, data: str | None, split: str, data_dir: str | None
) -> ImageSource:
    """The split of a data set, or of the one the model was trained on if `data` is None.

    Raises ValueError if it is unknown or empty, or if its images are not of the network's shape.
    """
    config = read_config(pathlib.Path(workdir))
    data = data or config.get("data")
    if data is None:
        raise ValueError(f"data must be given: {workdir} does not say what it was trained on.")
    own = pathlib.Path(data) == pathlib.Path(config.get("data") or "")  # a/ is a
    image_size = config.get("image_size") if own else None
    data_dir = data_dir or (config.get("data_dir") if own else None)
    source = load_images(data, split=split, data_dir=data_dir, image_size=image_size)
    if len(source) == 0:
        raise ValueError(f"split must hold images; {split!r} of {source.name} is empty.")
    if tuple(source.image_shape) != network.image_shape:
        raise ValueError(
            f"data must hold images of the network's shape {network.image_shape}; {source.name} "
            f"has {tuple(source.image_shape)}. Resize them first."
        )
    if network.model.num_classes is not None and source.num_classes is None:
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


def over_batches(
    program: Callable[..., Any], params: Any, batch_size: int, *arrays: np.ndarray
) -> Any:
    """program(params, *arrays) for any number of rows, `batch_size` of them at a time.

    The last batch is filled up and its result cut, so that one program is compiled; a batch is
    rounded up to a multiple of the devices. Returns numpy arrays with one row for each row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    num_rows, devices = len(arrays[0]), jax.local_device_count()
    batch_size = -(-min(batch_size, num_rows) // devices) * devices
    parts = []
    for start in range(0, num_rows, batch_size):
        rows = np.arange(start, start + batch_size) % num_rows
        result = program(params, *(array[rows] for array in arrays))
        parts.append(jax.tree.map(lambda a, n=num_rows - start: np.asarray(a)[:n], result))
    return jax.tree.map(lambda *part: np.concatenate(part), *parts)
