"""TFDS sets by name, prepared as array_record, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import io
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.data.crops import CROPS, Crop
from ddim_jax.data.images import opened, pixels_of, shows_compression
from ddim_jax.data.source import Example, check_split, import_extra, make_example
from ddim_jax.paths import local_path

DEFAULT_SIZES = {"lsun": 256}


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """A prepared TFDS set in array_record files, decoded when asked for, without TensorFlow."""

    records: Any  # records[i] is a tf.train.Example message; its "image" is a PNG or JPEG file
    name: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    crop: Crop | None = None
    content: str | None = None
    """See `content_of`."""
    notes: tuple[str, ...] = ()
    """What a user should know about what became of the images."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How the pixels came to be: see source.py."""

    def __len__(self) -> int:  # noqa: D105
        return len(self.records)

    def __getitem__(self, index: int) -> Example:  # noqa: D105
        # Parsed here, since TFDS's own parser takes a third of the time that small images need.
        features = _record_message().FromString(self.records[index]).features.feature
        file = io.BytesIO(features["image"].bytes_list.value[0])
        name = f"record {index} of {self.name}"
        with opened(file, name) as image:
            part = image if self.crop is None else self.crop(image, name)
            pixels = pixels_of(part, self.image_shape)
        labelled = self.num_classes is not None
        return make_example(pixels, features["label"].int64_list.value[0] if labelled else None)


@functools.cache
def _record_message() -> Any:
    return importlib.import_module("tensorflow_datasets.proto").tf_example_pb2.Example


def tfds_set(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    crop: Crop | None = None,
) -> RecordSource:
    """A TFDS set prepared as array_record, read without TensorFlow.

    celeb_a has the paper's crop, and 64 for its size if none is given; lsun has 256. Other sets
    have the `crop` that is given,
    keep their size, or are squares of `image_size`; see `images.resize_and_crop`. What is
    transparent is laid over white.
    """
    tfds, builder, folder = _opened_builder(name, data_dir)
    features = dict(builder.info.features)
    image: Any = features.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(
            f'{name} must have a feature "image" of uint8 images; it has {features}. '
            "Write what you need of it to a folder or .npz of images."
        )
    records = _records(builder, name, split, folder)
    height, width, channels = image.shape
    transparent = channels == 4
    crop = CROPS["celeba"] if builder.name == "celeb_a" else crop
    default = DEFAULT_SIZES.get(builder.name) if crop is None else crop.default_size
    size = default if image_size is None else image_size
    if size is not None:
        height = width = size
    elif height is None or width is None:
        raise ValueError(f"{name} has images of several sizes; give image_size, such as 64.")
    label: Any = features.get("label")
    full_name = f"{builder.info.full_name}:{split}"
    return RecordSource(
        records,
        name=full_name,
        image_shape=(height, width, 3 if transparent else channels),
        num_classes=label.num_classes if isinstance(label, tfds.features.ClassLabel) else None,
        crop=crop,
        content=f"tfds {full_name} of {len(records)}",
        notes=("images with transparency are laid over white",) if transparent else (),
        facts=_lossy(records, full_name, height, crop) | (crop.facts() if crop else {}),
    )


def _lossy(records: Any, name: str, side: int, crop: Crop | None) -> dict[str, Any]:
    """How many records show that they were JPEG files: all or none, by the first."""
    features = _record_message().FromString(records[0]).features.feature
    with opened(io.BytesIO(features["image"].bytes_list.value[0]), f"record 0 of {name}") as image:
        shows = shows_compression(image.format, crop.size if crop else image.size, side)
    return {"lossy_files": len(records) * shows}


def tfds_splits(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The splits of a prepared TFDS set that hold images."""
    splits = _opened_builder(name, data_dir)[1].info.splits
    return tuple(split for split in splits if splits[split].num_examples > 0)


def _opened_builder(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[Any, Any, Any]:
    """TFDS, its builder of the set, and the folder as TFDS takes it."""
    tfds = import_extra("tensorflow_datasets", f"for the data set {name!r}")
    folder = None if data_dir is None else str(local_path(data_dir, "data_dir", "folder"))
    return tfds, _prepared_builder(tfds, name, folder), folder


def _prepared_builder(tfds: Any, name: str, data_dir: str | None) -> Any:
    """TFDS's builder of a set that stands in `data_dir`."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:  # not found; a version that is not offered
        near = difflib.get_close_matches(name, ["digits", *_tfds_names(tfds, name)])
        raise ValueError(
            "name must be digits, a .npz or .npy file, a folder of images or a TFDS name; got "
            f"{name!r}"
            + (
                f", perhaps you meant {' or '.join(near)}."
                if near
                else ", which is no such name, and no file or folder of that name exists."
            )
        ) from error
    if not builder.is_prepared():
        raise ValueError(
            f"{name} is not prepared in {builder.data_path}. If it stands elsewhere, give its "
            f"data_dir; else prepare it once with\n  {_prepare_command(name, data_dir)}\nor give a "
            f".npz or a folder of images (./{name} if that is its name)."
        )
    return builder


def _records(builder: Any, name: str, split: str, data_dir: str | None) -> Any:
    """The undecoded records of a split."""
    check_split(re.split(r"[\[+]", split)[0], builder.info.splits, name)
    if builder.info.splits[split].num_examples == 0:
        raise ValueError(f"split must have at least one image; {split!r} of {name} has none.")
    try:
        return builder.as_data_source(split).data_source
    except NotImplementedError as error:
        raise ValueError(
            f"{name} in {builder.data_path} is stored as {builder.info.file_format.value}, which "
            "only TensorFlow reads. Prepare it as array_record, in another data_dir:\n  "
            f"{_prepare_command(name, data_dir)}"
        ) from error


def _prepare_command(name: str, data_dir: str | None) -> str:
    """What to type once to have the set."""
    return (
        f"pip install 'ddim_jax[prepare]' && python -c \"import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}, data_dir={data_dir!r}, file_format='array_record')"
        '.download_and_prepare()"'
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
