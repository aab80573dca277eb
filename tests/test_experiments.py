"""The scripts, run as their users run them, on a network small enough to compile in seconds."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")

import pictures
import sample
import train
from presets import PRESETS, ModelConfig
from workdir import load_trained, only_one_process, read_config, write_config

from ddim_jax.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = dataclasses.replace(
    PRESETS["digits"][1],
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
    log_every=2,
    sample_every=0,
    checkpoint_every=100,
)


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("model")
    train.run(dataclasses.replace(SMALL, workdir=str(workdir), sample_every=6))
    return workdir


def leaves(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint, read back without a template of ours."""
    import orbax.checkpoint as ocp

    with Checkpointer(workdir / "checkpoints") as checkpointer:
        step = checkpointer.latest_step()
    tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "default")
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def test_a_stopped_run_resumes_to_the_same_bits(trained, tmp_path):
    for max_steps in (3, 6):
        train.run(
            dataclasses.replace(SMALL, workdir=str(tmp_path), max_steps=max_steps, sample_every=6)
        )
    straight, resumed = leaves(trained), leaves(tmp_path)
    assert straight.keys() == resumed.keys()
    assert {"params", "ema_params", "opt_state"} <= {name.split("'")[1] for name in straight}
    for name in straight:
        np.testing.assert_array_equal(straight[name], resumed[name], err_msg=name)


def test_max_seconds_stops_with_a_checkpoint_and_the_next_call_goes_on(tmp_path):
    config = dataclasses.replace(SMALL, workdir=str(tmp_path), max_steps=3)
    train.run(dataclasses.replace(config, max_seconds=1e-9))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 1
    train.run(config)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 3


def test_a_run_leaves_its_settings_its_losses_and_its_pictures(trained):
    config = read_config(trained)
    assert config["image_shape"] == [8, 8, 1]
    assert config["batch_size"] == 16
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert PIL.Image.open(trained / "samples" / "step_0000006.png").size[0] >= 8 * 8
    assert list((trained / "tensorboard").glob("events*"))


def test_a_workdir_of_another_run_is_refused_and_left_alone(trained):
    before = (trained / "config.json").read_text()
    with pytest.raises(ValueError, match=r"another configuration: .*learning_rate is 0.001 there"):
        train.run(dataclasses.replace(SMALL, workdir=str(trained), learning_rate=0.5))
    assert (trained / "config.json").read_text() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_steps": 0}, "max_steps must be at least 1; got 0"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
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
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    workdir = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        train.run(dataclasses.replace(SMALL, workdir=str(workdir), **change))
    assert not workdir.exists()


def test_a_run_that_saved_nothing_binds_nobody(tmp_path):
    write_config(tmp_path, {"learning_rate": 1.0})
    write_config(tmp_path, {"learning_rate": 2.0})
    assert read_config(tmp_path) == {"learning_rate": 2.0}


def test_a_spoilt_gradient_is_never_saved_though_the_loss_is_finite(tmp_path, monkeypatch):
    """sqrt at 0 is finite, its slope is not; and 0 times that is NaN."""

    def loss_fn(params, key, places, batch):
        corner = sum(jax.numpy.sum(0 * jax.numpy.abs(p)) for p in jax.tree.leaves(params))
        return 1.0 + jax.numpy.sqrt(corner) + jax.numpy.zeros(len(places))

    monkeypatch.setattr(train.train, "diffusion_loss", lambda *args, **options: loss_fn)
    with pytest.raises(FloatingPointError, match="grad_norm of step 1 is nan"):
        train.run(dataclasses.replace(SMALL, workdir=str(tmp_path), max_steps=1))
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None


def test_lines_of_steps_taken_again_are_dropped(trained, tmp_path):
    """As a kill between two checkpoints leaves them, the last one cut short."""
    config = dataclasses.replace(SMALL, workdir=str(tmp_path), max_steps=2, log_every=1)
    train.run(config)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    train.run(dataclasses.replace(config, max_steps=4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] < 9 for line in lines)


def test_a_workdir_in_use_is_refused(tmp_path):
    with (
        only_one_process(tmp_path),
        pytest.raises(ValueError, match="in use by another process"),
    ):
        train.run(dataclasses.replace(SMALL, workdir=str(tmp_path)))
    train.run(dataclasses.replace(SMALL, workdir=str(tmp_path), max_steps=1))


def test_config_files_are_written_whole(tmp_path, monkeypatch):
    """A kill or a full disk while writing leaves the old file."""
    write_config(tmp_path, {"seed": 1})

    def full(self, content):
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_config(tmp_path, {"seed": 2})
    assert read_config(tmp_path) == {"seed": 1}


@pytest.mark.parametrize("content", ["{}", "[]", '{"image_shape": [8, 8, 1], "model": {"no": 1}}'])
def test_a_config_that_describes_no_network_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json does not describe a network"):
        load_trained(tmp_path)


def test_images_that_are_not_finite_stop_the_script(trained, tmp_path):
    """eta = 9 leaves no room for the noise: NaN, which as uint8 would be black."""
    with pytest.raises(FloatingPointError, match="5 of 5 images are not finite"):
        draw(trained, tmp_path / "a", eta=9.0)
    assert not list((tmp_path / "a").rglob("*.png"))


def test_images_of_an_earlier_call_are_not_left_among_new_ones(trained, tmp_path):
    draw(trained, tmp_path / "a")
    with pytest.raises(ValueError, match="holds 2 images more than the 3 asked for"):
        draw(trained, tmp_path / "a", num_images=3)
    assert len(draw(trained, tmp_path / "a", seed=1)) == 5


def test_a_spoilt_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    config = dataclasses.replace(SMALL, workdir=str(tmp_path), max_steps=2)
    train.run(config)
    with pytest.raises(FloatingPointError, match=r"step \d+ is nan"):
        # NaN from a clean optimizer state: weights thrown beyond what float32 can square.
        blown = dataclasses.replace(config, max_steps=30, learning_rate=1e30)
        (tmp_path / "config.json").unlink()  # the rate is another configuration
        train.run(blown)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 2


def test_conditional_training_and_sampling_use_the_labels(tmp_path):
    model = dataclasses.replace(SMALL.model, num_classes=10)
    # Quick steps, so that the labels, whose way out starts at nearly 0, show in the pixels.
    quick = dataclasses.replace(SMALL, learning_rate=0.05, warmup_steps=0, ema_decay=0.0)
    train.run(dataclasses.replace(quick, workdir=str(tmp_path), model=model))
    assert load_trained(tmp_path).network.model.num_classes == 10
    sample.main(
        sample.SampleConfig(str(tmp_path), str(tmp_path / "s"), num_images=3, num_sample_steps=2)
    )
    both = draw(tmp_path, tmp_path / "all"), draw(tmp_path, tmp_path / "one", label=2)
    same = [np.array_equal(a, b) for a, b in zip(*both, strict=True)]
    assert same == [False, False, True, False, False]  # image i is of class i
    guided = draw(tmp_path, tmp_path / "guided", label=2, guidance_scale=5.0)
    assert not np.array_equal(guided, both[1])
    with pytest.raises(ValueError, match=r"label must be in \[0, 9\].*got 10"):
        draw(tmp_path, tmp_path / "no", label=10)


def test_guidance_is_the_line_through_both_predictions(tmp_path):
    """Ho & Salimans 2022, eq. 6: uncond + scale (cond - uncond)."""
    model = dataclasses.replace(SMALL.model, num_classes=10)
    train.run(dataclasses.replace(SMALL, workdir=str(tmp_path), model=model, max_steps=2))
    trained = load_trained(tmp_path)
    x, t = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jax.numpy.asarray(500)
    label = jax.numpy.array([1, 5, 9])

    def network(label):
        return np.asarray(trained.network.model.apply({"params": trained.params}, x, t, label))

    cond, uncond = network(label), network(jax.numpy.full(3, 10))
    got = trained.network.eps_fn(trained.params, label, 3.0)(x, t)
    np.testing.assert_allclose(got, uncond + 3 * (cond - uncond), atol=1e-5)
    np.testing.assert_allclose(trained.network.eps_fn(trained.params, label)(x, t), cond, atol=1e-6)


def test_labels_and_guidance_are_refused_where_there_are_none(trained, tmp_path):
    for changes in ({"label": 1}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="label and guidance_scale must be left out"):
            draw(trained, tmp_path / "no", **changes)
    assert not (tmp_path / "no").exists()


def draw(trained, out, **changes) -> np.ndarray:
    config = sample.SampleConfig(
        workdir=str(trained), out=str(out), num_images=5, num_sample_steps=4, save_npz=True
    )
    sample.main(dataclasses.replace(config, **changes))
    with np.load(out / "samples.npz") as file:
        return file["images"]


def test_samples_are_written_once_each_and_do_not_depend_on_the_batch(trained, tmp_path, capsys):
    images = draw(trained, tmp_path / "a", eta=1.0)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    assert sorted(p.name for p in (tmp_path / "a" / "images").glob("*.png")) == [
        f"{i:05d}.png" for i in range(5)
    ]
    for i in range(5):
        np.testing.assert_array_equal(
            np.asarray(PIL.Image.open(tmp_path / "a" / "images" / f"{i:05d}.png")),
            images[i, ..., 0],
        )
    assert "ema weights of step 6" in capsys.readouterr().out
    in_twos = draw(trained, tmp_path / "b", eta=1.0, batch_size=2)
    assert np.abs(images.astype(int) - in_twos).max() <= 1
    assert (images != in_twos).mean() < 1e-2
    other = draw(trained, tmp_path / "c", eta=1.0, seed=1)
    assert (images != other).mean() > 0.3


def test_the_rows_of_the_table_are_different_samplers(trained, tmp_path):
    settings = [{"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}, {"sigma_hat": True},
                {"spacing": "quadratic"}, {"weights": "raw"}]  # fmt: skip
    drawn = [draw(trained, tmp_path / str(i), **s) for i, s in enumerate(settings)]
    for i in range(len(drawn)):
        for j in range(i):
            assert (drawn[i] != drawn[j]).any(), (settings[i], settings[j])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-sample-steps", "1001"], "num_sample_steps"),
        (["--eta", "-0.5"], "eta must be at least 0"),
        (["--num-images", "0"], "num_images"),
    ],
)
def test_sample_refuses_in_one_line_with_exit_code_2(trained, tmp_path, arguments, message):
    done = script(
        "experiments/sample.py", "--workdir", str(trained), "--out", str(tmp_path), *arguments
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_trained(tmp_path)
    write_config(tmp_path, json.loads((ROOT / "tests" / "tiny_config.json").read_text()))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        load_trained(tmp_path)


def test_a_grid_shows_each_image_in_its_place():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    picture = pictures.tile(images, columns=3)
    assert picture.shape == (5, 8, 1)
    assert picture[0, 0, 0] == 0 and picture[3, 6, 0] == 5 and picture[2, 0, 0] == 255
    assert pictures.enlarge(picture, 10).shape == (10, 16, 1)
