"""Real images for a model: those that it was trained on, or others of their shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Int, UInt8

from common.options import RealImageOptions
from ddim_jax.data.content import content_of
from ddim_jax.data.images import opened, pixels_of
from ddim_jax.data.load import held_out_split, load_images, splits_of
from ddim_jax.data.source import ImageSource
from ddim_jax.runs import RunSpec, read_config
from ddim_jax.runs.folder import DATA_CONTENT, same_place


class Real(NamedTuple):
    """Images of a data set and their classes; zeros if the data has none."""

    image: UInt8[np.ndarray, "N H W C"]
    label: Int[np.ndarray, "N"]


class Opened(NamedTuple):
    """A split of a data set."""

    source: ImageSource
    split: str
    seen: bool
    """Whether the model was trained on it, as far as its folder says."""

    def __str__(self) -> str:
        """The split in words, for what is printed beside numbers."""
        return f"split {self.split}" + (", which the model was trained on" if self.seen else "")


def open_source(workdir: str, spec: RunSpec, options: RealImageOptions) -> Opened:
    """The split of a data set, or of the one the model was trained on if `data` is None.

    Without a split one that was held out from training, where the set has one; else what the model
    was trained on, or "train" of another set.
    Raises ValueError if it is unknown or empty, or if its images are not of the model's shape.
    """
    opened = _open(workdir, options)
    source = opened.source
    if tuple(source.image_shape) != spec.image_shape:
        raise ValueError(
            f"data must hold images of the network's shape {spec.image_shape}; {source.name} "
            f"has {tuple(source.image_shape)}. Resize them first."
        )
    if spec.num_classes is not None and source.num_classes is None:
        raise ValueError(f"data must have labels for a conditional network; {source.name} has not.")
    return opened


def open_any_size(workdir: str, spec: RunSpec, options: RealImageOptions) -> Opened:
    """`open_source` of images of any shape and without labels; `in_shape` brings them to it."""
    return _open(workdir, options, max(spec.image_shape[:2]))


def _open(workdir: str, options: RealImageOptions, size_of_others: int | None = None) -> Opened:
    config = read_config(workdir)
    data = options.data or config.get("data")
    if data is None:
        raise ValueError(f"data must be given: {workdir} does not say what it was trained on.")
    own = same_place(data, config.get("data"))
    data_dir = options.data_dir or (config.get("data_dir") if own else None)
    trained_on = config.get("split", "train")
    try:
        split = options.split or _default_split(splits_of(data, data_dir), trained_on, own)
        source = load_images(
            data,
            split=split,
            data_dir=data_dir,
            image_size=config.get("image_size") if own else size_of_others,
            crop=options.crop or (config.get("crop") if own else None),
            in_memory=False,
        )
    except ValueError as error:
        if options.data is not None or options.split is not None:
            raise
        raise ValueError(
            f"{error} It is what {workdir} was trained on; where it stands elsewhere now, give "
            "data."
        ) from error
    if len(source) == 0:
        raise ValueError(f"split must hold images; {split!r} of {source.name} is empty.")
    return Opened(source, split, _was_seen(source, split, own, config))


def _default_split(splits: Sequence[str], trained_on: str, own: bool) -> str:
    held_out = held_out_split(splits, trained_on if own else "")
    return held_out or (trained_on if own else "train")


def _was_seen(source: ImageSource, split: str, own: bool, config: Mapping[str, Any]) -> bool:
    trained_on = config.get("split", "train")
    if own:
        return "all" in (split, trained_on) or split.partition("[")[0] in trained_on
    return DATA_CONTENT in config and content_of(source) == config[DATA_CONTENT]


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


def first(source: ImageSource, num_images: int | None, default: int) -> Real:
    """The first images of a source; ValueError if it has not as many.

    Of None the first `default`, or all where there are fewer.
    """
    if num_images is None:
        num_images = min(default, len(source))
    if not 1 <= num_images <= len(source):
        raise ValueError(
            f"num_images must be in [1, {len(source)}], the images of {source.name}; "
            f"got {num_images}."
        )
    return take(source, range(num_images))


def in_shape(
    images: UInt8[np.ndarray, "N H W C"], shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "N H2 W2 C2"]:
    """The images as a model's, grey or colour, resized and cropped."""
    if images.shape[1:] == shape:
        return images
    pictures = (PIL.Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in images)
    return np.stack([pixels_of(picture, shape) for picture in pictures])


def read_files(paths: Sequence[str], shape: tuple[int, int, int]) -> UInt8[np.ndarray, "N H W C"]:
    """Image files as a model's images: upright, over white, grey or colour, resized and cropped."""
    pixels = []
    for path in paths:
        with opened(path, path) as image:
            pixels.append(pixels_of(PIL.ImageOps.exif_transpose(image), shape))
    return np.stack(pixels)
