"""The door that every path comes through: `~` expanded once, what is no local path refused.

An option of a command line that is a path has the type `Folder`, `File`, `AnyPath` or `DataName`,
by which `runs.options.with_local_paths` finds it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from typing import Annotated, Literal, TypeAlias

Kind: TypeAlias = Literal["folder", "file", "any"]


@dataclasses.dataclass(frozen=True)
class PathOption:
    """What marks the type of an option as a path."""

    kind: Kind


Folder: TypeAlias = Annotated[str, PathOption("folder")]
"""Of a folder that is there, or will be made."""
File: TypeAlias = Annotated[str, PathOption("file")]
"""Of a file that is there, or will be written."""
AnyPath: TypeAlias = Annotated[str, PathOption("any")]
"""Of either."""
DataName: TypeAlias = Annotated[str, PathOption("any")]
"""What `load_images` takes: a path, or the name of a data set, which passes unchanged."""

# One letter is no scheme but a folder of Windows; pathlib makes gs:/ of gs://.
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def expanded(path: str | os.PathLike[str], name: str = "path") -> str:
    """The path or name with its `~` expanded, otherwise as it is spelt.

    Raises ValueError, which calls it `name`, for an empty one, for a remote one such as
    gs://bucket/run, and for the `~` of an unknown user.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name} must be a path, or text; got {type(path).__name__}.")
    text = os.fspath(path)
    if not text:
        raise ValueError(f"{name} must be a path; got ''. The folder you are in is '.'.")
    if match := _REMOTE.match(text):
        raise ValueError(
            f"{name} must be a path of this machine; got {text}, and {match[0]}/ paths "
            "are not supported yet. Mount the place (gcsfuse, s3fs), or copy what is there and "
            "give the copy's path."
        )
    home = os.path.expanduser(text)
    if text.startswith("~") and home == text:
        raise ValueError(
            f"{name} begins with {text.partition('/')[0]}, the home of a user unknown here; got "
            f"{text}. Write it out, or ./{text} for a folder of that name."
        )
    return home


def local_path(
    path: str | os.PathLike[str], name: str = "path", kind: Kind = "any"
) -> pathlib.Path:
    """The path with its `~` expanded. It need not exist.

    Raises ValueError, which calls it `name`, for what `expanded` refuses, for a file where `kind`
    is "folder", and for a folder where it is "file".
    """
    local = pathlib.Path(expanded(path, name))
    if kind == "folder" and local.exists() and not local.is_dir():
        raise ValueError(f"{name} must be a folder; {local} is a file. Give another path.")
    if kind == "file" and local.is_dir():
        raise ValueError(f"{name} must be a file; {local} is a folder. Give a file in it.")
    return local
