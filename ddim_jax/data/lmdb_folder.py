"""An LMDB folder of image files, as LSUN is published in: data.mdb, each value a JPEG or WebP file.

Read by the package lmdb, an extra of ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from typing import Any

import numpy as np

from ddim_jax.data.content import NUM_READ
from ddim_jax.data.crops import Crop
from ddim_jax.data.images import opened, pixels_of, shows_compression
from ddim_jax.data.source import Example, import_extra, make_example
from ddim_jax.paths import local_path

DATA_FILE = "data.mdb"
LSUN_SIZE = 256
"""Side of the images unless one is given: the paper's for LSUN."""


@dataclasses.dataclass(frozen=True)
class LmdbSource:
    """The images of an LMDB folder in the order of their keys, decoded when asked for."""

    path: str
    keys: tuple[bytes, ...]
    image_shape: tuple[int, int, int]
    content: str
    """See `content_of`."""
    facts: dict[str, Any]
    """See `ImageSource`."""
    crop: Crop | None = None
    num_classes: None = None

    @property
    def name(self) -> str:  # noqa: D102
        return self.path

    def __len__(self) -> int:  # noqa: D105
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:  # noqa: D105
        key = self.keys[index]
        name = _name(key, self.path)
        with opened(io.BytesIO(_value(self.path, key)), name) as image:
            part = image if self.crop is None else self.crop(image, name)
            return make_example(pixels_of(part, self.image_shape), None)


def is_lmdb(path: pathlib.Path) -> bool:
    """Whether a folder is an LMDB one."""
    return (path / DATA_FILE).is_file()


def lmdb_folder(
    path: str | os.PathLike[str], image_size: int | None = None, crop: Crop | None = None
) -> LmdbSource:
    """The images in an LMDB folder such as church_outdoor_train_lmdb, as RGB squares.

    Their side is `image_size`, or the crop's own, or LSUN's 256; see `images.resize_and_crop`.
    Raises ValueError for a folder that holds none, or whose first image cannot be read.
    """
    path = str(local_path(path, "data", "folder"))
    keys = _keys(path)
    if not keys:
        raise ValueError(f"{path} has no image in it: its {DATA_FILE} is empty.")
    size = image_size or (crop.default_size if crop else LSUN_SIZE)
    looked_at = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, NUM_READ).astype(int))]
    # Of those looked at, as many of all: LSUN has three million.
    values = [_value(path, key) for key in looked_at]
    lossy = sum(
        _shows_compression(value, _name(key, path), size, crop)
        for key, value in zip(looked_at, values, strict=True)
    )
    facts = {"lossy_files": round(lossy / len(values) * len(keys))}
    facts |= crop.facts() if crop else {}
    return LmdbSource(path, keys, (size, size, 3), _content(keys, values), facts, crop)


def _name(key: bytes, path: str) -> str:
    return f"{key.decode(errors='replace')} of {path}"


def _shows_compression(value: bytes, name: str, side: int, crop: Crop | None) -> bool:
    with opened(io.BytesIO(value), name) as image:
        return shows_compression(image.format, crop.size if crop else image.size, side)


def _content(keys: tuple[bytes, ...], values: list[bytes]) -> str:
    """A hash over all keys, which in LSUN are hashes of the images, and of some values."""
    digest = hashlib.sha256()
    for part in (*keys, *values):
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"lmdb {digest.hexdigest()[:32]}"


def _keys(path: str) -> tuple[bytes, ...]:
    with _environment(path, os.getpid()).begin() as transaction:
        return tuple(bytes(key) for key in transaction.cursor().iternext(values=False))


def _value(path: str, key: bytes) -> bytes:
    with _environment(path, os.getpid()).begin() as transaction:
        return bytes(transaction.get(key))


@functools.lru_cache(maxsize=8)
def _environment(path: str, process: int) -> Any:
    """The open folder, one in each process: LMDB's must not be taken across a fork."""
    del process
    lmdb = import_extra("lmdb", f"to read {path}", extra="lmdb")
    try:
        return lmdb.open(
            path, readonly=True, lock=False, readahead=False, meminit=False, max_readers=1
        )
    except lmdb.Error as error:
        raise ValueError(
            f"{path} cannot be read as an LMDB folder ({error}). Copy it again."
        ) from error
