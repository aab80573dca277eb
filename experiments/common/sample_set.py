"""A folder of samples that says what it is: samples.json, and one PNG for each image.

samples.json is written first, with all that decides the images, how many were asked for, and
whether they are all there. So a call that was killed goes on where it stands, no other images come
among them, and whoever measures them knows what they are.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from common import pictures, times
from common.exact import exact
from common.options import DataOptions
from ddim_jax.checks import check_types
from ddim_jax.data.folder import FolderSource
from ddim_jax.data.images import opened
from ddim_jax.data.load import load_images
from ddim_jax.data.source import ImageSource, decoding_threads, facts_of
from ddim_jax.files import clear_leftovers, differences, read_json, write_json, written_whole
from ddim_jax.metrics.origin import NOT_CROPPED, Origin, origin_of
from ddim_jax.paths import local_path
from ddim_jax.runs import Run, weights_called

FORMAT = 1
RECORD = "samples.json"
NOT_COMPARED = frozenset({"format", "num_images", "complete", "batch_size", "fingerprint_id"})
"""Neither decides an image: in other batches an image is the same up to rounding."""


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """Where the images of a set stand, and what it holds."""

    record: pathlib.Path
    """Its samples.json."""
    images: pathlib.Path
    """The folder of PNGs, which holds nothing else."""
    content: Mapping[str, Any]
    """What samples.json says."""

    @property
    def num_images(self) -> int:
        """How many were asked for."""
        return self.content["num_images"]

    @property
    def complete(self) -> bool:
        """Whether all of them were written."""
        return self.content["complete"]

    def path(self, index: int) -> pathlib.Path:
        """The file of an image."""
        return self.images / f"{index:0{self.content['digits']}d}.png"

    def missing(self) -> list[int]:
        """The indices of the images that are not there, or have no bytes, as disks that lost power
        leave them.
        """
        there = {path.name for path in self.images.glob("*.png") if path.stat().st_size > 0}
        return [i for i in range(self.num_images) if self.path(i).name not in there]

    def save(self, indices: Iterable[int], images: UInt8[np.ndarray, "N H W C"]) -> None:
        """Write images, each of them whole."""
        with decoding_threads() as pool:
            # The list is what raises a thread's error here.
            list(pool.map(pictures.save_png, map(self.path, map(int, indices)), images))

    def read(self, num_images: int | None = None) -> Iterator[UInt8[np.ndarray, "H W C"]]:
        """The first images, all if None, one at a time."""
        for index in range(num_images or self.num_images):
            with opened(str(self.path(index)), str(self.path(index))) as image:
                yield np.asarray(image).reshape(self.content["image_shape"])

    def save_npz(self, path: pathlib.Path) -> None:
        """All images as uint8 (N, H, W, C) under "images", without holding them all in memory."""
        header = {
            "descr": "|u1",
            "fortran_order": False,
            "shape": (self.num_images, *self.content["image_shape"]),
        }
        with (
            written_whole(path) as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("images.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for image in self.read():
                member.write(image.tobytes())

    def finished(self) -> SampleSet:
        """Say that all images are there; the set that samples.json describes now."""
        return self._written({**self.content, "complete": True})

    def _written(self, content: Mapping[str, Any]) -> SampleSet:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.record, content)
        return dataclasses.replace(self, content=content)

    def summary(self) -> str:
        """What decides the images, in a line."""
        c = self.content
        of = c["fingerprint"]["weights"]
        parts = [
            f"seed {c['seed']}",
            f"S {c['num_sample_steps']} {times.shown(c['spacing'])}",
            rule_of(c["sampler"], c["eta"]),
            f"class {c['label']}" if c.get("label") is not None else "",
            f"guidance {exact(c['guidance_scale'])}" if c["guidance_scale"] != 1 else "",
            "x0 clipped" if c["fingerprint"].get("clip_x0") else "",
            weights_called(of["kind"], of["step"]),
            f"run {c['fingerprint_id']}",
        ]
        return ", ".join(filter(None, parts))


def settings_of(run: Run, **asked: Any) -> dict[str, Any]:
    """All that decides a set's images: what was asked for, by samples.json's names, and the run."""
    return {
        **asked,
        "image_shape": run.spec.image_shape,
        "fingerprint": run.fingerprint,
        "fingerprint_id": run.fingerprint_id,
    }


def rule_of(sampler: str, eta: float | None) -> str:
    """How images are drawn, in words: "eta 0.5", "sigma-hat", "mine, eta 0.5"."""
    words = [] if sampler == "ddim" else [sampler.replace("sigma_hat", "sigma-hat")]
    return ", ".join(words if eta is None else [*words, f"eta {exact(eta)}"])


def open_to_draw(
    record: pathlib.Path,
    images: pathlib.Path,
    settings: Mapping[str, Any],
    num_images: int,
    digits: int = 5,
) -> SampleSet:
    """The set of these settings: a new one, or the one that is there, to be gone on with.

    `settings` is all that decides the images; `num_images` may be more than were asked for before.
    Raises ValueError where images of other settings, of unknown origin, or more of them are there.
    Whoever calls this holds the folder (`only_one_process`).
    """
    settings = json.loads(json.dumps(settings))  # as it will be read: lists for tuples
    asked = {"num_images": num_images, "digits": digits, "complete": False}
    wanted = SampleSet(record, images, {"format": FORMAT, **settings, **asked})
    clear_leftovers(record.parent, images)
    if files := _files(images, record):
        there = _read(record, images)
        if there is None:
            raise ValueError(
                f"out {images} holds {len(files)} images or other files and there is no {record}, "
                "so nobody knows of which model and settings; delete them or give another folder."
            )
        if differ := differences(there.content, wanted.content, NOT_COMPARED):
            raise ValueError(
                f"out {record.parent} holds samples of other settings: {'; '.join(differ)}. Give "
                "the same settings to go on with them, or another folder."
            )
        _check_files(wanted, files)
        if there.complete and there.num_images == num_images and not wanted.missing():
            return there
    return wanted._written(wanted.content)


def find(path: str | pathlib.Path) -> SampleSet | None:
    """The complete set that a folder of images, the folder around it or a .npz in it belongs to.

    None for images without a samples.json. Raises ValueError for a set that is not complete, and
    where the files are others than it says.
    """
    path = local_path(path, "path")
    folder = path.parent if path.suffix == ".npz" else path
    inside = folder / "images"
    found = _read(folder / RECORD, inside if inside.is_dir() else folder)
    if found is None and folder.name == "images":
        found = _read(folder.parent / RECORD, folder)
    if found is None:
        return None
    if not found.complete:
        there = found.num_images - len(found.missing())
        raise ValueError(
            f"{found.images} is not complete: {there} of the {found.num_images} images that "
            f"{found.record} says are there. Call what draws them again with the same settings, "
            "which goes on from there."
        )
    _check_files(found, _files(found.images, found.record))
    if missing := found.missing():
        raise ValueError(
            f"{found.images} lacks {len(missing)} of the {found.num_images} images that "
            f"{found.record} says, {found.path(missing[0]).name} first. Call what draws them again "
            "with the same settings."
        )
    return found


_CONTENT = {
    **dict.fromkeys(("num_images", "seed", "num_sample_steps", "digits", "batch_size"), int),
    **dict.fromkeys(("spacing", "sampler", "fingerprint_id"), str),
    **dict.fromkeys(("fingerprint", "fingerprint.weights"), dict),
    "complete": bool,
    "eta": float | None,
    "label": int | None,
    "guidance_scale": float,
    "image_shape": tuple[int, int, int],
}


def _read(record: pathlib.Path, images: pathlib.Path) -> SampleSet | None:
    """The set that a samples.json describes; None without one. Raises ValueError for a bad one."""
    if not record.is_file():
        return None
    content = read_json(record, way_out="Delete it and the images, and draw them anew.")
    if (found := content.get("format")) != FORMAT:
        raise ValueError(
            f"{record} must be of format {FORMAT}, which this version reads; got {found!r}. Use "
            "the version that wrote it, or a newer one."
        )
    content: dict[str, Any] = {"label": None, **content}
    try:
        check_types(content, _CONTENT)
        needed = (key for key in _CONTENT if key not in ("fingerprint.weights", "batch_size"))
        if missing := [key for key in needed if key not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}.")
        if missing := {"kind", "step"} - content["fingerprint"].get("weights", {}).keys():
            raise ValueError(f"fingerprint.weights lacks {', '.join(sorted(missing))}.")
    except ValueError as error:
        raise ValueError(
            f"{record} does not describe a set of samples: {error} Delete it and the images, and "
            "draw them anew."
        ) from error
    return SampleSet(record, images, content)


def _files(images: pathlib.Path, record: pathlib.Path) -> list[pathlib.Path]:
    """All files below the folder of images, sorted, but for hidden ones and samples.json."""
    below = (path.relative_to(images) for path in images.rglob("*") if not path.is_dir())
    return sorted(
        path
        for path in below
        if images / path != record and not any(part.startswith(".") for part in path.parts)
    )


def _check_files(wanted: SampleSet, files: Sequence[pathlib.Path]) -> None:
    """Raise ValueError for files that are not images of the set."""
    own = {wanted.path(i).name for i in range(wanted.num_images)}
    strange = [str(file) for file in files if str(file) not in own]
    numbered = [name for name in strange if re.fullmatch(r"\d+\.png", name)]
    if numbered:
        raise ValueError(
            f"{wanted.images} holds {len(numbered)} more than the {wanted.num_images} images asked "
            f"for, {numbered[0]} is one; delete what is more, or give another folder."
        )
    if strange:
        others = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"{wanted.images} must hold nothing but its {wanted.num_images} images; it has "
            f"{strange[0]}{others}. Move it away."
        )


def open_images(name: str, options: DataOptions) -> tuple[ImageSource, str, Origin]:
    """The images called `name`, one at a time in memory, how many of what they are, and how they
    came to be.

    Of a set with a samples.json what that says; of another folder the kinds of its files. Raises
    ValueError where `find` does, and what `load_images` does.
    """
    samples, path = find(name), name
    if samples is not None and not name.endswith(".npz"):
        path = str(samples.images)
    source = load_images(
        path,
        split=options.split,
        data_dir=options.data_dir,
        image_size=options.image_size,
        crop=options.crop,
        in_memory=False,
    )
    count = len(source)
    if samples is None:
        kinds = f" ({_kinds(source)})" if isinstance(source, FolderSource) else ""
        origin = origin_of(facts_of(source), count)
        if options.image_size is None and options.crop is None and origin.crop == NOT_CROPPED:
            origin = origin._replace(crop=None)  # they may have been cropped before
        return source, f"{count} images of {source.name}{kinds}", origin
    if count != samples.num_images:
        raise ValueError(
            f"{name} holds {count} images, and {samples.record} says {samples.num_images}; draw "
            "them anew."
        )
    return source, f"{count} images of {samples.summary()}", Origin(lossy=0.0)


def _kinds(source: FolderSource) -> str:
    """How many files of which kinds: "398 png, 2 jpg, 32x32"."""
    suffixes = collections.Counter(pathlib.Path(path).suffix.lower() for path in source.paths)
    height, width, _ = source.image_shape
    return ", ".join(
        [
            *(f"{count} {suffix[1:]}" for suffix, count in suffixes.most_common()),
            f"{width}x{height}",
        ]
    )
