"""scikit-learn's handwritten digits: real images without a download."""

from __future__ import annotations

import numpy as np

from ddim_jax.data.source import ArraySource, check_split, import_extra


def digits(split: str = "train") -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8x8, with labels.

    "train" is all of them; "test", the last 360, is NOT held out from it.
    """
    check_split(split, ("train", "test"), "digits")
    stored = import_extra("sklearn.datasets", "for the digits").load_digits()
    images = np.round(stored.images * (255 / 16)).astype(np.uint8)[..., None]  # stored as 0..16
    rows = slice(None) if split == "train" else slice(-360, None)
    return ArraySource(images[rows], stored.target[rows], "digits", 10)
