"""What ../same_bits.py runs inside one tree: probes that leave arrays, pictures and numbers behind.

PYTHONPATH=TREE python tests/same_bits_probes PROBE FOLDER [--quick] [--old FOLDER]

runs in the tree's root and writes FOLDER/PROBE/*, which is compared, and FOLDER/work/*, which is
not: the runs that later probes open. A probe goes on after a part of it failed; exit code 1 says
that one did. `layout` alone knows what the old and the new tree call differently.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import ddim_jax


def main() -> int:
    """Run one probe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("probe")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--old", type=pathlib.Path)
    args = parser.parse_args()
    tree = pathlib.Path.cwd()
    if not pathlib.Path(ddim_jax.__file__).is_relative_to(tree):
        raise SystemExit(f"ddim_jax must be that of {tree}; got {ddim_jax.__file__}.")
    if args.probe in ("core", "networks"):
        _arrays(args.probe, args.folder / args.probe, args.quick)
    else:
        import scripts

        (args.folder / "work").mkdir(exist_ok=True)
        if args.probe == "go_on":
            scripts.go_on(args.folder, args.old)
        else:
            {f.__name__: f for f in scripts.SCRIPTS}[args.probe](args.folder, args.quick)

    from parts import FAILED

    return int(bool(FAILED))


def _arrays(probe: str, folder: pathlib.Path, quick: bool) -> None:
    import numpy as np
    from parts import part

    folder.mkdir()
    if probe == "core":
        from golden import golden
        from library import LIBRARY
        from samplers import SAMPLERS

        sections = (*SAMPLERS, *LIBRARY, golden)
    else:
        from networks import NETWORKS

        sections = NETWORKS
    for section in sections:
        with part(section.__name__):
            np.savez(folder / f"{section.__name__}.npz", **section(quick))


if __name__ == "__main__":
    sys.exit(main())
