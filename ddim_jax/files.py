"""Files that are whole or refused: atomic writing, guarded reading, one process to a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from ddim_jax.paths import local_path

SEAL = "seal"

# ---------------------------------------------------------------------------------------------
# Writing


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a kill, a full disk or a power cut leaves the old content or the new.

    When writing fails nothing new stays in the folder. A kill may leave a `.new` file beside it,
    which the next call for the same file deletes.
    """
    path = local_path(path)
    for new in path.parent.glob(f"{glob.escape(path.name)}.*.new"):
        if _LEFT_BY_A_KILL.search(new.name):
            _delete_if_left(new)
    with written_whole(path) as file:
        file.write(content)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The same for content that comes piece by piece, and into folders of many files, in which it
    looks for nothing: a file to write it to.
    """
    path = local_path(path)
    new, file = _new_beside(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        if error.errno is None or error.filename not in (None, str(new)):
            raise  # of another file, or said already
        raise type(error)(error.errno, error.strerror, str(path)) from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _new_beside(path: pathlib.Path) -> tuple[pathlib.Path, BinaryIO]:
    """A file to write to, held as long as it is open, where the file system has locks."""
    while True:
        # A name of its own, for two processes may write the same file.
        new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        try:
            file = new.open("xb")
        except OSError as error:
            if error.errno is None:
                raise
            raise type(error)(error.errno, error.strerror, str(path)) from error
        _lock(file)
        if new.exists():
            return new, file
        file.close()  # between the two lines another process took it for a dead one's


def _lock(file: BinaryIO) -> bool:
    """Hold an open file until it is closed or the process dies; whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another holds it, or the file system has no locks
        return False
    return True


def _delete_if_left(new: pathlib.Path) -> None:
    """Delete a file that a process was writing which is dead, so that nobody holds it."""
    with contextlib.suppress(FileNotFoundError, PermissionError), new.open("rb") as file:
        if _lock(file):
            new.unlink(missing_ok=True)


def write_json(
    path: str | os.PathLike[str], content: Mapping[str, Any], indent: int | None = 2
) -> None:
    """Write a JSON object whole, with a seal that `read_json` compares."""
    write_whole(path, (json.dumps(sealed(content), indent=indent) + "\n").encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a hash of all the rest under "seal": a digit that flips is found."""
    return {**content, SEAL: _seal_of(content)}


def _seal_of(content: Mapping[str, Any]) -> str:
    # As it will be read: lists for tuples, names for numbers as keys.
    read = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]


def _sync_folder(folder: pathlib.Path) -> None:
    """Bring the names in a folder to the disk, where its file system can."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:  # some that reach over a network cannot, and the file is there
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------
# Reading


def read_json(
    path: str | os.PathLike[str], *, way_out: str = "Restore it or make it anew."
) -> dict[str, Any]:
    """The object in a JSON file, without its seal.

    Raises FileNotFoundError without a file, and ValueError, ending in `way_out`, when it is
    damaged, does not fit its seal, or holds something else than an object.
    """
    path = local_path(path)
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no text are one too
        raise ValueError(f"{path} is not JSON, or damaged ({error}). {way_out}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a JSON object, {{...}}; it has a {type(content).__name__}. {way_out}"
        )
    with naming(path):
        return unsealed(content, way_out)


def parsed(text: str) -> Any:
    """What a piece of JSON says; ValueError for what is none, or nested too deeply to read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def unsealed(content: Mapping[str, Any], way_out: str) -> dict[str, Any]:
    """The object without its seal, if it has one; ValueError if that does not fit the rest."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != _seal_of(rest):
        raise ValueError(
            f"it is not what was written, since its {SEAL!r} does not fit. {way_out} If you "
            f"changed it on purpose, delete the {SEAL!r} too."
        )
    return rest


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's path before the message of a ValueError about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_npz(
    path: str | os.PathLike[str],
    what: str,
    names: Collection[str] | None = None,
    *,
    way_out: str = "Copy it again, or make it anew.",
) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; those called `names` alone, where it has them, if given.

    what: what the file is to hold, in words; for messages, as is `way_out`, their last sentence.

    Nothing is unpickled. Every array's checksum is compared, so that a damaged one is not returned.
    Raises FileNotFoundError without a file, and ValueError when it is no .npz file, or damaged,
    truncated or pickled.
    """
    with _opened_npz(path, what, way_out) as archive:
        return {
            name: _read_array(archive, name)
            for name in _array_names(archive)
            if names is None or name in names
        }


def npz_names(
    path: str | os.PathLike[str], what: str, *, way_out: str = "Copy it again, or make it anew."
) -> list[str]:
    """The names of the arrays of a .npz file, none of them read; see `read_npz`."""
    with _opened_npz(path, what, way_out) as archive:
        return _array_names(archive)


@contextlib.contextmanager
def _opened_npz(path: str | os.PathLike[str], what: str, way_out: str) -> Iterator[zipfile.ZipFile]:
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of {what}, a .npz file.")
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("not a whole zip archive")
        with zipfile.ZipFile(path) as archive:
            yield archive
    # Damage reaches numpy, zipfile and zlib anywhere: they raise a dozen kinds and promise none.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as {what}, plain arrays in a .npz file "
            f"({str(error) or type(error).__name__}). {way_out}"
        ) from error


def _array_names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > max(_UNPACKED, _RATIO * member.compress_size):
        raise ValueError(
            f"{name} would become {member.file_size / 2**30:.1f} GiB from "
            f"{member.compress_size / 2**20:.1f} MiB; if that is meant, write it uncompressed, "
            "with np.savez"
        )
    with archive.open(member) as file:
        check_array_size(file, member.file_size)
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        # np.load stops here. Only the end of a member has its checksum compared.
        if file.read(1):
            raise ValueError(f"{name} has more bytes than its shape {array.shape} says")
    return array


_UNPACKED, _RATIO = 2**28, 100
"""Bytes that may come out of a compressed array of any size, and how many times its own beyond."""


def check_array_size(file: Any, size: int) -> None:
    """Raise ValueError unless the .npy file of so many bytes is as large as its header says.

    So that memory for what a header claims is not asked for in vain.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"it is of version {version} of NumPy's format, not 1.0 or 2.0")
    shape, _, dtype = readers[version](file)
    claimed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and claimed != size - file.tell():
        raise ValueError(
            f"its shape {shape} of {dtype} is {claimed} bytes; it has {size - file.tell()}"
        )


# ---------------------------------------------------------------------------------------------
# Settings, and who may write them


def differences(
    there: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Collection[str] = frozenset()
) -> list[str]:
    """One line for each setting that differs: "key is X there and Y now", sorted.

    Those of a mapping inside a mapping are called by their dotted key, "model.channels", in
    `ignore` too. A key that is absent is the same as None. Values are compared as they are: a tuple
    is not the list that JSON makes of it.
    """
    return sorted(_differences(there, wanted, ignore, ""))


def _differences(
    there: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Collection[str], prefix: str
) -> Iterator[str]:
    for key in there.keys() | wanted.keys():
        name = f"{prefix}{key}"
        old, new = there.get(key), wanted.get(key)
        if name in ignore:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, ignore, f"{name}.")
        elif old != new:
            yield f"{name} is {old!r} there and {new!r} now"


def clear_leftovers(*folders: pathlib.Path) -> None:
    """Delete what a kill left of files that `written_whole` was writing into these folders.

    Whoever calls this holds them (`only_one_process`).
    """
    for path in (path for folder in folders for path in folder.glob("*.new")):
        if _LEFT_BY_A_KILL.search(path.name):
            path.unlink()


_LEFT_BY_A_KILL = re.compile(r"\.[0-9a-f]{8}\.new$")


@contextlib.contextmanager
def only_one_process(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder; ValueError if another process does. A killed process lets go of it.

    What a kill left of files in it, and in its folder of samples, is deleted.
    """
    folder = local_path(folder, "folder", "folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another process of this command; wait for it, or give "
                "another folder."
            ) from error
        clear_leftovers(folder, folder / "samples")
        yield
