"""A name for the exact numbers of a pytree, to be written beside every result they led to."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np


def content_hash(tree: Any) -> str:
    """SHA-256, in hex, over the paths, dtypes, shapes and bytes of a pytree of arrays.

    The same numbers under the same names give the same hash, whatever file they came from.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
