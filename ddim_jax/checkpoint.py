"""Checkpoints of any pytree, with orbax: saved in the background, the last few kept.

A checkpoint is a folder named after its step. Orbax writes it under another name and renames it
when it is whole, so a run that is killed while saving leaves the checkpoint before it usable. With
it stands the hash of each array, which is compared when the array is read: a bit that flipped on
the disk is damage, not another number. Checkpoints of before there were hashes are read without.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ddim_jax.paths import local_path

Tree = TypeVar("Tree")

HASHES, FORMAT = "ddim_jax", 1
"""Where the hashes stand in a checkpoint's metadata, and how."""


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read, or whose arrays are not those that were saved."""


class Checkpointer:
    """The checkpoints in one folder.

    Leaves may be arrays on the host or on a device, numbers, and PRNG keys of either style. With
    several processes, each makes the same calls with the same values, and the first one writes.
    Use it as a context manager, or call `close`, so that a save still under way is finished.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int | None = None,
        on_saved: Callable[[int], object] = lambda step: None,
    ):
        """Saves into `directory`, made when needed, where the newest `keep` checkpoints stay.

        So do, for ever, those whose step is a multiple of `keep_every`. `on_saved(step)` is called
        once a checkpoint is whole on disk, in the background.
        """
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self._keep_every = keep_every
        self.directory = local_path(directory, "directory", "folder").absolute()
        self._keep = keep
        self._on_saved, self._saving = on_saved, 0
        self._may_have_leftovers = True

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:  # made late: reading must not make the folder
        try:
            return self._new_manager()
        except RecursionError as error:  # it reads the metadata of all
            raise DamagedCheckpointError(
                f"a _CHECKPOINT_METADATA in {self.directory} is damaged: it is nested too deeply. "
                "Move its checkpoint away."
            ) from error

    def _new_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            item_handlers=ocp.PyTreeCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                keep_period=self._keep_every,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._saved),
            ),
        )

    def all_steps(self) -> list[int]:
        """The steps saved, ascending; what a killed run was still saving is not among them."""
        return sorted(self._manager.all_steps()) if self.directory.is_dir() else []

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return max(self.all_steps(), default=None)

    def save(self, step: int, tree: Any) -> None:
        """Saves `tree` as of `step`; returns once it is copied and may be changed or donated.

        The newest step, when saved again, is left as it is. One before it is refused with
        ValueError, since a run resumes from the newest.
        """
        latest = self.latest_step()
        if step == latest:
            return
        if latest is not None and step < latest:
            raise ValueError(
                f"step must be after the newest checkpoint in {self.directory}, {latest}; "
                f"got {step}. To go on from an earlier step, move the later ones away."
            )
        self.wait()
        self._clear_leftovers()
        # On the host, so that what is saved knows no device: any number of them can restore it.
        # Copied, since a CPU array's host view shares memory that the next step may be given.
        tree = jax.tree.map(np.array, jax.device_get(jax.tree.map(_without_key_type, tree)))
        self._saving = step
        hashes = {HASHES: {"format": FORMAT, "sha256": _hashes(_named_leaves(tree))}}
        with self._naming_what_was_saved():
            self._manager.save(step, args=ocp.args.PyTreeSave(tree), custom_metadata=hashes)

    def restore(self, template: Tree, step: int | None = None, *, partial: bool = False) -> Tree:
        """The tree saved at `step`, bit for bit, with the template's structure.

        With None it is the newest that is whole: a warning names those after it that are damaged.

        The template's leaves are arrays, `jax.ShapeDtypeStruct`s (of `jax.eval_shape`) or numbers;
        a JAX array comes back where the template's one is, a NumPy array on the host. With
        `partial` the template may leave out parts of what was saved, and only its own are read:
        restore({"ema_params": params}, partial=True) needs no optimizer.

        Raises ValueError if there is no such checkpoint, or if names, shapes or dtypes differ from
        the template's, listing them; DamagedCheckpointError, which is one, if it is damaged, or all
        are.
        """
        if step is None:
            return self.restore_newest(template, partial=partial)[0]
        self.wait()
        return self._restored(template, self._existing_step(step), partial)

    def restore_newest(self, template: Tree, *, partial: bool = False) -> tuple[Tree, int]:
        """What `restore` returns without a step, and the step it is of."""
        self.wait()
        self._existing_step(None)
        damaged: list[DamagedCheckpointError] = []
        for step in reversed(self.all_steps()):
            try:
                tree = self._restored(template, step, partial)
            except DamagedCheckpointError as error:
                damaged.append(error)
                continue
            for error in damaged:
                warnings.warn(f"{error} Taken instead: step {step}.", stacklevel=2)
            return tree, step
        if len(damaged) == 1:
            raise DamagedCheckpointError(
                f"{damaged[0]} It is the only one here: copy it again, or start in a new folder."
            ) from damaged[0]
        raise DamagedCheckpointError(
            f"all {len(damaged)} checkpoints in {self.directory} are damaged; the newest: "
            f"{damaged[0]} Copy them again, or start in a new folder."
        ) from damaged[0]

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after `step`, damaged ones, so that a run can go on from there.

        Nothing is deleted: the folder of step 8 becomes 8.damaged.
        """
        for later in (other for other in self.all_steps() if other > step):
            folder = self.directory / str(later)
            if jax.process_index() == 0:
                aside = folder.with_name(f"{later}.damaged")
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
                folder.rename(aside)
        self._manager.reload()

    def _restored(self, template: Tree, step: int, partial: bool) -> Tree:
        with self._naming_damage(step):
            saved = self._manager.item_metadata(step).tree  # pyright: ignore
            hashes = self._saved_hashes(step)
            if hashes is not None and hashes.keys() != _specs(saved).keys():
                raise ValueError("its list of arrays is not the one that was saved")
        self._check_same(step, _specs(saved), _specs(template), partial)
        # Asked for as it was saved: a field without leaves, if it is newer, is nowhere on disk.
        item = _entries_with(saved, _specs(template)) if partial else saved
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
            partial_restore=partial,
        )
        with self._naming_damage(step):
            found = _named_leaves(self._manager.restore(step, args=args))
            wrong = [
                name
                for name, digest in _hashes(found).items()
                if hashes is not None and hashes[name] != digest
            ]
            if wrong:
                raise ValueError(f"{len(wrong)} arrays are not what was saved, {wrong[0]} is one")
        structure = jax.tree.structure(template)
        restored = structure.unflatten(found[name] for name in _specs(template))
        return jax.tree.map(_placed_like, template, restored)

    def wait(self) -> None:
        """Returns when every save is on disk; OSError if one in the background failed."""
        if "_manager" in self.__dict__:
            with self._naming_what_was_saved():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves under way and lets go of the folder."""
        if "_manager" in self.__dict__:
            with self._naming_what_was_saved():
                self._manager.close()

    def __enter__(self) -> Checkpointer:  # noqa: D105
        return self

    def __exit__(self, *exception: object) -> None:  # noqa: D105
        self.close()

    def _saved(self) -> None:
        self._on_saved(self._saving)

    @contextlib.contextmanager
    def _naming_what_was_saved(self) -> Iterator[None]:
        """What goes wrong while saving as an OSError with the folder's name."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:  # of orbax, or tensorstore
            self._may_have_leftovers = True
            with contextlib.suppress(OSError):  # a full disk has room again
                self._clear_leftovers()
            found = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(found[1]) if found else getattr(error, "errno", None) or errno.EIO
            why = os.strerror(number) if found else str(error)[:300]
            folder = self.directory / str(self._saving)
            raise OSError(number, f"a checkpoint cannot be saved: {why}", str(folder)) from error

    def _clear_leftovers(self) -> None:
        """Delete what a killed process was still saving; whoever saves has the folder alone."""
        if self._may_have_leftovers and jax.process_index() == 0:
            for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(folder)
        self._may_have_leftovers = False

    def _saved_hashes(self, step: int) -> dict[str, str] | None:
        """By name of the array; None for a checkpoint of before there were any."""
        # By hand: orbax takes a file that it cannot read for one that says nothing.
        path = self.directory / str(step) / "_CHECKPOINT_METADATA"
        written = json.loads(path.read_text())["custom_metadata"].get(HASHES)
        if written is None:
            return None
        if written["format"] != FORMAT:
            raise ValueError(f"its hashes are of format {written['format']}, not {FORMAT}")
        return written["sha256"]

    def _existing_step(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise ValueError(
                f"{self.directory} has no whole checkpoint. Train or convert into this folder "
                "first, or give the folder of a run that did."
            )
        if step is not None and step not in steps:
            raise ValueError(f"step must be one of {steps} in {self.directory}; got {step}.")
        return steps[-1] if step is None else step

    @contextlib.contextmanager
    def _naming_damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except (PermissionError, MemoryError):  # the checkpoint may well be whole
            raise
        except Exception as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> ValueError:
        if not (self.directory / str(step)).exists():
            return ValueError(
                f"{self.directory / str(step)} was removed while it was read, perhaps by a run "
                "that keeps its newest checkpoints only; call again for one of those."
            )
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return DamagedCheckpointError(
            f"the checkpoint {self.directory / str(step)} is damaged ({kind}{str(error)[:300]})."
        )

    def _check_same(self, step: int, saved: Specs, wanted: Specs, partial: bool) -> None:
        lines = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
        lines += [
            f"{name} is {saved[name]} in the checkpoint, {wanted[name]} is wanted"
            for name in wanted
            if name in saved and saved[name] != wanted[name]
        ]
        # A part that is asked for is asked for whole: no weight is left out in silence.
        parts = {name.partition("/")[0] for name in wanted}
        lines += [
            f"{name} is only in the checkpoint"
            for name in saved
            if name not in wanted and (not partial or name.partition("/")[0] in parts)
        ]
        if lines:
            more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
            raise ValueError(
                f"the checkpoint {self.directory / str(step)} is of another network or training "
                "set-up:\n  " + "\n  ".join(lines[:10] + more) + "\n"
                "Use the configuration it was saved with, or another folder."
            )


def _hashes(leaves: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each array's bytes, its dtype and shape, several at once."""

    def digest(leaf: Any) -> str:
        array = np.ascontiguousarray(leaf)
        found = hashlib.sha256(f"{array.dtype} {np.shape(leaf)} ".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
        return found.hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(leaves, pool.map(digest, leaves.values()), strict=True))


Specs: TypeAlias = dict[str, str]
"""The name of each leaf, as "params/Dense_0/kernel", and its dtype and shape, as "float32[3,4]"."""


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _specs(tree: Any) -> Specs:
    specs = {}
    for name, leaf in _named_leaves(tree).items():
        leaf = _without_key_type(leaf)
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        shape = ",".join(map(str, leaf.shape))
        specs[name] = f"{leaf.dtype}[{shape}]"
    return specs


def _entries_with(saved: Any, names: Collection[str], prefix: str = "") -> Any:
    """The saved tree without those entries of its dicts that hold none of the named leaves."""
    if not isinstance(saved, Mapping):
        return saved
    paths = {key: f"{prefix}{key}" for key in saved}
    return {
        key: _entries_with(saved[key], names, f"{path}/")
        for key, path in paths.items()
        if any(name == path or name.startswith(f"{path}/") for name in names)
    }


def _is_typed_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_key_type(leaf: Any) -> Any:
    if not _is_typed_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    return jax.eval_shape(jax.random.key_data, leaf)


def _placed_like(template: Any, array: np.ndarray) -> Any:
    """The array as the kind of leaf the template is."""
    if _is_typed_key(template):
        impl = jax.random.key_impl(jnp.empty((), template.dtype))
        return jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    if isinstance(template, (jax.Array, jax.ShapeDtypeStruct)):
        return jax.device_put(array, template.sharding)
    return array if isinstance(template, np.ndarray) else type(template)(array)
