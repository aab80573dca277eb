"""A run that starts from another's weights: from both sets, and resumed without the other."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")

from refusals import refused
from small_runs import SMALL, assert_same_bits, newest_step

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.runs import RunSpec, ScheduleConfig, fit, load_trained
from ddim_jax.runs.folder import write_config

# So small that no weight moves by a bit.
STILL = dataclasses.replace(SMALL, learning_rate=1e-30, warmup_steps=0, max_steps=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """A run whose average is far from its weights."""
    workdir = tmp_path_factory.mktemp("runs") / "source"
    fit(dataclasses.replace(SMALL, workdir=str(workdir), learning_rate=0.05, warmup_steps=0))
    return workdir


def sets(workdir) -> tuple[list, list]:
    """The raw weights and the averaged ones."""
    return tuple(
        [np.asarray(leaf) for leaf in jax.tree.leaves(load_trained(workdir, kind).params)]
        for kind in ("raw", "ema")
    )


def test_both_sets_are_taken_over_and_the_average_is_not_forgotten(source, tmp_path):
    fit(dataclasses.replace(STILL, workdir=str(tmp_path), init_from=str(source)))
    apart = 0.0
    for raw, average, got_raw, got_average in zip(*sets(source), *sets(tmp_path), strict=True):
        np.testing.assert_array_equal(got_raw, raw)
        # One update with the run's own decay, 0.999; warmed up it would be 2 / 11.
        want = 0.999 * np.float64(average) + 0.001 * np.float64(raw)
        np.testing.assert_allclose(got_average, want, rtol=1e-5, atol=1e-7)
        apart = max(apart, np.abs(average - raw).max())
    assert apart > 0.01
    assert newest_step(tmp_path) == 1


def test_of_a_converted_run_its_one_set_is_both(source, tmp_path):
    run = load_trained(source)
    for kind, name in (("ema", "ema_params"), ("raw", "params")):
        converted, workdir = tmp_path / f"converted-{kind}", tmp_path / kind
        origin = {"weights": kind, "weights_hash": run.weights_hash}
        write_config(converted, run.spec.describe() | {"converted_from": origin})
        with Checkpointer(converted / "checkpoints") as checkpointer:
            checkpointer.save(0, {name: run.params.network})
        fit(dataclasses.replace(STILL, workdir=str(workdir), init_from=str(converted)))
        for weights in ("ema", "raw"):
            got = load_trained(workdir, weights).params.network
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
                got,
                run.params.network,
            )


def test_a_resumed_run_needs_the_other_no_more(source, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    config = dataclasses.replace(SMALL, init_from=str(other), max_steps=4)
    fit(dataclasses.replace(config, workdir=str(tmp_path / "straight")))
    fit(dataclasses.replace(config, workdir=str(tmp_path / "resumed"), max_steps=2))
    shutil.rmtree(other)
    fit(dataclasses.replace(config, workdir=str(tmp_path / "resumed")))
    assert_same_bits(tmp_path / "straight", tmp_path / "resumed")
    with refused("init_from is '.*other' there and None now"):
        fit(dataclasses.replace(config, workdir=str(tmp_path / "resumed"), init_from=None))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channels": 16}, r"params/conv_in/bias is float32\[8\] in the checkpoint, float32\[16\]"),
        ({"num_classes": 10}, "params/label_embed/embedding is not in the checkpoint"),
        (
            {"norm_groups": 2},
            "model.norm_groups must be 4, as in the network of init_from .* got 2",
        ),
    ],
)
def test_another_network_is_refused_by_what_differs(source, tmp_path, change, message):
    model = dataclasses.replace(SMALL.model, **change)
    workdir = tmp_path / "new"
    with refused(message):
        fit(dataclasses.replace(STILL, workdir=str(workdir), model=model, init_from=str(source)))
    assert not workdir.exists()


def test_another_kind_of_image_is_refused(tmp_path):
    colour = RunSpec(SMALL.model, ScheduleConfig(), (8, 8, 3))
    write_config(tmp_path / "colour", colour.describe())
    with refused("init_from must hold a network for 1 channels; .* has 3"):
        fit(
            dataclasses.replace(
                STILL, workdir=str(tmp_path / "new"), init_from=str(tmp_path / "colour")
            )
        )
    assert not (tmp_path / "new").exists()


def test_a_network_that_predicts_something_else_is_refused(source, tmp_path):
    config = dataclasses.replace(STILL, workdir=str(tmp_path / "new"), init_from=str(source))
    with refused("predicts must be eps, as the network of init_from .* does; got v"):
        fit(dataclasses.replace(config, predicts="v"))
    with refused("spacing must be one of .* got 'cubic'"):
        fit(dataclasses.replace(STILL, workdir=str(tmp_path / "new"), spacing="cubic"))
    assert not (tmp_path / "new").exists()
