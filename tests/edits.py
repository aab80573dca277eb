"""Files of the project as a test changes them: without the seal, which says that nobody did."""

import json
import pathlib
from typing import Any


def content(path: str | pathlib.Path) -> dict[str, Any]:
    """What a JSON file holds beside its seal."""
    return without_seal(json.loads(pathlib.Path(path).read_text()))


def without_seal(found: dict[str, Any]) -> dict[str, Any]:
    """The rest, which must have been sealed."""
    assert len(found.pop("seal")) == 16
    return found
