"""A run that trains in seconds, and everything it saved, read back without a template of ours."""

import pathlib

import jax
import numpy as np

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.objectives import Denoising
from ddim_jax.runs import ModelConfig, TrainConfig

SMALL = TrainConfig(
    data="digits",
    model=ModelConfig(
        channels=8,
        channel_mults=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.1,
        norm_groups=4,
    ),
    batch_size=16,
    max_steps=6,
    learning_rate=1e-3,
    warmup_steps=200,
    ema_decay=0.999,
    objective=Denoising(flip=False),
    log_every=2,
    sample_every=0,
    checkpoint_every=100,
)


def newest_step(workdir: pathlib.Path) -> int | None:
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return checkpointer.latest_step()


def leaves(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint, by the path in it."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(newest_step(workdir)) / "default"
    flat, _ = jax.tree_util.tree_flatten_with_path(ocp.PyTreeCheckpointer().restore(folder))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same_bits(one: pathlib.Path, other: pathlib.Path) -> None:
    """The newest checkpoints of both hold the same arrays."""
    mine, theirs = leaves(one), leaves(other)
    assert mine.keys() == theirs.keys()
    assert {"params", "ema_params", "opt_state"} <= {name.split("'")[1] for name in mine}
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
