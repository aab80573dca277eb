"""The scripts that use a trained model's latents, on networks whose answers are known.

A network of zero weights predicts eps = 0 everywhere. Then x0_hat = x_t / sqrt(alpha_bar), every
deterministic sampler returns x_T / sqrt(alpha_bar), encoding loses nothing, and the bound's terms
are closed forms.
"""

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
import consistency
import interpolate
import likelihood
import pictures
import real
import reconstruct
import sample
import trajectory
from scipy.stats import norm
from workdir import load_network, write_config

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.data import load_images, to_uint8
from ddim_jax.keys import initial_noise
from ddim_jax.metrics.classifier import (
    Classifier,
    apply_classifier,
    init_classifier,
    save_classifier,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = json.loads((ROOT / "tests" / "tiny_config.json").read_text()) | {"data": "digits"}
LEVELS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def make_model(workdir: pathlib.Path, std: float, **model) -> str:
    """A workdir with weights drawn from N(0, std^2); 0 predicts eps = 0."""
    write_config(workdir, CONFIG | {"model": CONFIG["model"] | model})
    network = load_network(workdir)
    label = None if network.model.num_classes is None else 0
    shapes = jax.eval_shape(
        lambda key: network.model.init(key, jnp.zeros(network.image_shape), 0, label),
        jax.random.key(0),
    )["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: std * rng.normal(size=s.shape).astype(s.dtype), shapes)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params, "ema_params": params})
    return str(workdir)


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("zero"), 0.0)


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("wild"), 0.1)


def results(out: pathlib.Path) -> dict:
    return json.loads((out / "results.json").read_text())


def captured_drawing(monkeypatch, script) -> list:
    """What the script's _draw is given."""
    calls: list = []
    monkeypatch.setattr(script, "_draw", lambda path, *args: calls.append(args))
    return calls


# ---------------------------------------------------------------------------------- reconstruction


def test_reconstruction_error_falls_and_the_implicit_one_is_far_below(wild, tmp_path, capsys):
    reconstruct.main(
        reconstruct.ReconstructConfig(
            wild, str(tmp_path), steps=(5,), num_images=5, fixed_point_iterations=7
        )
    )
    (row,) = results(tmp_path)["rows"]
    assert row["S"] == 5 and row["calls"] == 5 + 7 * 5 and row["plain_steps"] == 20
    assert 0 < row["plain_mse"] < row["mse"]
    assert row["implicit_mse"] < row["plain_mse"] / 10
    assert "| 5 | 40 |" in capsys.readouterr().out
    assert PIL.Image.open(tmp_path / "reconstruct.png").size[0] > 500


def test_the_table_stands_beside_the_papers():
    table = reconstruct._table([{"S": 20, "mse": 0.5}, {"S": 30, "mse": 0.25}], None)
    assert table.splitlines()[2:] == ["| 20 | 5.00e-01 | 0.0065 |", "| 30 | 2.50e-01 |  |"]


def test_a_network_without_opinion_loses_nothing(zero, tmp_path, monkeypatch):
    drawn = captured_drawing(monkeypatch, reconstruct)
    reconstruct.main(
        reconstruct.ReconstructConfig(
            zero, str(tmp_path), timesteps=(700, 200, 31), num_images=5, batch_size=2
        )
    )
    _, images, latent, decoded = drawn[0]
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
        reconstruct.ReconstructConfig(workdir, str(tmp_path / "out"), steps=(2,), num_images=3)
    )
    assert np.isfinite(results(tmp_path / "out")["rows"][0]["mse"])
    source = real.open_source(workdir, load_network(workdir), None, "test", None)
    np.testing.assert_array_equal(real.first(source, 3).label, source.take(np.arange(3))["label"])


# ------------------------------------------------------------------------------------- consistency


def test_distances_of_a_network_without_opinion(zero, tmp_path):
    classifier, path = Classifier(num_classes=10, width=4), str(tmp_path / "classifier.safetensors")
    params = init_classifier(jax.random.key(0), classifier, (8, 8, 1))
    save_classifier(path, classifier, params, {})
    consistency.main(
        consistency.ConsistencyConfig(
            zero, str(tmp_path), steps=(2, 1), num_images=5, classifier=path
        )
    )
    found = results(tmp_path)
    assert found["S"] == [1, 2]
    x_T, _ = initial_noise(jax.random.key(0), np.arange(5), (8, 8, 1))
    images = [np.asarray(to_uint8(x_T / math.sqrt(LEVELS[t]))) for t in (0, 500)]
    want = [
        np.sqrt(((a / 255 - images[-1] / 255) ** 2).mean(axis=(1, 2, 3))).mean() for a in images
    ]
    np.testing.assert_allclose(found["distances"]["DDIM"]["pixels"], want, atol=2e-3)
    assert found["distances"]["DDPM"]["pixels"][0] > 0.1
    features = [apply_classifier(classifier, params, x).features for x in images]
    distance = np.linalg.norm(features[0] - features[1], axis=1).mean()
    assert found["distances"]["DDIM"]["features"] == pytest.approx([distance, 0], rel=0.05)
    assert (tmp_path / "consistency.png").exists()


def test_pixel_distance_is_on_unit_pixels():
    black = np.zeros((3, 2, 2, 1), np.uint8)
    half = black.copy()
    half[:, 0] = 255  # half of each image is white
    assert consistency.pixel_distance(half, black) == pytest.approx(math.sqrt(0.5))


# ----------------------------------------------------------------------------------- interpolation


def test_a_line_between_real_images_begins_and_ends_with_them(zero, tmp_path, monkeypatch):
    drawn = captured_drawing(monkeypatch, interpolate)
    interpolate.main(
        interpolate.InterpolateConfig(
            zero, str(tmp_path), images=(3, 8), num_points=5, grid_size=3, num_sample_steps=2
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
            zero, str(tmp_path), num_points=5, grid_size=3, num_sample_steps=2
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
        config = trajectory.TrajectoryConfig(zero, str(tmp_path), num_images=4, num_sample_steps=6)
        trajectory.main(config)
    states, x0s, timesteps, _ = drawn[0]
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
            wild, str(tmp_path), num_images=2, num_sample_steps=3, sampler="ddim", eta=1.0
        )
    )
    assert PIL.Image.open(tmp_path / "trajectory.png").size[0] > 500


# -------------------------------------------------------------------------------------- likelihood


def test_the_bound_of_a_network_without_opinion_is_its_closed_form(zero, tmp_path, capsys):
    likelihood.main(
        likelihood.LikelihoodConfig(
            zero, str(tmp_path), num_images=40, num_sample_steps=5, etas=(0.5,), batch_size=16
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
        compare_solvers.CompareConfig(str(tmp_path), steps=(10, 20), num_points=50)
    )
    found = results(tmp_path)
    for name, (_, theory) in compare_solvers.SOLVERS.items():
        assert abs(compare_solvers.measured_order(*found["convergence"][name]) - theory) < 0.2, name
    few = found["paper_schedule"]
    for of_ddim, of_eq_15 in zip(few["DDIM"], few["probability-flow Euler"], strict=True):
        assert of_eq_15 > 2 * of_ddim
    assert "order" in capsys.readouterr().out


def test_the_exact_flow_keeps_every_quantile():
    x_T, alpha_bar = np.linspace(-2.0, 2.0, 9), 0.01
    with jax.enable_x64(True):
        x_0 = np.asarray(compare_solvers.exact_flow(jnp.asarray(x_T), alpha_bar))
    weights, means = compare_solvers.WEIGHTS, np.array(compare_solvers.MEANS)
    std = math.sqrt(alpha_bar * compare_solvers.STD**2 + 1 - alpha_bar)
    at_start = norm.cdf(x_T[:, None], math.sqrt(alpha_bar) * means, std) @ weights
    at_end = norm.cdf(x_0[:, None], means, compare_solvers.STD) @ weights
    np.testing.assert_allclose(at_end, at_start, atol=1e-9)


# ---------------------------------------------------------------------------------------- samplers


def test_every_sampler_draws_and_the_deterministic_ones_agree(zero, tmp_path):
    drawn = {}
    for name in ("ddim", "heun", "dpm_solver_pp_2m", "probability_flow_euler", "ddpm"):
        out = tmp_path / name
        sample.main(
            sample.SampleConfig(
                zero, str(out), num_images=3, num_sample_steps=2, sampler=name, save_npz=True
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
            main(config(zero, data=other_shape, split="train"))
        with pytest.raises(ValueError, match="none of them 0"):
            main(config(zero, data=nothing, split="train"))
        with pytest.raises(ValueError, match="split must be one of"):
            main(config(zero, split="validation"))
    with pytest.raises(ValueError, match=r"network's shape \(8, 8, 1\)"):
        interpolate.main(
            interpolate.InterpolateConfig(zero, images=(0, 1), data=other_shape, split="train")
        )


CONFIGS = {
    reconstruct: reconstruct.ReconstructConfig,
    consistency: consistency.ConsistencyConfig,
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
        (consistency, {"steps": (5,)}, "steps must name at least two"),
        (consistency, {"num_images": 0}, "num_images"),
        (consistency, {"classifier": "no/such"}, "classifier must be a file"),
        (interpolate, {"images": (0, 360)}, r"images must lie in \[0, 359\]"),
        (interpolate, {"num_points": 1}, "num_points"),
        (interpolate, {"grid_size": 1}, "grid_size"),
        (trajectory, {"num_images": 0}, "num_images"),
        (trajectory, {"eta": -1.0}, "eta"),
        (trajectory, {"sampler": "heun", "eta": 0.5}, "heun, which has neither"),
        (likelihood, {"etas": (0.0,)}, "eta must be positive"),
        (likelihood, {"num_sample_steps": 1}, "at least two"),
        (likelihood, {"num_sample_steps": 300, "spacing": "quadratic"}, "strictly"),
        (sample, {"sampler": "ddpm", "eta": 0.5}, "ddpm, which has neither"),
    ],
)
def test_bad_settings_are_refused(zero, tmp_path, script, changes, message):
    config = CONFIGS[script]
    out = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        script.main(config(zero, **({"out": str(out)} | changes)))
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
