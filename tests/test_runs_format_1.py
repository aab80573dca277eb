"""Folders that the version before objectives wrote: config.json with flat keys and no format, and
checkpoints of a state without the loss's own."""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")

import convert
from refusals import refused
from small_runs import SMALL, assert_same_bits, leaves

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.convert import save_diffusers
from ddim_jax.objectives import Denoising
from ddim_jax.runs import ScheduleConfig, fit, load_spec, load_trained, read_config
from ddim_jax.train import adam_with_warmup, init_train_state
from ddim_jax.unet import UNet

# "train" was all digits then.
SMALL = dataclasses.replace(SMALL, split="all")

# What train.py of commit e310e7d wrote for the settings of small_runs.SMALL, key by key.
OLD_CONFIG = {
    "workdir": "runs/old",
    "data": "digits",
    "data_dir": None,
    "split": "train",
    "image_size": None,
    "num_workers": 0,
    "model": {
        "channels": 8,
        "channel_mults": [1],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "dropout": 0.1,
        "norm_groups": 4,
        "num_classes": None,
        "dtype": "float32",
    },
    "schedule": {"name": "linear", "num_steps": 1000, "beta_start": 0.0001, "beta_end": 0.02},
    "spacing": "uniform",
    "max_steps": 3,
    "batch_size": 16,
    "num_microbatches": 1,
    "learning_rate": 0.001,
    "warmup_steps": 200,
    "clip_norm": 1.0,
    "ema_decay": 0.999,
    "loss": "l2",
    "reduction": "mean",
    "timesteps": "independent",
    "flip": False,
    "label_dropout": 0.1,
    "seed": 0,
    "max_seconds": None,
    "log_every": 2,
    "sample_every": 0,
    "checkpoint_every": 100,
    "keep_checkpoints": 3,
    "distributed": False,
    "coordinator": None,
    "num_processes": None,
    "process_id": None,
    "image_shape": [8, 8, 1],
    "num_images": 1797,
    "rounding": "nearest",
}


class OldTrainState(NamedTuple):
    step: Any
    params: Any
    ema_params: Any
    opt_state: Any
    key: Any


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A run of three updates, and the same as the old version left it."""
    new, old = (tmp_path_factory.mktemp("runs") / name for name in ("new", "old"))
    fit(dataclasses.replace(SMALL, workdir=str(new), max_steps=3))
    tx = adam_with_warmup(1e-3, 200, 1.0)
    key = jax.random.key(0, impl="threefry2x32")
    init = functools.partial(init_train_state, tx=tx)
    template = jax.eval_shape(init, key, SMALL.spec((8, 8, 1)).parameter_shapes())
    with Checkpointer(new / "checkpoints") as checkpointer:
        state = checkpointer.restore(template)
    with Checkpointer(old / "checkpoints") as checkpointer:
        checkpointer.save(3, OldTrainState(*state[:5]))
    (old / "config.json").write_text(json.dumps(OLD_CONFIG, indent=2) + "\n")
    return new, old


@pytest.fixture
def old(folders, tmp_path):
    return shutil.copytree(folders[1], tmp_path / "old")


def test_an_old_run_opens_as_the_same_run(folders):
    new, old = folders
    config = read_config(old)
    assert config["objective"] == {
        "name": "denoising", "loss": "l2", "reduction": "mean", "timesteps": "independent",
        "flip": False, "label_dropout": 0.1,
    }  # fmt: skip
    assert not config.keys() & {"loss", "reduction", "timesteps", "flip", "label_dropout"}
    assert load_spec(old) == load_spec(new)
    for weights in ("ema", "raw"):
        run, want = load_trained(old, weights), load_trained(new, weights)
        assert run.step == 3
        assert run.fingerprint == want.fingerprint
        jax.tree.map(np.testing.assert_array_equal, run.params, want.params)
    images = [load_trained(folder).sample(jax.random.key(0), 3, 4) for folder in folders]
    np.testing.assert_array_equal(*images)


def test_an_old_run_resumes_to_the_bits_of_a_new_one(folders, old, tmp_path):
    new = shutil.copytree(folders[0], tmp_path / "new")
    for workdir in (new, old):
        fit(dataclasses.replace(SMALL, workdir=str(workdir)))
    assert leaves(old)["['step']"] == 6
    assert_same_bits(new, old)
    config = json.loads((old / "config.json").read_text())  # in today's format from now on
    assert config["format"] == 2 and config["objective"]["flip"] is False
    fit(dataclasses.replace(SMALL, workdir=str(old)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.5}, "learning_rate is 0.001 there and 0.5 now"),
        ({"predicts": "v"}, "predicts is 'eps' there and 'v' now"),
        ({"init_from": "runs/other"}, "init_from is None there and 'runs/other' now"),
        (
            {"model": dataclasses.replace(SMALL.model, dropout=0.0)},
            "model.dropout is 0.1 there and 0.0 now",
        ),
        (
            {"schedule": ScheduleConfig(beta_end=0.03)},
            "schedule.beta_end is 0.02 there and 0.03 now",
        ),
        ({"objective": Denoising(flip=True)}, "objective.flip is False there and True now"),
        (
            {"objective": Denoising(flip=False, reduction="sum")},
            "objective.reduction is 'mean' there and 'sum' now",
        ),
        (
            {"objective": Denoising(flip=False, weighting="min_snr")},
            "objective.weighting is 'uniform' there and 'min_snr' now",
        ),
    ],
)
def test_other_settings_are_refused_by_the_name_of_what_differs(folders, change, message):
    _, old = folders
    before = (old / "config.json").read_text()
    with refused(f"another configuration: {message}. Give the same settings"):
        fit(dataclasses.replace(SMALL, workdir=str(old), **change))
    assert (old / "config.json").read_text() == before


# ------------------------------------------------------------------------- converted weights

UNITS = UNet(
    channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), norm_groups=4
)


def publish(folder, seed):
    """Weights in diffusers' files."""
    init = jax.jit(UNITS.init)
    params = init(jax.random.key(seed), np.zeros((8, 8, 3), np.float32), 0)["params"]
    save_diffusers(folder, UNITS, params, 8, schedule="scaled_linear")
    return params


@pytest.fixture
def converted(tmp_path):
    """What convert.py of commit e310e7d left of a diffusers folder beside it."""
    published, workdir = tmp_path / "published", tmp_path / "w"
    params = publish(published, 0)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        checkpointer.save(0, {"ema_params": params})
    file = published / "unet" / "diffusion_pytorch_model.safetensors"
    config = {
        "model": {
            "channels": 8,
            "channel_mults": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [4],
            "dropout": 0.0,
            "norm_groups": 4,
            "num_classes": None,
            "dtype": "float32",
        },
        "schedule": {
            "name": "scaled_linear",
            "num_steps": 1000,
            "beta_start": 0.0001,
            "beta_end": 0.02,
        },
        "spacing": "uniform",
        "image_shape": [8, 8, 3],
        "rounding": "nearest",
        "converted_from": {
            "format": "diffusers",
            "path": str(published),
            "taken": f"144 tensors from {file}, the only weights there; diffusers does not record "
            "whether they are averaged",
            "weights": "ema",
            "weights_hash": "60371f861b7d82d0",  # of names and bytes, without dtypes and shapes
        },
    }
    (workdir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return workdir, published


def convert_again(workdir, published):
    convert.main(
        convert.ConvertConfig(workdir=str(workdir), source="diffusers", path=str(published))
    )


def test_an_old_converted_folder_opens_and_converts_again(converted):
    workdir, published = converted
    run = load_trained(workdir)
    assert (run.step, run.spec.image_shape, run.spec.schedule_config.name) == (
        0, (8, 8, 3), "scaled_linear")  # fmt: skip
    assert run.sample(jax.random.key(0), 2, 2).shape == (2, 8, 8, 3)
    convert_again(workdir, published)
    assert read_config(workdir)["converted_from"]["weights_hash"] == run.weights_hash
    convert_again(workdir, published)
    assert load_trained(workdir).fingerprint == run.fingerprint


def test_other_weights_in_its_place_are_refused(converted):
    """The old hash cannot be compared; that of the weights it stands for can."""
    workdir, published = converted
    before = (workdir / "config.json").read_text()
    publish(published, 1)
    with refused(r"another configuration: converted_from.weights_hash is '\w{16}' there"):
        convert_again(workdir, published)
    assert (workdir / "config.json").read_text() == before


def test_a_converted_folder_is_not_trained_on(converted):
    workdir, _ = converted
    with refused("holds converted weights, which cannot be trained on; .* init_from"):
        fit(dataclasses.replace(SMALL, workdir=str(workdir)))
