"""What a set of images is, whatever path led to it: a run is resumed on the images it has seen."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from ddim_jax.data.source import ArraySource, ImageSource, decoded
from ddim_jax.hashing import content_hash

NUM_READ = 64
"""Files of a folder whose bytes are looked at, beside the names and sizes of all."""


def content_of(source: ImageSource) -> str:
    """The same text for the same images and labels in the same order, wherever they stand.

    The source's own word where it has one: of a folder a hash of its files, of a TFDS set its name
    with config and version, its split and number. Else a hash of all pixels and labels.
    """
    if (content := getattr(source, "content", None)) is not None:
        return content
    arrays = source if isinstance(source, ArraySource) else decoded(source)
    return f"arrays {content_hash({'images': arrays.images, 'labels': arrays.labels})[:32]}"


def files_content(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> str:
    """A hash over the names and sizes of files below a folder, and the bytes of some of them.

    Names and sizes alone would not tell apart two folders of uncompressed images.
    """
    digest = hashlib.sha256()
    for file in files:
        size = (folder / file).stat().st_size
        digest.update(f"{file.as_posix()}\0{size}\n".encode("utf-8", "surrogateescape"))
    for index in np.unique(np.linspace(0, len(files) - 1, NUM_READ).round().astype(int)):
        digest.update(hashlib.sha256((folder / files[index]).read_bytes()).digest())
    return f"files {digest.hexdigest()[:32]}"
