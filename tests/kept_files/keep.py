"""Keeps a small set of today's files for the tests of tomorrow's code.

python tests/kept_files/keep.py      # tests/kept_files/VERSION.tar.xz; once for each release

A run of twenty updates, statistics, a sweep of two cells and a set of samples, as the scripts
write them.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
EXPERIMENTS = HERE.parents[1] / "experiments"
TRAIN = [
    *("digits", "--model.channels", "4", "--model.channel-mults", "1", "--model.num-res-blocks"),
    *("1", "--model.attention-resolutions", "--model.norm-groups", "2", "--batch-size", "8"),
    *("--checkpoint-every", "10", "--log-every", "5", "--sample-every", "0"),
    *("--keep-checkpoints", "1", "--workdir", "run"),
]
SWEEP = [
    *("--workdir", "run", "--stats", "pixels.npz", "--out", "sweep", "--etas", "0"),
    *("--num-samples", "8", "--batch-size", "8"),
]
SAMPLES = ["--workdir", "run", "--out", "samples", "--num-sample-steps", "2"]


def run(folder: pathlib.Path, script: str, *arguments: str) -> str:
    """A script in the folder, its paths relative; what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *arguments], cwd=folder, text=True,
        capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    """Make the files, and pack them."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run(folder, "train.py", *TRAIN, "--max-steps", "20")
        run(folder, "make_statistics.py", "digits", "--split", "test", "--features", "pixels",
            "--out", "pixels.npz")  # fmt: skip
        run(folder, "fid_sweep.py", *SWEEP, "--steps", "2", "3")
        run(folder, "sample.py", *SAMPLES, "--num-images", "4")
        path = HERE / f"{importlib.metadata.version('ddim_jax')}.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file() and "tensorboard" not in file.parts:
                    archive.add(file, str(file.relative_to(folder)))
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
