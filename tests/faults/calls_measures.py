"""The same as calls.py for metrics, data and converters: what measures, reads and translates.

python tests/faults/calls_measures.py 1000 [--seed 0]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import calls
import jax
import jax.numpy as jnp
import numpy as np
from calls import NO_ARRAYS, NOTHING, Role

from ddim_jax import convert
from ddim_jax.data import images as data_images
from ddim_jax.data import load, pixels, stream
from ddim_jax.data.source import ArraySource
from ddim_jax.metrics import frechet, inception_score, kept, kid, precision_recall, table
from ddim_jax.metrics.features import feature_network
from ddim_jax.metrics.statistics import gather_moments
from ddim_jax.unet import UNet

SHAPES = [(24, 3), (9, 2), (40, 5)]
"""Vectors of a set, and their length."""

MODEL = UNet(
    channels=4, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=2,
    image_channels=1,
)  # fmt: skip


def _always(value: Any) -> Callable[[tuple[int, ...]], Any]:
    return lambda shape: value


def _vectors(seed: int, *, beside: bool = False) -> Role:
    def usual(shape):
        return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

    def with_one(value):
        def made(shape):
            x = usual(shape)
            x[1, 0] = value
            return x

        return made

    wrong = {
        **{k: v for k, v in NOTHING.items() if k != "a list"}, "a number": _always(0.5),
        "words in an array": lambda s: np.full(s, "a"), "a vector": lambda s: usual(s)[0],
        "a cube": lambda s: usual(s)[None], "no rows": lambda s: usual(s)[:0],
        "no columns": lambda s: usual(s)[:, :0], "NaN": with_one(np.nan),
        "infinity": with_one(np.inf), "complex numbers": lambda s: usual(s) + 1j,
        "flags": lambda s: usual(s) > 0, "objects": lambda s: usual(s).astype(object),
    }  # fmt: skip
    if beside:
        wrong["longer vectors"] = lambda s: usual((s[0], s[1] + 1))
    right = {
        "float64": lambda x: x.astype(np.float64), "an array": jnp.asarray,
        "other strides": lambda x: np.asfortranarray(x),
    }  # fmt: skip
    return Role(usual, wrong, right=right)


def _covariance(shape: tuple[int, ...]) -> np.ndarray:
    a = np.random.default_rng(5).normal(size=(shape[1], shape[1]))
    return a @ a.T + np.eye(shape[1])


def _asymmetric(shape):
    cov = _covariance(shape)
    cov[0, 1] += 1.0
    return cov


MEAN = Role(
    lambda s: np.linspace(0, 1, s[1]),
    {**{k: v for k, v in NOTHING.items() if k != "a list"}, "a number": _always(0.5),
     "NaN": lambda s: np.full(s[1], np.nan), "longer": lambda s: np.zeros(s[1] + 1),
     "a matrix": lambda s: np.zeros((s[1], s[1])), "nothing": _always(np.zeros(0))},
    right={"float32": lambda m: m.astype(np.float32), "an array": jnp.asarray,
           "a list": lambda m: m.tolist()},
)  # fmt: skip
COVARIANCE = Role(
    _covariance,
    {**{k: v for k, v in NOTHING.items() if k != "a list"}, "a number": _always(0.5),
     "NaN": lambda s: _covariance(s) * np.nan, "negative": lambda s: -_covariance(s),
     "asymmetric": _asymmetric, "a vector": lambda s: np.ones(s[1]),
     "larger": lambda s: np.eye(s[1] + 1), "infinite": lambda s: _covariance(s) * np.inf,
     "correlated beyond 1": lambda s: np.ones((s[1], s[1])) * 2 - np.eye(s[1])},
    right={"an array": lambda c: jnp.asarray(c), "a list": lambda c: c.tolist(),
           "other strides": np.asfortranarray},
)  # fmt: skip


def _images(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (shape[0], 4, 4, 1), np.uint8)


IMAGES = Role(
    _images,
    {**{k: v for k, v in NO_ARRAYS.items()}, "floats": lambda s: _images(s) / np.float32(255),
     "flags": lambda s: _images(s) > 9, "int32": lambda s: _images(s).astype(np.int32),
     "one image": lambda s: _images(s)[0], "no images": lambda s: _images(s)[:0],
     "int8": lambda s: _images(s).astype(np.int8)},
    right={"an array": jnp.asarray, "other strides": np.asfortranarray},
)  # fmt: skip
ANY_PIXELS = Role(
    _images, {k: v for k, v in IMAGES.wrong.items() if k not in ("one image", "no images")},
    right=IMAGES.right,
)  # fmt: skip
REALS = Role(
    lambda s: np.random.default_rng(2).normal(size=s).astype(np.float32),
    {**{k: v for k, v in NOTHING.items() if k != "a list"}, "grey levels": _images,
     "integers": lambda s: np.ones(s, np.int32), "flags": lambda s: np.ones(s, bool)},
    right={"float64": lambda x: x.astype(np.float64), "an array": jnp.asarray},
)  # fmt: skip
SOURCE = Role(lambda s: ArraySource(_images(s)), {**NOTHING, "images alone": _images})
SPLITS = Role(_always(("train", "test")), {k: v for k, v in NOTHING.items() if "list" not in k})
STATE = Role(
    lambda s: kept.update_kept(kept.init_kept(s[1], 50), np.ones(s, np.float32), np.arange(s[0])),
    {**NOTHING, "moments": lambda s: frechet.init_moments(s[1])},
)
MOMENTS = Role(
    lambda s: frechet.update_moments(frechet.init_moments(s[1]), _vectors(0).usual(s)),
    {**NOTHING, "what is kept": lambda s: kept.init_kept(s[1])},
)
OTHER_MOMENTS = Role(
    lambda s: frechet.update_moments(frechet.init_moments(s[1]), _vectors(4).usual(s)),
    {**MOMENTS.wrong, "of longer vectors": lambda s: frechet.init_moments(s[1] + 1)},
)


def _params(shape):
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), 0)["params"]


PARAMS = Role(
    _params,
    {**{k: v for k, v in NOTHING.items()}, "nothing": _always({"a": {}}),
     "text": lambda s: _params(s) | {"conv_in": "a"}},
)  # fmt: skip
OF_PAPER = Role(
    lambda s: convert.flax_to_paper(_params(s)),
    {**NOTHING, "nothing": _always({}),
     "more": lambda s: convert.flax_to_paper(_params(s)) | {"a": np.zeros(2)},
     "less": lambda s: dict(list(convert.flax_to_paper(_params(s)).items())[1:]),
     "text": lambda s: dict.fromkeys(convert.flax_to_paper(_params(s)), "a"),
     "numbers": lambda s: dict.fromkeys(convert.flax_to_paper(_params(s)), 0.5)},
)  # fmt: skip
OF_DIFFUSERS = Role(
    lambda s: convert.flax_to_diffusers(_params(s), MODEL),
    {**NOTHING, "nothing": _always({}),
     "less": lambda s: dict(list(convert.flax_to_diffusers(_params(s), MODEL).items())[1:]),
     "text": lambda s: dict.fromkeys(convert.flax_to_diffusers(_params(s), MODEL), "a")},
)  # fmt: skip
NETWORK = Role(_always(MODEL), {**NOTHING, "its class": _always(UNet), "a size": _always(4)})
SCHEDULER = Role(
    _always({"num_train_timesteps": 9, "beta_start": 0.01, "beta_end": 0.2,
             "beta_schedule": "linear", "prediction_type": "epsilon"}),
    {**{k: v for k, v in NOTHING.items() if k != "a dict"},
     "T in words": _always({"num_train_timesteps": "9"}),
     "no T": _always({"num_train_timesteps": 0}), "T of 2.5": _always({"num_train_timesteps": 2.5}),
     "another rule": _always({"beta_schedule": "mine"}),
     "betas in words": _always({"trained_betas": "a"}),
     "a rate in words": _always({"beta_start": "a"}), "NaN": _always({"beta_start": np.nan}),
     "another prediction": _always({"prediction_type": "mine"}),
     "a number to predict": _always({"prediction_type": 3})},
)  # fmt: skip
count, choice = calls._count, calls._choice


def uses() -> dict[str, tuple[Callable[..., Any], dict[str, Role]]]:
    """Name -> function, and the role of each of its arguments."""
    # No vectors change nothing; a stream has more than 2**32 positions.
    batch, positions = _vectors(1, beside=True), calls.INDICES
    batch = Role(batch.usual, {k: v for k, v in batch.wrong.items() if k != "no rows"})
    positions = Role(
        positions.usual, {k: v for k, v in positions.wrong.items() if k != "2**32"},
        right=positions.right,
    )  # fmt: skip
    two = {"x": _vectors(0), "y": _vectors(1, beside=True)}
    neighbours = {"real": _vectors(0), "generated": _vectors(1, beside=True), "k": count(3)}
    schedule_only = {k: v for k, v in SCHEDULER.wrong.items() if "predict" not in k}
    prediction_only = {k: v for k, v in SCHEDULER.wrong.items() if "predict" in k or k in NOTHING}
    return {
        "frechet_distance": (
            frechet.frechet_distance,
            {"mean1": MEAN, "cov1": COVARIANCE, "mean2": MEAN, "cov2": COVARIANCE},
        ),
        "frechet_distance_from_features": (
            frechet.frechet_distance_from_features,
            {"a": _vectors(0), "b": _vectors(1, beside=True)},
        ),
        "init_moments": (frechet.init_moments, {"dim": count(3)}),
        "update_moments": (
            frechet.update_moments, {"moments": MOMENTS, "features": batch},
        ),
        "merge_moments": (frechet.merge_moments, {"a": MOMENTS, "b": OTHER_MOMENTS}),
        "finalize_moments": (frechet.finalize_moments, {"moments": MOMENTS}),
        "kid": (
            kid.kid,
            {**two, "num_subsets": count(3), "subset_size": count(4, at_least=2),
             "seed": count(0, at_least=0)},
        ),
        "polynomial_mmd": (kid.polynomial_mmd, two),
        "inception_score": (
            inception_score.inception_score, {"logits": _vectors(0), "num_splits": count(3)},
        ),
        "precision_recall": (
            precision_recall.precision_recall, {**neighbours, "block_size": count(5)},
        ),
        "density_coverage": (
            precision_recall.density_coverage, {**neighbours, "block_size": count(5)},
        ),
        "fair_indices": (kept.fair_indices, {"num_images": count(9), "num_kept": count(5)}),
        "init_kept": (kept.init_kept, {"dim": count(3), "num_kept": count(5)}),
        "update_kept": (
            kept.update_kept,
            {"state": Role(lambda s: kept.init_kept(s[1], 50), STATE.wrong),
             "features": batch, "indices": calls.INDICES},
        ),
        "merge_kept": (
            kept.merge_kept,
            {"a": Role(lambda s: kept.init_kept(s[1], 50), STATE.wrong), "b": STATE},
        ),
        "named_metrics": (
            lambda names, num_kept: [m.name for m in table.named_metrics(names, num_kept)],
            {"names": Role(_always(["kid"]), {k: v for k, v in NO_ARRAYS.items() if k != "a dict"}),
             "num_kept": count(5, at_least=2)},
        ),
        "feature_network": (
            lambda name, images: feature_network(name).apply_fn({}, images),
            {"name": choice("pixels"), "images": IMAGES},
        ),
        "gather_moments": (
            lambda images: gather_moments(feature_network("pixels"), [images]), {"images": IMAGES},
        ),
        "to_model_range": (pixels.to_model_range, {"image": ANY_PIXELS}),
        "to_uint8": (pixels.to_uint8, {"x": REALS}),
        "nearest_levels": (pixels.nearest_levels, {"x": REALS}),
        "ArraySource": (
            lambda images, labels, num_classes: ArraySource(images, labels, "a", num_classes)[0],
            {"images": IMAGES,
             "labels": Role(
                 lambda s: np.arange(s[0]) % 5,
                 {**NOTHING, "fractions": lambda s: np.arange(s[0]) + 0.5,
                  "too many": lambda s: np.arange(s[0] + 1) % 5,
                  "a class too high": lambda s: np.arange(s[0]) % 6,
                  "negative": lambda s: np.arange(s[0]) % 5 - 1},
                 right={"int32": lambda x: x.astype(np.int32)},
             ),
             "num_classes": count(5)},
        ),
        "shuffled_indices": (
            stream.shuffled_indices,
            {"num_examples": count(9), "seed": count(0, at_least=0), "positions": positions},
        ),
        "batches": (
            lambda **given: next(stream.batches(**given)),
            {"source": SOURCE, "batch_size": count(4), "seed": count(0, at_least=0),
             "start_step": count(1, at_least=0)},
        ),
        "sequential_batches": (
            lambda **given: next(stream.sequential_batches(**given)),
            {"source": SOURCE, "batch_size": count(4)},
        ),
        "resized": (
            lambda source, size: data_images.resized(source, size).images,
            {"source": SOURCE, "size": count(8)},
        ),
        "load_images": (
            lambda name, split, image_size: load.load_images(
                name, split=split, image_size=image_size
            )[0],
            {"name": Role(_always("digits"), {k: v for k, v in NOTHING.items() if k != "words"}),
             "split": choice("train"),
             "image_size": Role(
                 _always(4), {k: v for k, v in count(4).wrong.items() if k != "None"}
             )},
        ),
        "splits_of": (
            load.splits_of,
            {"name": Role(_always("digits"), {k: v for k, v in NOTHING.items() if k != "words"})},
        ),
        "schedule_from_diffusers": (
            convert.schedule_from_diffusers, {"scheduler": Role(SCHEDULER.usual, schedule_only)},
        ),
        "prediction_from_diffusers": (
            convert.prediction_from_diffusers,
            {"scheduler": Role(SCHEDULER.usual, prediction_only)},
        ),
        "flax_to_paper": (convert.flax_to_paper, {"params": PARAMS}),
        "flax_to_diffusers": (
            convert.flax_to_diffusers, {"params": PARAMS, "model": NETWORK},
        ),
        "paper_to_flax": (
            convert.paper_to_flax,
            {"state_dict": OF_PAPER, "model": NETWORK, "image_size": count(4)},
        ),
        "diffusers_to_flax": (
            convert.diffusers_to_flax,
            {"state_dict": OF_DIFFUSERS, "model": NETWORK, "image_size": count(4)},
        ),
        "load_diffusers": (
            convert.load_diffusers,
            {"path_or_id": Role(_always("."), {k: v for k, v in NOTHING.items() if k != "words"})},
        ),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(min(calls.main(uses, SHAPES), 1))
