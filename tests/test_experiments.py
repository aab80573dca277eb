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

import interpolate
import reconstruct
import sample
import train
from common import pictures
from presets import PRESETS

from ddim_jax import ddim
from ddim_jax.runs import ModelConfig, load_trained, read_config

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
    train.main(dataclasses.replace(SMALL, workdir=str(workdir), sample_every=6))
    return workdir


def test_a_run_leaves_its_settings_its_losses_and_its_pictures(trained):
    config = read_config(trained)
    assert config["image_shape"] == [8, 8, 1]
    assert config["batch_size"] == 16
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert PIL.Image.open(trained / "samples" / "step_0000006.png").size[0] >= 8 * 8
    assert list((trained / "tensorboard").glob("events*"))


def test_images_that_are_not_finite_stop_the_script(trained, tmp_path):
    """eta = 9 leaves no room for the noise: NaN, which as uint8 would be black."""
    with pytest.raises(FloatingPointError, match="5 of 5 images are not finite"):
        draw(trained, tmp_path / "a", eta=9.0)
    assert not list((tmp_path / "a").rglob("*.png"))


def test_conditional_training_and_sampling_use_the_labels(tmp_path):
    model = dataclasses.replace(SMALL.model, num_classes=10)
    # Quick steps, so that the labels, whose way out starts at nearly 0, show in the pixels.
    quick = dataclasses.replace(SMALL, learning_rate=0.05, warmup_steps=0, ema_decay=0.0)
    train.main(dataclasses.replace(quick, workdir=str(tmp_path), model=model))
    assert load_trained(tmp_path).spec.num_classes == 10
    draw(tmp_path, tmp_path / "s", num_images=3, num_sample_steps=2)
    both = draw(tmp_path, tmp_path / "all"), draw(tmp_path, tmp_path / "one", label=2)
    same = [np.array_equal(a, b) for a, b in zip(*both, strict=True)]
    assert same == [False, False, True, False, False]  # image i is of class i
    guided = draw(tmp_path, tmp_path / "guided", label=2, guidance_scale=5.0)
    assert not np.array_equal(guided, both[1])
    with pytest.raises(ValueError, match=r"label must be in \[0, 9\].*got 10"):
        draw(tmp_path, tmp_path / "no", label=10)


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


def test_the_library_draws_what_the_script_writes(trained, tmp_path, capsys):
    run = load_trained(trained)
    for batch_size in (256, 2):  # of one batch size, to the bit
        written = draw(trained, tmp_path / str(batch_size), seed=3, batch_size=batch_size)
        drawn = run.sample(jax.random.key(3), 5, 4, batch_size=batch_size)
        np.testing.assert_array_equal(drawn, written)
        assert f"seed 3, run {run.fingerprint_id}" in capsys.readouterr().out
    in_threes = run.sample(jax.random.key(3), 5, 4, batch_size=3)
    assert np.abs(in_threes.astype(int) - written).max() <= 1
    assert (in_threes != written).mean() < 1e-2
    raw = load_trained(trained, "raw", step=6, dtype="bfloat16")
    written = draw(trained, tmp_path / "raw", weights="raw", step=6, dtype="bfloat16", eta=1.0,
                   spacing="quadratic")  # fmt: skip
    drawn = raw.sample(jax.random.key(0), 5, 4, sampler=ddim(1.0), spacing="quadratic")
    np.testing.assert_array_equal(drawn, written)
    with pytest.raises(ValueError, match=r"step must be one of \[6\]"):
        draw(trained, tmp_path / "no", step=3)


def test_digits_v_trains_and_samples_on_a_schedule_that_ends_in_pure_noise(tmp_path):
    preset = PRESETS["digits-v"][1]
    small = {field: getattr(SMALL, field) for field in (
        "model", "batch_size", "max_steps", "log_every", "checkpoint_every")}  # fmt: skip
    train.main(dataclasses.replace(preset, workdir=str(tmp_path), sample_every=6, **small))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # A network that says nothing pays |v|^2, between eps^2, which is 1, and x0^2, which is below.
    assert all(0 < line["loss"] < 1.5 for line in lines)
    spec = load_trained(tmp_path).spec
    assert spec.predicts == "v" and float(spec.schedule.alpha_bar(999)) == 0
    assert spec.timesteps(4)[0] == 999
    settings = ({}, {"eta": 1.0}, {"sigma_hat": True}, {"sampler": "dpm_solver_pp_2m"})
    for i, changes in enumerate(settings):
        images = draw(tmp_path, tmp_path / str(i), **changes)  # raises where one is not finite
        assert images.shape == (5, 8, 8, 1) and images.std() > 10, changes


def test_ddpms_own_protocol_is_the_papers_sigma_hat(trained, tmp_path, capsys):
    """The larger variance with x0 clipped is what the published code calls sigma-hat."""
    clipped = draw(trained, tmp_path / "a", sampler="ddpm_fixed_large", clip_x0=True)
    assert "ddpm_fixed_large, x0 clipped, " in capsys.readouterr().out
    close = draw(trained, tmp_path / "b", sampler="sigma_hat")
    assert np.abs(clipped.astype(int) - close).max() <= 1
    plain = draw(trained, tmp_path / "c", sampler="ddpm_fixed_large")
    assert (clipped != plain).mean() > 0.1
    said = [json.loads((tmp_path / n / "samples.json").read_text())["fingerprint"] for n in "ac"]
    assert said[0].pop("clip_x0") is True and said[0] == said[1]
    with pytest.raises(ValueError, match=r"settings: fingerprint\.clip_x0"):
        draw(trained, tmp_path / "a", sampler="ddpm_fixed_large")


def test_a_network_that_clips_is_not_asked_to_encode(trained, tmp_path):
    with pytest.raises(ValueError, match="clip_x0 must be left out where images are encoded"):
        options = {"workdir": str(trained), "out": str(tmp_path / "a"), "clip_x0": True}
        reconstruct.main(reconstruct.ReconstructConfig(**options))
    with pytest.raises(ValueError, match="clip_x0 must be left out where images are encoded"):
        interpolate.main(interpolate.InterpolateConfig(images=(0, 1), **options))
    assert not (tmp_path / "a").exists()


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


def test_a_grid_shows_each_image_in_its_place():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    picture = pictures.tile(images, columns=3)
    assert picture.shape == (5, 8, 1)
    assert picture[0, 0, 0] == 0 and picture[3, 6, 0] == 5 and picture[2, 0, 0] == 255
    assert pictures.enlarge(picture, 10).shape == (10, 16, 1)
