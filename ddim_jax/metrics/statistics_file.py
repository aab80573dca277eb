"""The arrays of a file of statistics: ours, other tools', and what each other kind of file is."""

from __future__ import annotations

import json
import pathlib
import zipfile
from typing import Any

import numpy as np

from ddim_jax.data.load import ARCHIVES
from ddim_jax.data.npz import kind_of_arrays
from ddim_jax.files import npz_names, read_npz
from ddim_jax.metrics.covariance import check_covariance, check_mean
from ddim_jax.metrics.frechet import finalize_moments, init_moments, update_moments

WHAT = "feature statistics"
ANEW = "Make the statistics anew: compute_statistics, save_statistics."
AS_NPZ = (
    "If its source is trusted open it where it was made, and np.savez(path, mu=mu, sigma=sigma)."
)
PICKLES = b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"
"""How pickles begin, by the protocol."""
NUM_AT_ONCE = 10_000
"""Features added up at once, in float64: 164 MB of Inception's."""


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """mu (D,), sigma (D, D), both float64 and checked; metadata, and "state.field" of states.

    Images beside them, such as in guided-diffusion's reference batches, are not read. Of a file of
    Inception's features under "pool_3", (N, D), mu and sigma are made now, and metadata too.
    Raises FileNotFoundError without a file, ValueError, saying what the file is, on another kind.
    """
    if (kind := _another_kind(path)) is not None:
        raise ValueError(f"{path} must be a .npz file with mu and sigma; it is {kind}")
    names = npz_names(path, WHAT, way_out=ANEW)
    if {"mu", "sigma"} <= {*names}:
        wanted = [x for x in names if x in ("mu", "sigma", "metadata") or "." in x]
        arrays = read_npz(path, WHAT, wanted, way_out=ANEW)
    elif "pool_3" in names and not {"mu", "sigma"} & {*names}:
        arrays = _of_features(path, read_npz(path, WHAT, ["pool_3"], way_out=ANEW)["pool_3"])
    else:
        raise ValueError(_message_without_moments(path, names))
    _check_moments(path, arrays["mu"], arrays["sigma"])
    return arrays | {name: np.asarray(arrays[name], np.float64) for name in ("mu", "sigma")}


def _check_moments(path: pathlib.Path, mean: np.ndarray, cov: np.ndarray) -> None:
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(
            f"{path} must hold mu of shape (D,) and sigma of shape (D, D); got {mean.shape} and "
            f"{cov.shape}."
        )
    check_mean(f"{path}: mu", mean)
    check_covariance(f"{path}: sigma", cov)


def _of_features(path: pathlib.Path, features: np.ndarray) -> dict[str, Any]:
    """Moments of Inception's pooled features, under the name of that layer in its TensorFlow graph.

    Its maps of one pixel, (N, 1, 1, D), are the same.
    """
    if features.ndim == 4 and features.shape[1:3] == (1, 1):
        features = features[:, 0, 0]
    if features.ndim != 2 or features.dtype.kind != "f" or len(features) < 2:
        raise ValueError(
            f"{path} must hold under pool_3 the features of at least 2 images, floats of shape "
            f"(N, D); got {features.dtype} of shape {features.shape}. {ANEW}"
        )
    moments = init_moments(features.shape[1])
    try:
        for start in range(0, len(features), NUM_AT_ONCE):
            moments = update_moments(moments, features[start : start + NUM_AT_ONCE])
    except ValueError as error:
        raise ValueError(f"{path}: pool_3: {error}") from error
    mean, cov = finalize_moments(moments)
    metadata = {"features": "inception", "num_samples": len(features)}
    return {"mu": mean, "sigma": cov, "metadata": np.array(json.dumps(metadata))}


def _message_without_moments(path: pathlib.Path, names: list[str]) -> str:
    missing = " and ".join(name for name in ("mu", "sigma") if name not in names)
    is_what = f" ({kind})" if (kind := kind_of_arrays(names)) else ""
    return (
        f"{path} must hold mu and sigma; {missing} missing. It has {', '.join(names) or 'nothing'}"
        f"{is_what}. Images in a .npz become statistics by compute_statistics."
    )


def _another_kind(path: pathlib.Path) -> str | None:
    """What a file is that is known and no .npz, with the way out; else None."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(6)
    if head == b"\x93NUMPY":
        return (
            "one array, a .npy file. Write both into one file: np.savez(path, mu=mu, sigma=sigma)."
        )
    if head[:2] in PICKLES:
        return f"a pickle, which could run code when read. {AS_NPZ}"
    if zipfile.is_zipfile(path):
        return _zip_kind(path)
    if path.suffix.lower() in ARCHIVES:
        return f"an archive. Unpack it, and give the .npz file that is inside. {ANEW}"
    return None


def _zip_kind(path: pathlib.Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None  # damaged: the reader says how
    if any(name.endswith("data.pkl") for name in names):
        return f"a file of torch.save, a pickle that could run code when read. {AS_NPZ}"
    if not names or any(name.endswith(".npy") and "/" not in name for name in names):
        return None
    return f"an archive of {len(names)} files. {_inside(names)}"


def _inside(names: list[str]) -> str:
    """What to take out of an archive of these files."""
    if (inside := next((name for name in names if name.endswith(".npz")), None)) is not None:
        return f"Unpack it, and give {inside}."
    return f"Unpack it; images become statistics by compute_statistics. {ANEW}"
