"""What a sweep found, to look at: report.md, and report.html, one file a person can send on.

python experiments/sweep_report.py DIR     # anew, from DIR/results.jsonl
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import tyro
from common import cli
from common.sweep_page import write_report
from common.sweep_store import read_results
from common.sweep_table import PaperTable

from ddim_jax.paths import Folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the report of a sweep again."""

    out: Annotated[Folder, tyro.conf.Positional]
    """The sweep's folder."""
    paper: PaperTable | None = None
    """Show these numbers of the paper beside the sweep's; those it was made with if not given."""


def main(config: ReportConfig) -> None:
    """Write report.md and report.html."""
    out = pathlib.Path(config.out)
    if not read_results(out):
        raise ValueError(f"{out} has no results.jsonl; make one with experiments/fid_sweep.py.")
    write_report(out, config.paper)
    print(out / "report.html")


if __name__ == "__main__":
    cli.run(main, ReportConfig)
