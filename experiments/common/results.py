"""results.json: what a script found, beside what was asked for and what it was found with."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ddim_jax.files import write_whole
from ddim_jax.runs import Run

FORMAT = 2
"""Format 1, which has no number, has no fingerprint either."""


def write_results(
    out: pathlib.Path, config: Any, found: Mapping[str, Any], run: Run | None = None
) -> None:
    """Write out/results.json: the options, the run's fingerprint if there is a run, the results."""
    fingerprint = {} if run is None else {"fingerprint": run.fingerprint}
    content = {"format": FORMAT, **dataclasses.asdict(config), **fingerprint, **found}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "results.json", (json.dumps(content, indent=2) + "\n").encode())
