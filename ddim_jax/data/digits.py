"""scikit-learn's handwritten digits: real images without a download."""

from __future__ import annotations

import numpy as np

from ddim_jax.data.source import ArraySource, check_split, import_extra

SPLITS = {"train": slice(0, -360), "test": slice(-360, None), "all": slice(None)}


def digits(split: str = "train") -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8x8, with labels.

    "test" is the last 360, held out from "train", the first 1437; "all" is both, in that order.
    """
    check_split(split, SPLITS, "digits")
    stored = import_extra("sklearn.datasets", "for the digits").load_digits()
    images = np.round(stored.images * (255 / 16)).astype(np.uint8)[..., None]  # stored as 0..16
    rows = SPLITS[split]
    return ArraySource(images[rows], stored.target[rows], "digits", 10)
