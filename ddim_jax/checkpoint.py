"""Checkpoints of any pytree, with orbax: saved in the background, the last few kept.

A checkpoint is a folder named after its step. Orbax writes it under another name and renames it
when it is whole, so a run that is killed while saving leaves the checkpoint before it usable.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


class Checkpointer:
    """The checkpoints in one folder.

    Leaves may be arrays on the host or on a device, numbers, and PRNG keys of either style. Every
    process must make the same calls. Use it as a context manager, or call `close`, so that a save
    still under way is finished.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        """Creates `directory` if it is absent; the newest `keep` checkpoints stay in it."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        self.directory = pathlib.Path(directory).expanduser().absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers=ocp.PyTreeCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )

    def all_steps(self) -> list[int]:
        """The steps with a whole checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step with a whole checkpoint, or None."""
        return max(self.all_steps(), default=None)

    def save(self, step: int, tree: Any) -> None:
        """Saves `tree` as of `step`; returns once it is copied and may be changed or donated.

        A step that is already there is left as it is. A step before the newest one is refused
        with ValueError, since the newest is what a run resumes from.
        """
        latest = self.latest_step()
        if step == latest:
            return
        if latest is not None and step < latest:
            raise ValueError(
                f"step must be after the newest checkpoint in {self.directory}, {latest}; "
                f"got {step}. To go on from an earlier step, move the later ones away."
            )
        self._manager.save(step, args=ocp.args.PyTreeSave(tree))

    def restore(self, template: Tree, step: int | None = None, *, partial: bool = False) -> Tree:
        """The tree saved at `step` (newest if None), bit for bit, with the template's structure.

        The template's leaves are arrays, `jax.ShapeDtypeStruct`s (of `jax.eval_shape`) or numbers;
        an array comes back where the template's one is, a numpy array on the host. With `partial`
        the template may leave out parts of what was saved, and only its own parts are read:
        restore({"ema_params": params}, partial=True) needs no optimizer.

        Raises ValueError if there is no such checkpoint, if it is damaged, or if names, shapes or
        dtypes differ from the template's, listing them.
        """
        step = self._existing_step(step)
        path = self.directory / str(step)
        try:
            saved = self._manager.item_metadata(step).tree
        except Exception as error:
            raise self._damaged(path, error) from error
        _check_same(path, _leaves(saved), _leaves(template), partial)
        item = jax.tree.map(_abstract, template)
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=partial,
        )
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:
            raise self._damaged(path, error) from error

    def wait(self) -> None:
        """Returns when every save is on disk; raises what a save in the background raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves under way and lets go of the folder."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:  # noqa: D105
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        self.close()

    def _existing_step(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise ValueError(
                f"{self.directory} has no whole checkpoint. Train or convert into this folder "
                "first, or give the folder of a finished one."
            )
        if step is not None and step not in steps:
            raise ValueError(f"step must be one of {steps} in {self.directory}; got {step}.")
        return steps[-1] if step is None else step

    def _damaged(self, path: pathlib.Path, error: Exception) -> ValueError:
        others = [step for step in self.all_steps() if str(step) != path.name]
        return ValueError(
            f"the checkpoint {path} is damaged ({type(error).__name__}: {str(error)[:300]}). "
            + (
                f"Move it away to go on from step {others[-1]}."
                if others
                else "It is the only one here: copy it again, or start in a new folder."
            )
        )


def _abstract(leaf: Any) -> Any:
    """What orbax needs to know of a leaf; an array without a place goes to the first device."""
    if isinstance(leaf, (np.ndarray, np.generic, int, float)):
        return leaf
    place = getattr(leaf, "sharding", None)
    if place is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path -> (shape, dtype) as stored; a typed key is stored as its uint32 data."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = (shape if shape is not None else np.shape(leaf), dtype)
    return leaves


def _check_same(path: pathlib.Path, saved: dict, wanted: dict, partial: bool) -> None:
    missing = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    extra = [f"{name} is only in the checkpoint" for name in saved if name not in wanted]
    differ = [
        f"{name} is {saved[name]} in the checkpoint, {wanted[name]} is wanted"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    lines = missing + differ + ([] if partial else extra)
    if lines:
        shown = "\n  ".join(lines[:10] + ([f"and {len(lines) - 10} more"] if lines[10:] else []))
        raise ValueError(
            f"the checkpoint {path} is of another network or training set-up:\n  {shown}\n"
            "Use the configuration it was saved with, or another folder."
        )
