"""runs/fit.py beside the weights: what is logged, drawn, averaged and held in memory."""

import contextlib
import dataclasses
import gc
import json
import sys

import edits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from refusals import refused
from small_runs import SMALL, assert_same_bits

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.parallel import over_devices
from ddim_jax.runs import Watcher, fit, load_trained, to_pixels
from ddim_jax.runs.draw import Pixels, marked_images


def of(workdir, **changes):
    return dataclasses.replace(SMALL, workdir=str(workdir), **changes)


class Killed(BaseException):
    """As a kill: nothing catches it."""


class Ear(Watcher):
    """Hears images; is killed at a step, before or after its line."""

    def __init__(self, kill_at=None):
        self.kill_at, self.heard = kill_at, {}

    def update(self, step):
        if step == self.kill_at:
            raise Killed

    def images(self, step, images):
        self.heard[step] = images


def lines(workdir):
    """What metrics.jsonl says but for the speed, as it was written."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in found]


def test_a_run_killed_anywhere_logs_and_draws_what_a_straight_one_does(tmp_path, monkeypatch):
    settings = {"max_steps": 8, "log_every": 4, "checkpoint_every": 3, "sample_every": 3}
    straight, save = Ear(), Checkpointer.save
    fit(of(tmp_path / "straight", **settings), [straight])
    assert [line["step"] for line in lines(tmp_path / "straight")] == [4, 8]
    killed, heard = of(tmp_path / "killed", **settings), {}

    def call(ear, saving=save):
        monkeypatch.setattr(Checkpointer, "save", saving)
        with contextlib.suppress(Killed):
            fit(killed, [ear])
        heard.update(ear.heard)

    def after(self, step, tree):
        save(self, step, tree)
        self.wait()
        raise Killed

    def before(self, step, tree):
        if step == 6:
            raise Killed
        save(self, step, tree)

    call(Ear(kill_at=2))  # before the first checkpoint
    call(Ear(), after)  # of step 3, inside a window
    call(Ear(kill_at=5))  # back to 3, the line of 4 is written again
    call(Ear(), before)  # at 6, its images drawn and its window written
    call(Ear(), after)  # of 6, called again
    call(Ear())
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert heard.keys() == straight.heard.keys() == {3, 6, 8}
    for step, images in heard.items():
        np.testing.assert_array_equal(images, straight.heard[step])
    assert_same_bits(tmp_path / "killed", tmp_path / "straight")


def test_a_window_that_is_damaged_is_named_and_one_of_an_older_run_is_empty(tmp_path):
    config = of(tmp_path, max_steps=1)
    fit(config)
    path = tmp_path / "log_window.json"
    assert json.loads(path.read_text())["losses"].keys() == {"1"}
    for content, message in [
        ("[]", "must hold a JSON object"),
        ('{"format": 2}', "must be of format 1; got 2. Delete it: the mean"),
        ('{"format": 1, "losses": [1]}', "must hold losses by step .*Delete it"),
        ('{"format": 1, "losses": {"1": [null]}}', "must hold losses by step .*Delete it"),
    ]:
        path.write_text(content)
        with refused(message):
            fit(dataclasses.replace(config, max_steps=2))
    path.unlink()
    fit(dataclasses.replace(config, max_steps=2))
    assert [line["step"] for line in lines(tmp_path)] == [2]


# ------------------------------------------------------------------------------------- memory


def test_the_state_stands_once_on_the_device(tmp_path):
    """Parameters, average and Adam's two moments; from scratch, resumed, and from given weights."""

    class Scale(Watcher):
        seen = 0

        def update(self, step):
            gc.collect()
            self.seen = max(self.seen, held() - there)

    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    shapes = SMALL.spec((8, 8, 1)).parameter_shapes()
    params = 4 * sum(shape.size for shape in jax.tree.leaves(shapes))
    for name, change in [
        ("first", {"max_steps": 2}),
        ("first", {"max_steps": 4, "sample_every": 2}),
        ("more", {"max_steps": 2, "init_from": str(tmp_path / "first")}),
    ]:
        gc.collect()
        there, scale = held(), Scale()
        fit(of(tmp_path / name, **change), [scale])
        assert 4 * params <= scale.seen < 4.5 * params, (name, scale.seen / params)


# ----------------------------------------------------------------------- images that are NaN


def test_a_preview_that_is_not_finite_is_marked_and_said_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys
):
    def second_is_nan(spec, timesteps):
        def draw(inputs, indices):
            grey = jnp.where(indices == 1, jnp.nan, 0.0)[:, None, None, None]
            return to_pixels(jnp.broadcast_to(grey, (len(indices), *spec.image_shape)))

        return over_devices(draw)

    monkeypatch.setattr(sys.modules["ddim_jax.runs.fit"], "image_program", second_is_nan)
    ear = Ear()
    fit(of(tmp_path, max_steps=2, sample_every=1), [ear])
    said = capsys.readouterr().err
    for step in (1, 2):
        assert f"warning: 1 of the 64 samples of step {step} are not finite" in said
        image = ear.heard[step][1]
        assert set(np.unique(image)) == {0, 255} and 0.5 < (image == 255).mean() < 0.8
        assert (np.delete(ear.heard[step], 1, axis=0) == 128).all()
    assert [line["step"] for line in lines(tmp_path)] == [2]


@pytest.mark.parametrize("shape", [(8, 8, 3), (32, 64, 3), (1, 1, 1), (7, 5, 4)])
def test_the_mark_is_a_cross_that_no_black_image_is(shape):
    images = np.zeros((3, *shape), np.uint8)
    marked = marked_images(Pixels(images, np.array([True, False, True])))
    np.testing.assert_array_equal(marked[[0, 2]], 0)
    assert not images.any()  # a copy was marked
    corner, opposite, middle = marked[1, 0, 0], marked[1, -1, 0], marked[1, :, shape[1] // 2]
    cross = [255, 0, 0] if shape[-1] == 3 else [0] * shape[-1]
    assert corner.tolist() == opposite.tolist() == cross
    if shape[0] > 1:
        assert (middle[0] == 255).all() and (middle == cross).all(axis=-1).any()


# -------------------------------------------------------------------------------- the average


def parts(workdir, step):
    """(parameters, average) of a checkpoint, raveled."""
    return [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run.params.network)])
        for run in (load_trained(workdir, weights, step) for weights in ("raw", "ema"))
    ]


def test_the_average_has_its_decay_from_the_start_if_asked_to(tmp_path):
    decay = 0.9
    config = of(tmp_path, max_steps=2, ema_decay=decay, ema_warmup=False, checkpoint_every=1)
    fit(dataclasses.replace(config, learning_rate=0.1, warmup_steps=0))
    (_, before), (params, average) = (parts(tmp_path, step) for step in (1, 2))
    np.testing.assert_allclose(average, decay * before + (1 - decay) * params, atol=1e-6)


def test_a_run_from_before_the_option_goes_on_warming_up(tmp_path, capsys):
    fit(of(tmp_path / "new"))
    fit(of(tmp_path / "old", max_steps=3))
    path = tmp_path / "old" / "config.json"
    config = edits.content(path)
    assert config.pop("ema_warmup") is True
    path.write_text(json.dumps(config))
    with refused("ema_warmup is True there and False now"):
        fit(of(tmp_path / "new", ema_warmup=False))
    fit(of(tmp_path / "old", ema_warmup=False))  # as the preset of its name has it today
    assert "was begun when every average was warmed up, and goes on so" in capsys.readouterr().out
    assert_same_bits(tmp_path / "old", tmp_path / "new")
    assert json.loads(path.read_text())["ema_warmup"] is True
