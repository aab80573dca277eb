"""Feature vectors kept whole, for the metrics that compare single images with single images.

Which are kept is decided by the indices of the images alone: batches of any size, in any order, on
any number of hosts, before and after a restart keep the same ones, in the same order. They are the
first ones: of a set that may be sorted, such as a folder of classes, give the images the indices of
`fair_indices`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int

from ddim_jax.checks import check_count, check_indices, check_is, check_vectors
from ddim_jax.metrics.metric import Metric, Number, check_finite_features

Features: TypeAlias = Float[Array, "N D"] | Float[np.ndarray, "N D"]
Indices: TypeAlias = Int[Array, "N"] | Int[np.ndarray, "N"]

NUM_KEPT = 10_000
"""Images whose features are kept unless another number is asked for: 82 MB of Inception's."""


def fair_indices(num_images: int, num_kept: int) -> Int[np.ndarray, "N"]:
    """An index for each image of a set, so that its first num_kept are a fair draw of it.

    Where all are kept, the image's place; else the place in a shuffle that depends on nothing but
    num_images.
    """
    check_count("num_images", num_images)
    check_count("num_kept", num_kept)
    places = np.arange(num_images)
    return places if num_images <= num_kept else np.random.default_rng(0).permutation(places)


class KeptFeatures(NamedTuple):
    """The features of the images of lowest index among those seen, at most `num_kept` of them."""

    indices: Int[np.ndarray, "N"]  # ascending, each once
    features: Float[np.ndarray, "N D"]  # float32, as networks give them
    num_kept: Int[np.ndarray, ""]


def init_kept(dim: int, num_kept: int = NUM_KEPT) -> KeptFeatures:
    """No features yet, of `dim` entries each."""
    check_count("dim", dim)
    check_count("num_kept", num_kept)
    return KeptFeatures(
        np.zeros(0, np.int64), np.zeros((0, dim), np.float32), np.array(num_kept, np.int64)
    )


def update_kept(state: KeptFeatures, features: Features, indices: Indices) -> KeptFeatures:
    """What is kept after also seeing the features of the images of these indices.

    Raises ValueError on another feature length, on features that are not finite, and on an index
    that is kept already.
    """
    check_is("state", state, KeptFeatures, "KeptFeatures, such as init_kept gives")
    check_vectors("features", features, state.features.shape[1])
    check_indices("indices", indices)
    if indices.shape != features.shape[:1]:
        raise ValueError(
            f"indices must have shape {features.shape[:1]}, one for each feature vector; got "
            f"{indices.shape}."
        )
    new = KeptFeatures(
        np.asarray(indices, np.int64), np.asarray(features, np.float32), state.num_kept
    )
    check_finite_features("features", new.features)
    return merge_kept(state, new)


def merge_kept(a: KeptFeatures, b: KeptFeatures) -> KeptFeatures:
    """What is kept of the two sets together. Raises ValueError when an image is in both."""
    for name, state in (("a", a), ("b", b)):
        check_is(name, state, KeptFeatures, "KeptFeatures, such as init_kept gives")
    if a.features.shape[1] != b.features.shape[1]:
        raise ValueError(
            "a and b must be of features of one length; got "
            f"{a.features.shape[1]} and {b.features.shape[1]}."
        )
    if a.num_kept != b.num_kept:
        raise ValueError(
            "num_kept must be the same on both sides of a merge; got "
            f"{a.num_kept} and {b.num_kept}."
        )
    num_kept = int(a.num_kept)
    full = len(a.indices) == num_kept
    if full and (len(b.indices) == 0 or b.indices.min() > a.indices[-1]):
        return a  # nearly every batch of a long run ends here, without a copy
    indices = np.concatenate([a.indices, b.indices])
    features = np.concatenate([a.features, b.features])
    if (indices[1:] <= indices[:-1]).any():  # not in a run that goes through the images in order
        order = np.argsort(indices)
        indices, features = indices[order], features[order]
    if (repeated := indices[1:] == indices[:-1]).any():
        raise ValueError(
            f"indices must name each image once; got {indices[1:][repeated][0]} twice. Was a batch "
            "repeated, or filled up?"
        )
    return KeptFeatures(indices[:num_kept], features[:num_kept], a.num_kept)


# ---------------------------------------------------------------------------------------------
# What the metrics over kept features have in common


def metric_over_kept(
    name: str,
    features: str,
    numbers: tuple[Number, ...],
    num_kept: int,
    *,
    compute: Callable[[KeptFeatures, Any], dict[str, float]],
    describe: Callable[[KeptFeatures, Any], str],
    warning: Callable[[KeptFeatures, Any], str | None],
    needs_reference: bool = True,
) -> Metric:
    """A metric on the kept features; all that read the same output share one state of them."""
    init_kept(1, num_kept)  # refuses a bad number before anything is drawn
    return Metric(
        name=name,
        features=features,
        state=f"kept_{features}",
        numbers=numbers,
        init=functools.partial(init_kept, num_kept=num_kept),
        update=update_kept,
        merge=merge_kept,
        compute=compute,
        describe=describe,
        warning=warning,
        needs_reference=needs_reference,
    )


def both_sides(
    name: str, state: KeptFeatures, reference: KeptFeatures | None
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "M E"]]:
    """The features of the images and of the reference, for the metric called `name`.

    A reference that keeps more counts up to the state's `num_kept`: as if gathered with that.
    """
    if reference is None:
        raise ValueError(f"{name} needs a reference, the state of other images; got None.")
    return state.features, reference.features[: int(state.num_kept)]


def describe_kept(state: KeptFeatures, reference: KeptFeatures | None = None) -> str:
    """How many images are behind a number, on both sides if there are two."""
    count = len(state.features)
    text = f"the first {count} images" if count == state.num_kept else f"{count} images"
    if reference is None:
        return text
    return f"{text} against {len(reference.features[: int(state.num_kept)])}"
