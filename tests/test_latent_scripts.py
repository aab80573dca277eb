"""The scripts that use a trained model's latents, on networks whose answers are known.

A network of zero weights predicts eps = 0 everywhere. Then x0_hat = x_t / sqrt(alpha_bar), every
deterministic sampler returns x_T / sqrt(alpha_bar), encoding loses nothing, and the bound's terms
are closed forms.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import compare_solvers
import interpolate
import likelihood
import reconstruct
import same_latent
import sample
import trajectory
from common import pictures, real
from common.options import RealImageOptions
from scipy.stats import norm

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.codec import CODECS, Codec
from ddim_jax.data.load import load_images
from ddim_jax.data.pixels import to_model_range, to_uint8
from ddim_jax.keys import initial_noise
from ddim_jax.metrics.classifier import (
    Classifier,
    apply_classifier,
    init_classifier,
    save_classifier,
)
from ddim_jax.runs import load_spec, load_trained
from ddim_jax.runs.folder import save_codec_params, write_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = json.loads((ROOT / "tests" / "tiny_config.json").read_text()) | {"data": "digits"}
LEVELS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def make_model(workdir: pathlib.Path, std: float, codec: dict | None = None, **model) -> str:
    """A workdir with weights drawn from N(0, std^2); 0 predicts eps = 0."""
    description = {} if codec is None else {"codec": codec}
    write_config(workdir, CONFIG | {"model": CONFIG["model"] | model} | description)
    spec = load_spec(workdir)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: std * rng.normal(size=s.shape).astype(s.dtype), spec.parameter_shapes()
    )
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params, "ema_params": params})
    save_codec_params(workdir, spec.codec.init(spec.image_shape))
    return str(workdir)


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("zero"), 0.0)


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("wild"), 0.1)


def results(out: pathlib.Path) -> dict:
    """What a script wrote, which says of itself what it was found with."""
    found = json.loads((out / "results.json").read_text())
    assert found["format"] == 2
    if "workdir" in found:
        assert found["fingerprint"] == load_trained(found["workdir"]).fingerprint
    return found


def captured_drawing(monkeypatch, script) -> list:
    """What the script's _draw is given."""
    calls: list = []
    monkeypatch.setattr(script, "_draw", lambda path, *args: calls.append(args))
    return calls


# ---------------------------------------------------------------------------------- reconstruction


def test_reconstruction_error_falls_and_the_implicit_one_is_far_below(wild, tmp_path, capsys):
    reconstruct.main(
        reconstruct.ReconstructConfig(
            workdir=wild, out=str(tmp_path), steps=(5,), num_images=5, fixed_point_iterations=7
        )
    )
    (row,) = results(tmp_path)["rows"]
    assert row["S"] == 5 and row["calls"] == 5 + 7 * 5 and row["plain_steps"] == 20
    assert 0 < row["plain_mse"] < row["mse"]
    assert row["implicit_mse"] < row["plain_mse"] / 10
    printed = capsys.readouterr().out
    assert "| 5 | 40 |" in printed
    assert f"run {load_trained(wild).fingerprint_id}" in printed
    assert PIL.Image.open(tmp_path / "reconstruct.png").size[0] > 500


def test_the_table_stands_beside_the_papers():
    table = reconstruct._table([{"S": 20, "mse": 0.5}, {"S": 30, "mse": 0.25}], None)
    assert table.splitlines()[2:] == ["| 20 | 5.00e-01 | 0.0065 |", "| 30 | 2.50e-01 |  |"]


def test_a_network_without_opinion_loses_nothing(zero, tmp_path, monkeypatch):
    drawn = captured_drawing(monkeypatch, reconstruct)
    reconstruct.main(
        reconstruct.ReconstructConfig(
            workdir=zero, out=str(tmp_path), timesteps=(700, 200, 31), num_images=5, batch_size=2
        )
    )
    _, images, latent, decoded, max_steps = drawn[0]
    assert max_steps == 1000
    np.testing.assert_array_equal(
        images, load_images("digits", split="test").take(np.arange(5))["image"]
    )
    np.testing.assert_array_equal(decoded[3], images)
    grey = images / 127.5 - 1
    want = to_uint8(np.float32(math.sqrt(LEVELS[700]) * grey / 3))
    assert np.abs(latent.astype(int) - np.asarray(want)).max() <= 1
    assert results(tmp_path)["rows"][0]["mse"] < 1e-10


def test_conditional_networks_encode_each_image_with_its_class(tmp_path):
    workdir = make_model(tmp_path / "model", 0.1, num_classes=10)
    reconstruct.main(
        reconstruct.ReconstructConfig(
            workdir=workdir, out=str(tmp_path / "out"), steps=(2,), num_images=3
        )
    )
    assert np.isfinite(results(tmp_path / "out")["rows"][0]["mse"])
    source = real.open_source(workdir, load_spec(workdir), RealImageOptions()).source
    np.testing.assert_array_equal(
        real.first(source, 3, 16).label, source.take(np.arange(3))["label"]
    )


# ------------------------------------------------------------------------------------- same latent


def test_distances_of_a_network_without_opinion(zero, tmp_path):
    classifier, path = Classifier(num_classes=10, width=4), str(tmp_path / "classifier.safetensors")
    params = init_classifier(jax.random.key(0), classifier, (8, 8, 1))
    save_classifier(path, classifier, params, {})
    same_latent.main(
        same_latent.SameLatentConfig(
            workdir=zero, out=str(tmp_path), steps=(2, 1), num_images=5, classifier=path
        )
    )
    found = results(tmp_path)
    assert found["S"] == [1, 2]
    x_T, _ = initial_noise(jax.random.key(0), np.arange(5), (8, 8, 1))
    images = [np.asarray(to_uint8(x_T / math.sqrt(LEVELS[t]))) for t in (999, 500)]
    want = [
        np.sqrt(((a / 255 - images[-1] / 255) ** 2).mean(axis=(1, 2, 3))).mean() for a in images
    ]
    np.testing.assert_allclose(found["distances"]["DDIM"]["pixels"], want, atol=2e-3)
    assert found["distances"]["DDPM"]["pixels"][0] > 0.1
    features = [apply_classifier(classifier, params, x).features for x in images]
    distance = np.linalg.norm(features[0] - features[1], axis=1).mean()
    assert found["distances"]["DDIM"]["features"] == pytest.approx([distance, 0], rel=0.05)
    assert (tmp_path / "same_latent.png").exists()
    same_latent.main(
        same_latent.SameLatentConfig(
            workdir=zero, out=str(tmp_path), steps=(2, 1), num_images=5, variance="fixed_large"
        )
    )
    larger = results(tmp_path)["distances"]
    assert larger["DDIM"]["pixels"] == found["distances"]["DDIM"]["pixels"]
    assert larger["DDPM"]["pixels"][0] != found["distances"]["DDPM"]["pixels"][0]


def test_pixel_distance_is_on_unit_pixels():
    black = np.zeros((3, 2, 2, 1), np.uint8)
    half = black.copy()
    half[:, 0] = 255  # half of each image is white
    assert same_latent.pixel_distance(half, black) == pytest.approx(math.sqrt(0.5))


# ----------------------------------------------------------------------------------- interpolation


def test_a_line_between_real_images_begins_and_ends_with_them(zero, tmp_path, monkeypatch):
    drawn = captured_drawing(monkeypatch, interpolate)
    interpolate.main(
        interpolate.InterpolateConfig(
            workdir=zero,
            out=str(tmp_path),
            images=(3, 8),
            num_points=5,
            grid_size=3,
            num_sample_steps=2,
        )
    )
    lines, originals, norms, grid = drawn[0]
    np.testing.assert_array_equal(
        originals, load_images("digits", split="test").take(np.array([3, 8]))["image"]
    )
    for line in lines:
        np.testing.assert_array_equal(line[[0, -1]], originals)
    assert grid.shape == (3, 3, 8, 8, 1)
    # Without a network's opinion lerp's middle is the mean of the images.
    mean = originals.astype(float).mean(axis=0)
    assert np.abs(lines[1][2] - mean).max() <= 1
    a, b = (x.ravel() / 127.5 - 1 for x in originals)
    assert norms["lerp"][2] == pytest.approx(
        math.sqrt(LEVELS[500]) * np.linalg.norm((a + b) / 2) / 8, rel=1e-3
    )


def test_lerp_between_noise_loses_norm_and_slerp_does_not(zero, tmp_path, capsys):
    interpolate.main(
        interpolate.InterpolateConfig(
            workdir=zero, out=str(tmp_path), num_points=5, grid_size=3, num_sample_steps=2
        )
    )
    x_T, _ = initial_noise(jax.random.key(0), np.arange(2), (8, 8, 1))
    a, b = np.asarray(x_T, np.float64).reshape(2, -1)
    middle = np.linalg.norm((a + b) / 2) / 8
    assert f"lerp: norms of the latents / sqrt(d) from {middle:.3f}" in capsys.readouterr().out
    assert (tmp_path / "interpolation.png").exists()


# -------------------------------------------------------------------------------------- trajectory


def test_a_trajectory_goes_from_noise_to_the_image(zero, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        drawn = captured_drawing(patch, trajectory)
        config = trajectory.TrajectoryConfig(
            workdir=zero, out=str(tmp_path), num_images=4, num_sample_steps=6
        )
        trajectory.main(config)
    states, x0s, timesteps, _, amplified = drawn[0]
    level = LEVELS[timesteps[0]]
    assert amplified == pytest.approx(math.sqrt((1 - level) / level), rel=1e-4)
    x_T, _ = initial_noise(jax.random.key(0), np.arange(4), (8, 8, 1))
    np.testing.assert_array_equal(states[:, 0], to_uint8(x_T))
    assert states.shape == (4, 7, 8, 8, 1) and x0s.shape == (4, 6, 8, 8, 1)
    np.testing.assert_array_equal(states[:, -1], x0s[:, -1])
    want = np.asarray(to_uint8(x_T / math.sqrt(LEVELS[timesteps[0]])))
    for i in range(6):
        assert np.abs(x0s[:, i].astype(int) - want).max() <= 1
    with PIL.Image.open(tmp_path / "trajectory.gif") as gif:
        assert gif.n_frames >= 6 and gif.info["loop"] == 0


def test_a_trajectory_is_drawn(wild, tmp_path):
    trajectory.main(
        trajectory.TrajectoryConfig(
            workdir=wild,
            out=str(tmp_path),
            num_images=2,
            num_sample_steps=3,
            sampler="ddim",
            eta=1.0,
        )
    )
    assert PIL.Image.open(tmp_path / "trajectory.png").size[0] > 500


# -------------------------------------------------------------------------------------- likelihood


def test_the_bound_of_a_network_without_opinion_is_its_closed_form(zero, tmp_path, capsys):
    likelihood.main(
        likelihood.LikelihoodConfig(
            workdir=zero,
            out=str(tmp_path),
            num_images=40,
            num_sample_steps=5,
            etas=(0.5,),
            batch_size=16,
        )
    )
    small, large, half = results(tmp_path)["rows"]
    images = load_images("digits", split="test").take(np.arange(40))["image"] / 127.5 - 1
    timesteps = [800, 600, 400, 200, 0]
    ab, ab_prev = LEVELS[timesteps[:-1]], LEVELS[timesteps[1:]]

    prior = (ab[0] * images**2 + 1 - ab[0] - 1 - math.log(1 - ab[0])).mean() / 2 / math.log(2)
    assert small["prior"] == pytest.approx(prior, rel=1e-3)
    assert small["prior"] == large["prior"] == half["prior"]

    def sigma(eta):
        return eta * np.sqrt((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev))

    def gamma(sigma):  # theorem 1 with its full weight; E eps^2 = 1 for each dimension
        c = np.sqrt(ab_prev) - np.sqrt((1 - ab_prev - sigma**2) * ab / (1 - ab))
        return c**2 * (1 - ab) / (2 * sigma**2 * ab) / math.log(2)

    np.testing.assert_allclose(small["each_step"], gamma(sigma(1.0)), rtol=0.15)
    # All processes see the same noise, so their terms are exact multiples of each other.
    np.testing.assert_allclose(
        np.divide(half["each_step"], small["each_step"]),
        gamma(sigma(0.5)) / gamma(sigma(1.0)),
        rtol=1e-3,
    )
    q, p = sigma(1.0) ** 2, 1 - ab / ab_prev
    shifted = np.array(small["each_step"]) * q / p + (q / p - 1 - np.log(q / p)) / 2 / math.log(2)
    np.testing.assert_allclose(large["each_step"], shifted, rtol=1e-3)
    for row in (small, large, half):
        assert row["steps"] == pytest.approx(sum(row["each_step"]), rel=1e-5)
        assert row["total"] == pytest.approx(row["prior"] + row["steps"] + row["decoder"], rel=1e-5)
    assert "40 images of digits" in capsys.readouterr().out
    assert (tmp_path / "likelihood.png").exists()


# ----------------------------------------------------------------------------------------- solvers


def test_solvers_converge_in_their_order_and_ddim_beats_eq_15(tmp_path, capsys):
    compare_solvers.main(
        compare_solvers.CompareConfig(out=str(tmp_path), steps=(10, 20), num_points=50)
    )
    found = results(tmp_path)
    assert len(found["convergence"]) == 4
    for name, theory in compare_solvers.ORDERS.items():
        label = compare_solvers.LABELS[name]
        assert abs(compare_solvers.measured_order(*found["convergence"][label]) - theory) < 0.2, (
            name
        )
    few = found["paper_schedule"]
    for of_ddim, of_eq_15 in zip(few["DDIM"], few["probability-flow Euler"], strict=True):
        assert of_eq_15 > 2 * of_ddim
    assert "order" in capsys.readouterr().out


def test_any_sampler_is_compared_at_its_network_calls(tmp_path, capsys):
    compare_solvers.main(
        compare_solvers.CompareConfig(
            out=str(tmp_path), samplers=("heun", "ddpm"), steps=(10, 20), num_points=20
        )
    )
    curves = results(tmp_path)["convergence"]
    assert curves["Heun"][0] == [17, 33, 65, 129, 257, 513]  # the last step is a plain one
    assert curves["ddpm"][0] == [9, 17, 33, 65, 129, 257]
    assert min(curves["ddpm"][1]) > 0.1  # the same data, another way
    assert "Heun" in capsys.readouterr().out
    with pytest.raises(ValueError, match="sampler must be one of ddim"):
        compare_solvers.main(compare_solvers.CompareConfig(out=str(tmp_path), samplers=("euler",)))


def test_the_exact_flow_keeps_every_quantile():
    x_T, alpha_bar = np.linspace(-2.0, 2.0, 9), 0.01
    with jax.enable_x64(True):
        x_0 = np.asarray(compare_solvers.exact_flow(jnp.asarray(x_T), alpha_bar))
    weights, means = compare_solvers.WEIGHTS, np.array(compare_solvers.MEANS)
    std = math.sqrt(alpha_bar * compare_solvers.STD**2 + 1 - alpha_bar)
    at_start = norm.cdf(x_T[:, None], math.sqrt(alpha_bar) * means, std) @ weights
    at_end = norm.cdf(x_0[:, None], means, compare_solvers.STD) @ weights
    np.testing.assert_allclose(at_end, at_start, atol=1e-9)


# ------------------------------------------------------------------------------------------ codecs


@dataclasses.dataclass(frozen=True)
class Patches(Codec):
    """Patches of 2x2 pixels, rotated and scaled: (H, W, C) becomes (H / 2, W / 2, 4 C)."""

    scale: float = 0.5

    def init(self, image_shape):
        size = 4 * image_shape[-1]
        normal = np.random.default_rng(0).normal(size=(size, size))
        return {"rotation": np.linalg.qr(normal)[0].astype(np.float32)}

    def latent_shape(self, image_shape):
        height, width, channels = image_shape
        return height // 2, width // 2, 4 * channels

    def encode(self, params, images, key=None):
        b, h, w, c = images.shape
        x = to_model_range(images).reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3)
        return self.scale * x.reshape(b, h // 2, w // 2, 4 * c) @ params["rotation"]

    def decode(self, params, x0):
        b, h, w, size = x0.shape
        x = (x0 / self.scale @ params["rotation"].T).reshape(b, h, w, 2, 2, size // 4)
        return x.swapaxes(2, 3).reshape(b, 2 * h, 2 * w, size // 4)


PATCHES = {"name": "patches", "scale": 0.5}


@pytest.fixture
def latent_zero(tmp_path, monkeypatch) -> str:
    """`zero`, of latents."""
    monkeypatch.setitem(CODECS, "patches", Patches)
    return make_model(tmp_path / "model", 0.0, PATCHES)


def pixels_of(latents) -> np.ndarray:
    """Patches.decode of grey 8x8 images, pixel by pixel."""
    rotation = Patches().init((8, 8, 1))["rotation"]
    images = np.zeros((len(latents), 8, 8, 1), np.float32)
    for n, y, x in np.ndindex(len(latents), 8, 8):
        patch = np.asarray(latents)[n, y // 2, x // 2] @ rotation.T / 0.5
        images[n, y, x, 0] = patch[2 * (y % 2) + x % 2]
    return images


def test_reconstruction_through_a_codec(latent_zero, tmp_path, monkeypatch, capsys):
    assert load_spec(latent_zero).latent_shape == (4, 4, 4)
    drawn = captured_drawing(monkeypatch, reconstruct)
    reconstruct.main(
        reconstruct.ReconstructConfig(
            workdir=latent_zero, out=str(tmp_path), timesteps=(700, 31), num_images=5, batch_size=2
        )
    )
    _, images, latent, decoded, max_steps = drawn[0]
    assert max_steps == 1000
    np.testing.assert_array_equal(
        images, load_images("digits", split="test").take(np.arange(5))["image"]
    )
    np.testing.assert_array_equal(decoded[2], images)
    want = to_uint8(np.float32(math.sqrt(LEVELS[700])) * np.float32(images / 127.5 - 1) / 3)
    assert np.abs(latent.astype(int) - np.asarray(want)).max() <= 1
    assert results(tmp_path)["rows"][0]["mse"] < 1e-10
    assert "to the codec's own reconstruction" in capsys.readouterr().out


def test_the_error_through_a_codec_is_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "patches", Patches)
    workdir = make_model(tmp_path / "model", 0.1, PATCHES)
    grey = np.random.default_rng(0).integers(100, 156, (5, 8, 8, 1), np.uint8)  # nothing to clip
    np.savez(tmp_path / "grey.npz", images=grey)
    drawn = captured_drawing(monkeypatch, reconstruct)
    reconstruct.main(
        reconstruct.ReconstructConfig(
            workdir=workdir,
            out=str(tmp_path),
            data=str(tmp_path / "grey.npz"),
            split="train",
            timesteps=(300, 100),
            num_images=5,
        )
    )
    decoded = drawn[0][3][2]
    want = ((decoded / 255 - grey / 255) ** 2).mean()
    assert want > 2e-5  # rounding makes 1.3e-6
    assert results(tmp_path)["rows"][0]["mse"] == pytest.approx(want, rel=0.1)


def test_the_same_latent_through_a_codec(latent_zero, tmp_path):
    same_latent.main(
        same_latent.SameLatentConfig(
            workdir=latent_zero, out=str(tmp_path), steps=(1, 2), num_images=5, batch_size=2
        )
    )
    x_T, _ = initial_noise(jax.random.key(0), np.arange(5), (4, 4, 4))
    images = [np.asarray(to_uint8(pixels_of(x_T / math.sqrt(LEVELS[t])))) for t in (999, 500)]
    want = [
        np.sqrt(((a / 255 - images[-1] / 255) ** 2).mean(axis=(1, 2, 3))).mean() for a in images
    ]
    assert want[0] > 0.05
    found = results(tmp_path)["distances"]["DDIM"]["pixels"]
    np.testing.assert_allclose(found, want, atol=2e-3)


def test_a_line_between_real_images_through_a_codec(latent_zero, tmp_path, monkeypatch):
    drawn = captured_drawing(monkeypatch, interpolate)
    interpolate.main(
        interpolate.InterpolateConfig(
            workdir=latent_zero,
            out=str(tmp_path),
            images=(3, 8),
            num_points=5,
            grid_size=3,
            num_sample_steps=2,
        )
    )
    lines, originals, norms, grid = drawn[0]
    for line in lines:
        np.testing.assert_array_equal(line[[0, -1]], originals)
    mean = originals.astype(float).mean(axis=0)
    assert np.abs(lines[1][2] - mean).max() <= 1
    a, b = (x.ravel() / 127.5 - 1 for x in originals)
    # The rotation keeps the norm, the scale halves it; 64 numbers either way.
    assert norms["lerp"][2] == pytest.approx(
        math.sqrt(LEVELS[500]) * 0.5 * np.linalg.norm((a + b) / 2) / 8, rel=1e-3
    )
    x_T, _ = initial_noise(jax.random.key(0), np.arange(4), (4, 4, 4))
    corners = grid[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    want = np.asarray(to_uint8(pixels_of(x_T / math.sqrt(LEVELS[500]))))
    assert np.abs(corners - want).max() <= 1


def test_a_trajectory_through_a_codec(latent_zero, tmp_path, monkeypatch):
    drawn = captured_drawing(monkeypatch, trajectory)
    config = trajectory.TrajectoryConfig(
        workdir=latent_zero, out=str(tmp_path), num_images=3, num_sample_steps=4, batch_size=2
    )
    trajectory.main(config)
    states, x0s, timesteps, _, amplified = drawn[0]
    level = LEVELS[timesteps[0]]
    assert amplified == pytest.approx(math.sqrt((1 - level) / level), rel=1e-4)
    assert states.shape == (3, 5, 8, 8, 1) and x0s.shape == (3, 4, 8, 8, 1)
    x_T, _ = initial_noise(jax.random.key(0), np.arange(3), (4, 4, 4))
    start = np.asarray(to_uint8(pixels_of(x_T)))
    end = np.asarray(to_uint8(pixels_of(x_T / math.sqrt(LEVELS[timesteps[0]]))))
    assert np.abs(states[:, 0].astype(int) - start).max() <= 1
    assert np.abs(states[:, -1].astype(int) - end).max() <= 1
    assert np.abs(x0s[:, 0].astype(int) - end).max() <= 1


def test_the_bound_of_latents_is_refused(latent_zero, tmp_path):
    out = tmp_path / "new"
    with pytest.raises(ValueError, match="codec must be the identity, since the bound counts bits"):
        likelihood.main(likelihood.LikelihoodConfig(workdir=latent_zero, out=str(out)))
    assert not out.exists()


# ---------------------------------------------------------------------------------------- samplers


def test_every_sampler_draws_and_the_deterministic_ones_agree(zero, tmp_path):
    drawn = {}
    for name in ("ddim", "heun", "dpm_solver_pp_2m", "probability_flow_euler", "ddpm"):
        out = tmp_path / name
        sample.main(
            sample.SampleConfig(
                workdir=zero,
                out=str(out),
                num_images=3,
                num_sample_steps=2,
                sampler=name,
                save_npz=True,
            )
        )
        with np.load(out / "samples.npz") as file:
            drawn[name] = file["images"].astype(int)
    noisy = drawn.pop("ddpm")
    for name, images in drawn.items():
        assert np.abs(images - drawn["ddim"]).max() <= 1, name
    assert (noisy != drawn["ddim"]).any()


# ---------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def other_shape(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "other.npz"
    np.savez(path, images=np.zeros((3, 4, 4, 1), np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def nothing(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "nothing.npz"
    np.savez(path, images=np.zeros((0, 8, 8, 1), np.uint8))
    return str(path)


def test_sets_that_do_not_fit_are_refused(zero, other_shape, nothing):
    for main, config in [
        (reconstruct.main, reconstruct.ReconstructConfig),
        (likelihood.main, likelihood.LikelihoodConfig),
    ]:
        with pytest.raises(ValueError, match=r"network's shape \(8, 8, 1\)"):
            main(config(workdir=zero, data=other_shape, split="train"))
        with pytest.raises(ValueError, match="none of them 0"):
            main(config(workdir=zero, data=nothing, split="train"))
        with pytest.raises(ValueError, match="split must be one of"):
            main(config(workdir=zero, split="validation"))


CONFIGS = {
    reconstruct: reconstruct.ReconstructConfig,
    same_latent: same_latent.SameLatentConfig,
    interpolate: interpolate.InterpolateConfig,
    trajectory: trajectory.TrajectoryConfig,
    likelihood: likelihood.LikelihoodConfig,
    sample: sample.SampleConfig,
}


@pytest.mark.parametrize(
    "script, changes, message",
    [
        (reconstruct, {"num_images": 361}, r"num_images must be in \[1, 360\]"),
        (reconstruct, {"num_images": 0}, "num_images"),
        (reconstruct, {"batch_size": 0}, "batch_size"),
        (reconstruct, {"steps": ()}, "steps"),
        (reconstruct, {"steps": (1001,)}, "num_sample_steps"),
        (reconstruct, {"timesteps": (5, 9)}, "timesteps must descend"),
        (reconstruct, {"fixed_point_iterations": 0}, "fixed_point_iterations"),
        (same_latent, {"steps": (5,)}, "steps must name at least two"),
        (same_latent, {"num_images": 0}, "num_images"),
        (same_latent, {"classifier": "no/such"}, "classifier must be a file"),
        (interpolate, {"images": (0, 360)}, r"images must lie in \[0, 359\]"),
        (interpolate, {"num_points": 1}, "num_points"),
        (interpolate, {"grid_size": 1}, "grid_size"),
        (trajectory, {"num_images": 0}, "num_images"),
        (trajectory, {"eta": -1.0}, "eta"),
        (trajectory, {"sampler": "euler"}, "sampler must be one of ddim, sigma_hat, "),
        (trajectory, {"batch_size": 0}, "batch_size"),
        (trajectory, {"num_columns": 1}, "num_columns"),
        (trajectory, {"sampler": "heun", "eta": 0.5}, "heun, which has none"),
        (likelihood, {"etas": (0.0,)}, "eta must be positive"),
        (likelihood, {"num_images": 0}, "num_images"),
        (likelihood, {"num_sample_steps": 0}, "num_sample_steps"),
        (likelihood, {"num_sample_steps": 1}, "at least two"),
        (likelihood, {"num_sample_steps": 300, "spacing": "quadratic"}, "strictly"),
        (sample, {"sampler": "ddpm", "eta": 0.5}, "ddpm, which has none"),
    ],
)
def test_bad_settings_are_refused(zero, tmp_path, script, changes, message):
    config = CONFIGS[script]
    out = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        script.main(config(workdir=zero, **({"out": str(out)} | changes)))
    assert not out.exists()


def test_refusals_are_one_line_with_exit_code_2(zero):
    done = subprocess.run(
        [sys.executable, "experiments/reconstruct.py", "--workdir", zero, "--split", "tset"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: split must be one of")
    assert len(done.stderr.strip().splitlines()) == 1


def test_pictures_beside_each_other():
    left, right = np.zeros((3, 2, 1), np.uint8), np.full((3, 4, 1), 9, np.uint8)
    picture = pictures.beside(left, right, gap=1)
    assert picture.shape == (3, 7, 1)
    assert picture[0, :, 0].tolist() == [0, 0, 255, 9, 9, 9, 9]
