"""What a source of images is, and the one in memory.

A source has a length, and its item i is {"image": uint8 (H, W, C)[, "label": int32 ()]}. Where it
knows how its pixels came to be, its `facts` say so, as JSON holds them: "crop", and "lossy_files",
how many of its images show that JPEG or the like has changed them (`images.shows_compression`).
Arrays live in memory; the others decode an image each time it is asked for, and `decoded` turns
them into arrays. Everything that can be wrong with a set is a ValueError that names it, when it is
opened if that is cheap, else when the image is read.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Int

from ddim_jax.checks import check_array, check_count

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
    content: str | None = None
    """See `content_of`; None for a hash of the arrays."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How the pixels came to be: see the top of this file."""

    def __post_init__(self):  # noqa: D105
        images, labels = self.images, self.labels
        check_array("images", images)
        if labels is not None:
            check_array("labels", labels)
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)
        if images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8, 0 to 255; {self.name} has {images.dtype}. From floats in "
                "[-1, 1]: ddim_jax.data.pixels.to_uint8(x); from floats in [0, 1]: "
                "to_uint8(2 * x - 1)."
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
        return make_example(self.images[indices], label)


def check_source(source: object) -> None:
    """Raise ValueError unless `source` is an ImageSource."""
    if not all(hasattr(source, name) for name in ("name", "image_shape", "__len__", "__getitem__")):
        raise ValueError(
            "source must be an ImageSource, such as load_images gives; got "
            f"{type(source).__name__}. For an array: ArraySource(images)."
        )


def make_example(pixels: np.ndarray, label: Any) -> Example:
    """The example or batch of these; `label` is None where there are no classes."""
    example = {"image": pixels}
    if label is not None:
        example["label"] = np.asarray(label, np.int32)
    return example


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
    content = getattr(source, "content", None)
    facts = facts_of(source)
    return ArraySource(images, labels, source.name, source.num_classes, content, facts)


def facts_of(source: ImageSource) -> dict[str, Any]:
    """How the pixels of a source came to be, as far as it knows."""
    return dict(getattr(source, "facts", {}))


def decoding_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads for decoding: PIL works outside the interpreter's lock, what is around it does not.

    So more than a few threads only wait for each other.
    """
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def check_split(split: str, valid: Iterable[str], name: str) -> None:
    """Raise ValueError unless `split` is one of those that the set called `name` has."""
    if split not in valid:
        raise ValueError(f"split must be one of {sorted(valid)} for {name}; got {split!r}.")


def import_extra(module: str, purpose: str, extra: str = "experiments") -> Any:
    """A module that only some uses need, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is needed {purpose}: pip install 'ddim_jax[{extra}]'"
        ) from error
