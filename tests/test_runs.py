"""runs/: a folder is trained, resumed, opened, drawn from, or refused with what differs."""

import dataclasses
import json
import os
import pathlib
import shutil

import edits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from refusals import refused
from small_runs import SMALL, assert_same_bits, newest_step

from ddim_jax import ddim
from ddim_jax.files import only_one_process
from ddim_jax.objectives import OBJECTIVES, Objective
from ddim_jax.runs import (
    ModelConfig,
    RunSpec,
    ScheduleConfig,
    Watcher,
    fit,
    load_spec,
    load_trained,
    read_config,
)
from ddim_jax.runs.folder import write_config
from ddim_jax.runs.load import random_share

ROOT = pathlib.Path(__file__).resolve().parents[1]


def of(workdir, **changes):
    return dataclasses.replace(SMALL, workdir=str(workdir), **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """Six updates, checkpoints after three and six, fast ones so that both differ in pixels."""
    workdir = tmp_path_factory.mktemp("runs") / "model"
    fit(of(workdir, learning_rate=0.02, warmup_steps=0, checkpoint_every=3))
    return workdir


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "decay, warmup, init_from, step, share",
    [
        (0.9999, False, None, 6, 0.99940015),  # 0.9999 ** 6 by hand
        (0.5, False, None, 3, 0.125),
        (0.9999, True, None, 6, 0.0),
        (0.9999, False, "other", 6, 0.0),
    ],
)
def test_how_much_of_an_average_is_random(decay, warmup, init_from, step, share):
    config = {"ema_decay": decay, "ema_warmup": warmup, "init_from": init_from}
    assert random_share(config, step) == pytest.approx(share, abs=1e-9)
    assert random_share({}, step) == 0  # converted


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
    fit(of(tmp_path / "straight"))
    for max_steps in (3, 6):
        fit(of(tmp_path / "resumed", max_steps=max_steps, sample_every=6))
    assert_same_bits(tmp_path / "straight", tmp_path / "resumed")


def test_max_seconds_stops_with_a_checkpoint_and_the_next_call_goes_on(tmp_path):
    config = of(tmp_path, max_steps=3)
    fit(dataclasses.replace(config, max_seconds=1e-9))
    assert newest_step(tmp_path) == 1
    fit(config)
    assert newest_step(tmp_path) == 3


def test_watchers_hear_every_step_line_and_picture(tmp_path):
    heard = []

    class Ear(Watcher):
        def start(self, step, max_steps):
            heard.append(("start", step, max_steps))

        def update(self, step):
            heard.append(step)

        def line(self, line):
            heard.append(("line", line["step"], sorted(line)))

        def images(self, step, images):
            heard.append(("images", step, images.shape, images.dtype))

        def close(self):
            heard.append("close")

    names = ["grad_norm", "images_per_second", "loss", "step"]
    fit(of(tmp_path, max_steps=2, sample_every=2), [Ear()])
    assert heard == [("start", 0, 2), 1, 2, ("line", 2, names),
                     ("images", 2, (64, 8, 8, 1), np.uint8), "close"]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines] == [names]


def test_lines_of_steps_taken_again_are_dropped(tmp_path):
    """As a kill between two checkpoints leaves them, the last one cut short."""
    config = of(tmp_path, max_steps=2, log_every=1)
    fit(config)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    fit(dataclasses.replace(config, max_steps=4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] < 9 for line in lines)


def test_a_damaged_line_is_named(tmp_path):
    fit(of(tmp_path, max_steps=1))
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with refused(r"metrics\.jsonl has a damaged line \(KeyError: 'step'\); delete that line"):
        fit(of(tmp_path, max_steps=2))
    assert newest_step(tmp_path) == 1


class Spoilt(Objective):
    """sqrt at 0 is finite, its slope is not; and 0 times that is NaN."""

    def loss_fn(self, setup):
        def loss_fn(params, inputs):
            corner = sum(jnp.sum(0 * jnp.abs(p)) for p in jax.tree.leaves(params))
            return 1.0 + jnp.sqrt(corner) + jnp.zeros(len(inputs.places)), inputs.state

        return loss_fn


def test_a_spoilt_gradient_is_never_saved_though_the_loss_is_finite(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "spoilt", Spoilt)
    with pytest.raises(FloatingPointError, match="grad_norm of step 1 is nan"):
        fit(of(tmp_path, max_steps=1, objective=Spoilt()))
    assert newest_step(tmp_path) is None


def test_a_spoilt_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    config = of(tmp_path, max_steps=2)
    fit(config)
    with pytest.raises(FloatingPointError, match=r"step \d+ is nan"):
        # NaN from a clean optimizer state: weights thrown beyond what float32 can square.
        blown = dataclasses.replace(config, max_steps=30, learning_rate=1e30)
        described = edits.content(tmp_path / "config.json")  # the rate is another configuration
        (tmp_path / "config.json").write_text(json.dumps(described | {"learning_rate": 1e30}))
        fit(blown)
    assert newest_step(tmp_path) == 2


# ---------------------------------------------------------------- refusals, config.json, locks


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_steps": 0}, "max_steps must be at least 1; got 0"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"seed": -1}, "seed must be in"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"ema_decay": 2.0}, r"ema_decay must be in \[0, 1\)"),
        ({"distributed": True, "num_processes": 1}, "must be given together"),
        (
            {"distributed": True, "coordinator": "x", "num_processes": 1, "process_id": 0},
            "coordinator must be host:port; got 'x'",
        ),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"model": ModelConfig(channels=8, norm_groups=3)}, "norm_groups"),
        ({"model": dataclasses.replace(SMALL.model, channel_mults=(1, 1, 1, 1, 1))}, "divisible"),
        ({"model": dataclasses.replace(SMALL.model, num_classes=7)}, "num_classes"),
        ({"predicts": "score"}, "predicts must be one of eps, v, x0; got 'score'"),
        ({"schedule": ScheduleConfig(name="square")}, r"schedule\.name must be one of linear, "),
        ({"schedule": ScheduleConfig(zero_terminal_snr=True)}, "predicts must not be eps with"),
        (
            {"objective": dataclasses.replace(SMALL.objective, label_dropout=1.0)},
            r"label_dropout must be in \[0, 1\)",
        ),
        ({"objective": Spoilt()}, "Spoilt must stand in the table of its kind, which has denoi"),
        ({"init_from": "no/such/run"}, "no/such/run has no config.json"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    workdir = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        fit(of(workdir, **change))
    assert not workdir.exists()


def test_an_unknown_loss_is_refused_before_anything_is_written(tmp_path):
    with refused("loss must be one of l2, l1; got 'huber'"):
        fit(of(tmp_path / "new", objective=dataclasses.replace(SMALL.objective, loss="huber")))
    assert not (tmp_path / "new").exists()


def test_a_run_needs_a_folder():
    with refused("workdir must name the folder of the run; got ''"):
        fit(SMALL)


def test_a_workdir_of_another_run_is_refused_and_left_alone(trained):
    before = (trained / "config.json").read_text()
    with pytest.raises(ValueError, match=r"another configuration: .*learning_rate is 0.02 there"):
        fit(of(trained, learning_rate=0.5))
    assert (trained / "config.json").read_text() == before


def test_what_differs_is_called_by_its_dotted_name(trained):
    there = {"learning_rate": 0.02, "warmup_steps": 0}
    for change, message in [
        ({"predicts": "v"}, "predicts is 'eps' there and 'v' now"),
        (
            {"model": dataclasses.replace(SMALL.model, dropout=0.2)},
            "configuration: model.dropout is 0.1 there and 0.2 now",
        ),
        (
            {"schedule": ScheduleConfig(num_steps=500)},
            "configuration: schedule.num_steps is 1000 there and 500 now",
        ),
        (
            {"objective": dataclasses.replace(SMALL.objective, timesteps="antithetic")},
            "configuration: objective.timesteps is 'independent' there and 'antithetic' now",
        ),
    ]:
        with refused(message):
            fit(of(trained, **there, **change))


def test_a_run_that_saved_nothing_binds_nobody(tmp_path):
    write_config(tmp_path, {"learning_rate": 1.0})
    write_config(tmp_path, {"learning_rate": 2.0})
    assert read_config(tmp_path) == {"format": 2, "learning_rate": 2.0}


def test_a_workdir_in_use_is_refused(tmp_path):
    with (
        only_one_process(tmp_path),
        pytest.raises(ValueError, match="in use by another process"),
    ):
        fit(of(tmp_path))
    fit(of(tmp_path, max_steps=1))


def test_config_files_are_written_whole(tmp_path, monkeypatch):
    """A kill or a full disk while writing leaves the old file."""
    write_config(tmp_path, {"seed": 1})

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_config(tmp_path, {"seed": 2})
    assert read_config(tmp_path)["seed"] == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", r"config\.json does not describe a network"),
        ('{"image_shape": [8, 8, 1], "model": {"no": 1}}', r"json does not describe a network"),
        ('{"image_shape": [8, 8, 1], "model": 3}', r"config\.json does not describe a network"),
        ("[]", r"config\.json must hold a JSON object, \{...\}; it has a list"),
        ('{"model": {', r"config\.json is not JSON, or damaged"),
        (
            '{"format": 3}',
            r"config\.json must be of format 1 or 2, which this version reads; got 3",
        ),
        ('{"format": "2"}', r"must be of format 1 or 2, .*got '2'\. Use the version that wrote it"),
    ],
)
def test_a_config_that_describes_no_network_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_trained(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_trained(tmp_path)
    write_config(tmp_path, json.loads((ROOT / "tests" / "tiny_config.json").read_text()))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        load_trained(tmp_path)


# ------------------------------------------------------------------------------------- opening


def test_a_spec_comes_back_from_its_description(trained):
    spec = load_spec(trained)
    assert spec == of(trained).spec((8, 8, 1))
    assert spec.model_config == SMALL.model and spec.schedule_config == ScheduleConfig()
    other = RunSpec(
        dataclasses.replace(SMALL.model, channel_mults=(1, 2), num_classes=3),
        ScheduleConfig("cosine", 50, zero_terminal_snr=True),
        (16, 8, 3),
        spacing="trailing",
        predicts="x0",
    )
    (trained.parent / "other").mkdir()
    write_config(trained.parent / "other", other.describe())
    assert load_spec(trained.parent / "other") == other


def test_a_step_picks_a_checkpoint_and_a_kind_picks_the_weights(trained):
    newest, first = load_trained(trained), load_trained(trained, step=3)
    assert (newest.step, first.step) == (6, 3)
    raw = load_trained(trained, "raw")
    assert len({run.weights_hash for run in (newest, first, raw)}) == 3
    with refused(r"step must be one of \[3, 6\] in .*; got 4"):
        load_trained(trained, step=4)
    with refused("weights must be one of ema, raw; got 'both'"):
        load_trained(trained, "both")


def test_drawing_depends_on_the_key_and_the_index_alone(trained):
    run = load_trained(trained)
    key = jax.random.key(3)
    images = run.sample(key, 5, 4)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    for others in (run.sample(key, 5, 4, batch_size=2), run.sample(key, 3, 4)):
        # Another batch rounds otherwise, rarely to another grey level.
        want = images[: len(others)].astype(int)
        assert np.abs(want - others).max() <= 1
        assert (want != others).mean() < 1e-2
    assert (images != run.sample(jax.random.key(4), 5, 4)).mean() > 0.3
    assert (images != load_trained(trained, step=3).sample(key, 5, 4)).any()
    assert (images != run.sample(key, 5, 4, sampler=ddim(1.0))).any()
    assert (images != run.sample(key, 5, 4, spacing="quadratic")).any()
    with refused("num_images must be at least 1; got 0"):
        run.sample(key, 0, 4)
    with refused("batch_size must be at least 1; got 0"):
        run.sample(key, 1, 4, batch_size=0)


def test_every_process_draws_all_images_of_one_call(trained, monkeypatch):
    """As the pictures of a run on two hosts are drawn."""
    run = load_trained(trained)
    alone = run.sample(jax.random.key(0), 5, 4, batch_size=2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        np.testing.assert_array_equal(run.sample(jax.random.key(0), 5, 4, batch_size=2), alone)


def test_bfloat16_changes_the_precision_and_nothing_else(trained):
    run, rounded = load_trained(trained), load_trained(trained, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, run.params, rounded.params)
    model_config = dataclasses.replace(run.spec.model_config, dtype="bfloat16")
    assert rounded.spec == dataclasses.replace(run.spec, model_config=model_config)
    images, near = (r.sample(jax.random.key(0), 16, 4).astype(int) for r in (run, rounded))
    assert (images != near).any()
    # 8 bits of mantissa are one part in 256, a grey level or so of a step's x0.
    assert np.abs(images - near).mean() < 3
    assert np.corrcoef(images.ravel(), near.ravel())[0, 1] > 0.99
    with refused("dtype must be one of float32, bfloat16; got 'float16'"):
        load_trained(trained, dtype="float16")


def test_a_run_is_a_denoiser(trained):
    run = load_trained(trained)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    want = run.spec.model.apply({"params": run.params.network}, x, 500)
    np.testing.assert_array_equal(run.denoiser()(x, jnp.asarray(500)), want)


def test_guidance_is_the_line_through_both_predictions(tmp_path):
    """Ho & Salimans 2022, eq. 6: uncond + scale (cond - uncond)."""
    model = dataclasses.replace(SMALL.model, num_classes=10)
    fit(of(tmp_path, model=model, max_steps=2))
    run = load_trained(tmp_path)
    x, t = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.asarray(500)
    label = jnp.array([1, 5, 9])

    def network(label):
        return np.asarray(run.spec.model.apply({"params": run.params.network}, x, t, label))

    cond, uncond = network(label), network(jnp.full(3, 10))
    got = run.spec.denoiser(run.params, label, 3.0)(x, t)
    np.testing.assert_allclose(got, uncond + 3 * (cond - uncond), atol=1e-5)
    np.testing.assert_allclose(run.spec.denoiser(run.params, label)(x, t), cond, atol=1e-6)
    np.testing.assert_allclose(run.denoiser(label, 3.0)(x, t), got, atol=1e-5)
    fives = run.denoiser(5)(x, t)  # one class for all of them
    np.testing.assert_allclose(fives, network(jnp.full(3, 5)), atol=1e-6)


# ------------------------------------------------------------------------------- fingerprints


def changed(trained, folder, change):
    """A copy of the run whose config.json was changed."""
    shutil.copytree(trained, folder)
    config = edits.content(folder / "config.json")
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_fingerprint_is_of_what_decides_the_numbers(trained, tmp_path):
    run = load_trained(trained)
    same = changed(trained, tmp_path / "same", lambda config: config.update(max_steps=99, seed=5))
    noise = changed(
        trained, tmp_path / "noise", lambda config: config["schedule"].update(beta_end=0.03)
    )
    assert load_trained(same).fingerprint == run.fingerprint == load_trained(trained).fingerprint
    assert load_trained(same).fingerprint_id == run.fingerprint_id
    assert json.loads(json.dumps(run.fingerprint)) == run.fingerprint
    others = {
        "raw": load_trained(trained, "raw"),
        "step": load_trained(trained, step=3),
        "schedule": load_trained(noise),
        "dtype": load_trained(trained, dtype="bfloat16"),
    }
    names = {run.fingerprint_id} | {other.fingerprint_id for other in others.values()}
    with jax.default_matmul_precision("highest"):
        names.add(load_trained(trained).fingerprint_id)
    same = load_trained(trained, precision="highest")  # the same setting, said in another way
    assert len(names) == 6 and same.fingerprint_id in names
    assert same.fingerprint == run.fingerprint | {"matmul_precision": "highest"}
    clips = load_trained(trained, clip_x0=True)
    assert clips.fingerprint == run.fingerprint | {"clip_x0": True}
    program = jax.jit(same.denoiser()).lower(jnp.zeros((1, 8, 8, 1)), 5).as_text()
    products = program.count("stablehlo.dot_general") + program.count("stablehlo.convolution")
    assert program.count("HIGHEST") == 2 * products > 0  # of both factors of each
    with refused("precision must be one of default, high, highest; got 'low'"):
        load_trained(trained, precision="low")  # pyright: ignore
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in names)
    assert others["schedule"].fingerprint["schedule"]["beta_end"] == 0.03
    assert others["raw"].fingerprint["weights"]["kind"] == "raw"
    assert others["step"].fingerprint["weights"]["step"] == 3
