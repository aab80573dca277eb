"""Sweeps of the format before 2, which had no number: what they lack has its default of then.

They knew Frechet distances alone ("distances"), DDIM and sigma-hat alone (an "eta" for both), one
spacing to a sweep, no guidance, and no fingerprint: weights, by a hash of their own, and rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from common.measures import number_shown
from ddim_jax.metrics.frechet import MOMENTS, few_samples_warning, frechet_metric
from ddim_jax.metrics.metric import column_name
from ddim_jax.runs import Run

FRECHET = frechet_metric()
(DISTANCE,) = FRECHET.numbers


def settings(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """An old sweep.json in today's format, but for a fingerprint of two facts."""
    return {
        "num_samples": there["num_samples"],
        "seed": there["seed"],
        "kept_features": wanted["kept_features"],  # none were kept
        "batch_size": there["batch_size"],
        "spacing": there["spacing"],
        "measures": {
            column: {"metric": FRECHET.name, **facts} for column, facts in there["measures"].items()
        },
        "fingerprint": {"rounding": there["rounding"], "weights": there["weights"]},
    }


def comparable(wanted: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Today's settings with as much of a fingerprint as an old sweep has."""
    fingerprint = wanted["fingerprint"]
    weights = fingerprint["weights"] | {"hash": weights_hash(run.params.network)}
    old = {"rounding": fingerprint["rounding"], "weights": weights}
    if run.spec.clip_x0:  # which no old sweep did
        old["clip_x0"] = True
    return {**wanted, "fingerprint": old}


def weights_hash(params: Any) -> str:
    """The hash by which old sweeps know their weights; only to recognise those.

    Today's, `hashing.content_hash`, also sees dtypes and shapes.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def line(old: Mapping[str, Any]) -> dict[str, Any]:
    """An old line of results.jsonl in today's format; it has no fingerprint_id."""
    is_sigma_hat = old["eta"] == "sigma_hat"
    # As the files of then are called; etas equal in print had one file.
    row = "sigma_hat" if is_sigma_hat else f"eta_{old['eta']:g}"
    return {
        **{key: value for key, value in old.items() if key != "distances"},
        "sampler": "sigma_hat" if is_sigma_hat else "ddim",
        "eta": None if is_sigma_hat else old["eta"],
        "guidance_scale": 1.0,
        "network_calls": old["S"],
        "name": f"S{old['S']:04d}_{row}",
        "values": old["distances"],
        "measures": {
            column: {
                "metric": FRECHET.name,
                **facts,
                **number_shown(FRECHET, DISTANCE, facts["features"]),
                "description": f"{old['num_samples']} images",
                "warning": few_samples_warning(old["num_samples"], facts["dim"]),
            }
            for column, facts in old["measures"].items()
        },
    }


def progress(arrays: Mapping[str, np.ndarray], networks: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an old partial.npz, "fd_pixels.count", under today's names."""
    names = {column_name(DISTANCE, network): f"{network}.{MOMENTS}" for network in networks}
    renamed = {"format": np.array(2)}
    for name, array in arrays.items():
        column, dot, field = name.partition(".")
        renamed[names.get(column, column) + dot + field] = array
    return renamed
