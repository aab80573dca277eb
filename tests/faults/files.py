"""Files that are damaged, cut, made up or absurd, given to everything that reads one.

PYTHONPATH=.:experiments python tests/faults/files.py 3000 [--seed 0]

A reader must give what the whole file gave, or raise a ValueError or FileNotFoundError of its own:
no other exception, no other content where the format has a checksum, nothing run, no more than 10
seconds for one and 2 GiB for all.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pathlib
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from common import sample_set, sweep_store

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.convert.tensors import read_safetensors
from ddim_jax.data.folder import image_folder
from ddim_jax.data.npz import npy_file, npz_file
from ddim_jax.files import read_json, write_json
from ddim_jax.metrics.classifier import (
    Classifier,
    init_classifier,
    load_classifier,
    save_classifier,
)
from ddim_jax.metrics.statistics import FeatureStatistics, load_statistics, save_statistics
from ddim_jax.runs import log
from ddim_jax.runs.folder import read_config, write_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
CANARY = "was_run"


class Kind(NamedTuple):
    """A kind of file: written whole into a folder, read, and whether damage can be told."""

    write: Callable[[pathlib.Path], pathlib.Path]
    """(folder) -> the file that is hurt."""
    read: Callable[[pathlib.Path], Any]
    """(the file) -> its content, comparable by ==."""
    checked: bool
    """Whether content that differs is a fault: the format has a checksum."""


def _images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)


def _write_npz(folder: pathlib.Path) -> pathlib.Path:
    np.savez_compressed(folder / "x.npz", images=_images(), labels=np.arange(6))
    return folder / "x.npz"


def _write_npy(folder: pathlib.Path) -> pathlib.Path:
    np.save(folder / "x.npy", _images())
    return folder / "x.npy"


def _read_images(path: pathlib.Path) -> Any:
    source = (npz_file if path.suffix == ".npz" else npy_file)(path)
    labels = None if source.labels is None else source.labels.tolist()
    return source.images.tobytes(), source.images.shape, labels


def _write_statistics(folder: pathlib.Path) -> pathlib.Path:
    statistics = FeatureStatistics(np.zeros(4), np.eye(4), "pixels", num_samples=9)
    save_statistics(folder / "s.npz", statistics)
    return folder / "s.npz"


def _read_statistics(path: pathlib.Path) -> Any:
    found = load_statistics(path)
    return found.mean.tolist(), found.cov.tolist(), found.features, found.num_samples


def _write_classifier(folder: pathlib.Path) -> pathlib.Path:
    model = Classifier(num_classes=3, width=2)
    params = init_classifier(jax.random.key(0), model, (8, 8, 1))
    save_classifier(folder / "c.safetensors", model, params, {"data": "digits"})
    return folder / "c.safetensors"


def _read_classifier(path: pathlib.Path) -> Any:
    found = load_classifier(path)
    return found.content_hash, found.model.width, found.metadata


def _writer_of_image(kind: str) -> Callable[[pathlib.Path], pathlib.Path]:
    def write(folder: pathlib.Path) -> pathlib.Path:
        PIL.Image.fromarray(_images()[0]).save(folder / f"x.{kind}")
        return folder / f"x.{kind}"

    return write


def _read_folder(path: pathlib.Path) -> Any:
    source = image_folder(path.parent)
    return [source[i]["image"].tobytes() for i in range(len(source))]


def _write_config(folder: pathlib.Path) -> pathlib.Path:
    config = json.loads((ROOT / "tests" / "tiny_config.json").read_text())
    write_config(folder, config)
    return folder / "config.json"


def _write_lines(folder: pathlib.Path) -> pathlib.Path:
    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": 0.5, "grad_norm": 1.0}}\n' for i in range(1, 9))
    )
    return folder / "metrics.jsonl"


def _write_results(folder: pathlib.Path) -> pathlib.Path:
    line = {
        "format": 3, "times": 2, "S": 5, "sampler": "ddim", "eta": 0.0, "guidance_scale": 1.0,
        "spacing": "uniform", "seed": 0, "values": {"fid": 1.5}, "measures": {"fid": {}},
        "seconds": 1.0, "name": "S0005_eta_0",
    }  # fmt: skip
    text = json.dumps(sweep_store.sealed(line))
    (folder / "results.jsonl").write_text(f"{text}\n{text}\n")
    return folder / "results.jsonl"


def _write_samples(folder: pathlib.Path) -> pathlib.Path:
    content = {
        "format": 1, "seed": 0, "num_sample_steps": 5, "spacing": "uniform", "sampler": "ddim",
        "eta": 0.0, "label": None, "guidance_scale": 1.0, "image_shape": [8, 8, 1],
        "batch_size": 4, "fingerprint": {"weights": {"kind": "ema", "step": 3, "hash": "a"}},
        "fingerprint_id": "b", "num_images": 0, "digits": 5, "complete": True,
    }  # fmt: skip
    (folder / "images").mkdir()
    write_json(folder / "samples.json", content)
    return folder / "samples.json"


def _read_samples(path: pathlib.Path) -> Any:
    found = sample_set.find(path.parent)
    return None if found is None else dict(found.content)


def _write_safetensors(folder: pathlib.Path) -> pathlib.Path:
    import safetensors.numpy

    safetensors.numpy.save_file({"a": np.ones((3, 4), np.float32)}, folder / "w.safetensors")
    return folder / "w.safetensors"


def _read_tensors(path: pathlib.Path) -> Any:
    return {name: array.tobytes() for name, array in read_safetensors(path).items()}


def _write_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    with Checkpointer(folder / "c") as checkpointer:
        checkpointer.save(1, {"w": np.arange(64, dtype=np.float32), "step": np.int32(1)})
    files = sorted(path for path in (folder / "c" / "1").rglob("*") if path.is_file())
    return random.choice(files)


def _read_checkpoint(path: pathlib.Path) -> Any:
    root = next(parent for parent in path.parents if parent.name == "c")
    with Checkpointer(root) as checkpointer:
        tree = checkpointer.restore({"w": np.zeros(64, np.float32), "step": np.int32(0)})
    return tree["w"].tobytes(), int(tree["step"])


KINDS: dict[str, Kind] = {
    "images in .npz": Kind(_write_npz, _read_images, True),
    "images in .npy": Kind(_write_npy, _read_images, False),
    "statistics": Kind(_write_statistics, _read_statistics, True),
    "a classifier": Kind(_write_classifier, _read_classifier, True),
    "safetensors": Kind(_write_safetensors, _read_tensors, False),
    "config.json": Kind(_write_config, lambda path: read_config(path.parent), True),
    "results.jsonl": Kind(
        _write_results, lambda path: sweep_store.read_results(path.parent), True
    ),
    "metrics.jsonl": Kind(_write_lines, lambda path: len(log._lines_up_to(path, 9)), False),
    "samples.json": Kind(_write_samples, _read_samples, True),
    "any JSON": Kind(
        lambda folder: (write_json(folder / "a.json", {"a": [1]}), folder / "a.json")[1],
        read_json, False,
    ),
    "a checkpoint": Kind(_write_checkpoint, _read_checkpoint, True),
    **{
        f"a {kind} image": Kind(_writer_of_image(kind), _read_folder, False)
        for kind in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm")
    },
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# How they are hurt


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 4, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _grow(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice((1, 16, 4096))) + content[at:]


def _noise(rng: random.Random, content: bytes) -> bytes:
    return rng.randbytes(rng.choice((1, 8, 100, 10_000)))


def _huge_numbers(rng: random.Random, content: bytes) -> bytes:
    """Some bytes as the largest of integers, as sizes in headers are."""
    changed = bytearray(content)
    at = rng.randrange(min(len(changed), 256))
    huge = struct.pack(rng.choice(("<I", ">I", "<Q", ">Q")), rng.choice((2**31 - 1, 2**32 - 1)))
    changed[at : at + len(huge)] = huge
    return bytes(changed)


def _huge_digits(rng: random.Random, content: bytes) -> bytes:
    """A number written in digits as one of many more."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if not places:
        return _noise(rng, content)
    at = rng.choice(places)
    return (
        content[:at] + rng.choice((b"10000000000000", b"-1", b"1e999", b"0.5")) + content[at + 1 :]
    )


def _deep(rng: random.Random, content: bytes) -> bytes:
    return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000


def _another_json(rng: random.Random, content: bytes) -> bytes:
    value = rng.choice(([], {}, None, 3, "a", {"format": 99}, {"format": []}, [1, {"a": None}]))
    return json.dumps(value).encode()


def _pickle(rng: random.Random, content: bytes) -> bytes:
    """What numpy and torch would run."""
    import pickle

    class Canary:
        def __reduce__(self):
            return os.mkdir, (CANARY,)

    array = np.array([Canary()], dtype=object)
    file = io.BytesIO()
    if content[:2] == b"PK":
        np.savez(file, images=array, mu=array, sigma=array, allow_pickle=True)
    elif content[:6] == b"\x93NUMPY":
        np.save(file, array, allow_pickle=True)
    else:
        pickle.dump(Canary(), file)
    return file.getvalue()


def _bomb(rng: random.Random, content: bytes) -> bytes:
    """A gigabyte of zeros in a thousandth of it; of pictures one that claims as much."""
    if content[:2] == b"PK":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("images", "mu", "sigma"):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    shape = (2**30 // 192, 8, 8, 3)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for _ in range(2**30 // 2**24):
                        member.write(bytes(2**24))
                break  # one takes seconds to make
        return file.getvalue()
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        import zlib

        size = struct.pack(">II", 2**15, 2**15)
        head = b"IHDR" + size + content[24:29]
        return (
            content[:8]
            + struct.pack(">I", 13)
            + head
            + struct.pack(">I", zlib.crc32(head))
            + content[33:]
        )
    return _huge_numbers(rng, content)


WAYS = (_flip, _flip, _flip, _cut, _cut, _grow, _noise, _huge_numbers, _huge_numbers, _huge_digits,
        _huge_digits, _deep, _another_json, _pickle)  # fmt: skip


def fault_of(kind: Kind, way: Callable[..., bytes], rng: random.Random) -> str | None:
    """What a reader did that it must not do; None if it read or refused as it should."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = kind.write(folder)
        want = kind.read(path)
        path.write_bytes(way(rng, path.read_bytes()))
        started = time.monotonic()
        try:
            found = kind.read(path)
        except (ValueError, FileNotFoundError) as error:
            fault = None if _is_ours(error) else f"{type(error).__name__} from below: {error}"
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
        else:
            fault = "another content" if kind.checked and not _holds(found, want) else None
        if time.monotonic() - started > 10:
            fault = f"{time.monotonic() - started:.0f} s"
        if pathlib.Path(CANARY).exists():
            pathlib.Path(CANARY).rmdir()
            fault = "code in it was run"
    return fault and " ".join(fault.split())[:160]


def _holds(found: Any, want: Any) -> bool:
    """The same, or with one key more: a bit in the word "seal" leaves the rest as it was."""
    if isinstance(found, dict) and isinstance(want, dict):
        return all(name in found and found[name] == want[name] for name in want)
    return found == want


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = "" if trace is None else trace.tb_frame.f_code.co_filename
    return "ddim_jax" in file or "experiments" in file


def main(arguments: Sequence[str] | None = None) -> int:
    """Hurt so many files; print what was wrong, and the most memory; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    import logging

    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    rng, found = random.Random(asked.seed), collections.Counter()
    random.seed(asked.seed)
    cases = [(name, rng.choice(WAYS)) for name in KINDS for _ in range(asked.count // len(KINDS))]
    cases += [("images in .npz", _bomb), ("statistics", _bomb), ("a png image", _bomb)]
    for name, way in cases:
        if fault := fault_of(KINDS[name], way, rng):
            found[f"{name}, {way.__name__}: {fault}"] += 1
    for fault, times in sorted(found.items()):
        print(f"{times} x {fault}")
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    faults = sum(found.values()) + (gib > 2)
    print(f"{len(cases)} files, {faults} faults, at most {gib:.2f} GiB")
    return faults


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
