"""The published weights of the FID's Inception network: fetched once, known by their hash."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import urllib.request

from ddim_jax.paths import local_path

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
)

logger = logging.getLogger(__name__)


def cache_dir() -> pathlib.Path:
    """Where fetched files are kept: $DDIM_JAX_CACHE, else the user's cache folder."""
    if folder := os.environ.get("DDIM_JAX_CACHE"):
        return local_path(folder, "DDIM_JAX_CACHE", "folder")
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "ddim_jax"


def fetch_weights(
    folder: pathlib.Path | None = None, url: str = WEIGHTS_URL, sha256: str = WEIGHTS_SHA256
) -> pathlib.Path:
    """The published weights in `folder` (default: `cache_dir()`), downloaded if not yet there.

    The file appears only when complete and of the right hash, so that several processes may fetch
    at once. Raises FileNotFoundError when it cannot be fetched, ValueError on another hash.
    """
    folder = cache_dir() if folder is None else folder
    path = folder / WEIGHTS_FILE
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s to %s", url, path)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        download = pathlib.Path(partial, WEIGHTS_FILE)
        try:
            with urllib.request.urlopen(url, timeout=60) as response, download.open("wb") as file:
                shutil.copyfileobj(response, file)
        except OSError as error:  # urllib's errors are among them
            raise FileNotFoundError(
                f"Could not fetch the Inception weights: {error}. {manual_steps(folder)}"
            ) from error
        check_sha256(download, sha256)
        download.replace(path)
    return path


def manual_steps(folder: pathlib.Path) -> str:
    """What a person does without a network, as the end of a message."""
    return (
        f"Get {WEIGHTS_FILE} (sha256 {WEIGHTS_SHA256}) from {WEIGHTS_URL} and put it into "
        f"{folder}, or give the path of a .pth or .safetensors file (on a command line "
        "--feature-weights PATH)."
    )


def check_sha256(path: pathlib.Path, want: str) -> None:
    """Raise ValueError unless the file has this hash."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != want:
        raise ValueError(f"{path} must have sha256 {want}; got {got}. Is the download complete?")
