"""Statistics, classifier and sweep, run as their users run them on a tiny network."""

import contextlib
import dataclasses
import hashlib
import html
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from typing import NamedTuple

import edits
import jax
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")

import fid
import fid_sweep
import likelihood
import make_statistics
import sample
import sweep_report
import train_classifier
import tyro
from common import sweep_measure, sweep_store, times
from common.sweep_draw import Drawer, image_programs
from common.sweep_store import Cell, read_results
from common.sweep_table import rows_of
from presets import PRESETS
from test_sweep_report import LINE

from ddim_jax.data.load import load_images
from ddim_jax.metrics.classifier import apply_classifier, load_classifier
from ddim_jax.metrics.frechet import frechet_distance
from ddim_jax.metrics.inception_score import inception_score
from ddim_jax.metrics.kid import kid
from ddim_jax.metrics.metric import Metric, Number
from ddim_jax.metrics.precision_recall import density_coverage, precision_recall
from ddim_jax.metrics.statistics import load_statistics
from ddim_jax.metrics.table import METRICS
from ddim_jax.runs import ModelConfig, RunSpec, ScheduleConfig, fit, load_trained

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = ModelConfig(
    channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=4
)
SMALL = dataclasses.replace(
    PRESETS["digits"][1],
    model=TINY,
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
def workdir(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("model")
    fit(dataclasses.replace(SMALL, workdir=str(path)))
    return path


@pytest.fixture(scope="module")
def stats(tmp_path_factory) -> pathlib.Path:
    """Statistics of the digits' pixels."""
    path = tmp_path_factory.mktemp("stats") / "pixels.npz"
    statistics(path, "pixels", "frechet")
    return path


def statistics(path, features: str, *metrics: str) -> None:
    make_statistics.main(
        make_statistics.StatisticsConfig(
            data="digits", out=str(path), features=features, metrics=metrics
        )
    )


@pytest.fixture(scope="module")
def config(workdir, stats, tmp_path_factory) -> fid_sweep.SweepConfig:
    """Two cells of 21 images, in batches of 12 and 9."""
    return fid_sweep.SweepConfig(
        workdir=str(workdir),
        stats=(str(stats),),
        out=str(tmp_path_factory.mktemp("sweep")),
        steps=(3,),
        etas=(0.0, "sigma_hat"),
        num_samples=21,
        batch_size=12,
    )


@pytest.fixture(scope="module")
def finished(config) -> fid_sweep.SweepConfig:
    fid_sweep.main(config)
    return config


def lines(out) -> list[dict]:
    """The results without the time they took."""
    found = read_results(pathlib.Path(out))
    assert all(line.pop("seconds") > 0 for line in found)
    return found


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1


def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return np.round(load_digits().images[:1437] * (255 / 16))[..., None]


def test_statistics_are_of_every_image_once(stats):
    statistics = load_statistics(stats)
    want = pixels(digits())
    assert statistics.num_samples == len(want) == 1437
    np.testing.assert_allclose(statistics.mean, want.mean(axis=0), atol=5e-3)
    np.testing.assert_allclose(statistics.cov, np.cov(want, rowvar=False), atol=5e-3)
    assert statistics.data == {
        "name": "digits",
        "split": "train",
        "image_shape": [8, 8, 1],
        "resized_to": None,
    }


def test_the_statistics_script_leaves_the_standard_module_alone(tmp_path):
    done = script("experiments/make_statistics.py", "digits", "--features", "pixels", "--out",
                  str(tmp_path / "s.npz"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1437 images of digits" in done.stdout
    code = "import statistics, sys; print(statistics.fmean([1, 2]), sys.modules['statistics'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "experiments", capture_output=True, text=True
    )
    assert done.stdout.startswith("1.5") and "experiments" not in done.stdout, done.stderr


def test_each_cell_is_the_distance_of_the_images_sample_py_draws(finished, stats, tmp_path):
    reference = load_statistics(stats)
    rows = [(line["sampler"], line["eta"]) for line in lines(finished.out)]
    assert rows == [("ddim", 0.0), ("sigma_hat", None)]
    for line in lines(finished.out):
        out = tmp_path / line["name"]
        sample.main(
            sample.SampleConfig(
                workdir=finished.workdir,
                out=str(out),
                num_images=21,
                num_sample_steps=3,
                sigma_hat=line["sampler"] == "sigma_hat",
                save_npz=True,
            )
        )
        with np.load(out / "samples.npz") as file:
            drawn = pixels(file["images"])
        want = frechet_distance(
            drawn.mean(axis=0), np.cov(drawn, rowvar=False), reference.mean, reference.cov
        )
        assert line["values"]["fd_pixels"] == pytest.approx(want, rel=1e-3)


def test_a_line_carries_its_protocol(finished, stats):
    line = lines(finished.out)[0]
    assert line.keys() == LINE.keys() - {"seconds"}  # what the report's tests are told of lines
    measure = line["measures"]["fd_pixels"]
    assert measure.keys() == LINE["measures"]["fd_pixels"].keys()
    assert measure["statistics_hash"] == load_statistics(stats).content_hash[:16]
    assert measure["dim"] == 64 and re.fullmatch("[0-9a-f]{16}", measure["network_hash"])
    assert line["weights"]["kind"] == "ema" and line["weights"]["step"] == 6
    assert (line["S"], line["num_samples"], line["spacing"]) == (3, 21, "uniform")
    assert line["rounding"] == "nearest" and line["device"] and line["versions"]["jax"]
    run = load_trained(finished.workdir)
    assert (line["format"], line["times"]) == (3, 2)
    assert line["fingerprint_id"] == run.fingerprint_id
    settings = json.loads((pathlib.Path(finished.out) / "sweep.json").read_text())
    assert settings["format"] == 3 and settings["fingerprint"] == run.fingerprint


def test_the_batch_size_does_not_matter(finished, tmp_path):
    fid_sweep.main(dataclasses.replace(finished, out=str(tmp_path), batch_size=21))
    for a, b in zip(lines(finished.out), lines(tmp_path), strict=True):
        assert a["values"]["fd_pixels"] == pytest.approx(b["values"]["fd_pixels"], rel=1e-3)


def test_a_sweep_stopped_after_every_batch_ends_in_the_same_bits(finished, tmp_path):
    again = dataclasses.replace(finished, out=str(tmp_path), max_seconds=0.0)
    for done, under_way in ((0, True), (1, False), (1, True), (2, False)):
        fid_sweep.main(again)  # one batch to a call, two to a cell
        assert len(lines(tmp_path)) == done
        assert (tmp_path / "partial.npz").exists() == under_way
    assert lines(tmp_path) == lines(finished.out)
    grids = [pathlib.Path(out) / "samples" / "S0003_eta_0.png" for out in (tmp_path, finished.out)]
    np.testing.assert_array_equal(*(np.asarray(PIL.Image.open(grid)) for grid in grids))
    fid_sweep.main(again)  # nothing left to do
    assert lines(tmp_path) == lines(finished.out)


def test_a_cell_killed_before_its_line_is_written_is_not_drawn_again(
    finished, tmp_path, monkeypatch
):
    mine = dataclasses.replace(finished, out=str(tmp_path), save_every=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sweep_measure, "append_result", interrupted)
        fid_sweep.main(mine)
    assert progress(tmp_path) == (0, 21)
    fid_sweep.main(mine)
    assert lines(tmp_path) == lines(finished.out)


def interrupted(*arguments):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_eight_devices_measure_what_one_does(finished, tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [
        *(sys.executable, "experiments/fid_sweep.py", "--workdir", finished.workdir),
        *("--stats", *finished.stats, "--out", str(tmp_path), "--num-samples", "21"),
        *("--steps", "3", "--etas", "0", "sigma_hat", "--batch-size", "16"),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for one, eight in zip(lines(finished.out), lines(tmp_path), strict=True):
        assert eight["device"].startswith("8 x")
        assert eight["values"] == pytest.approx(one["values"], rel=1e-3)


@pytest.mark.slow
def test_a_killed_sweep_continues_to_the_same_bits(config, tmp_path):
    larger = dataclasses.replace(
        config, num_samples=405, batch_size=8, save_every=1, steps=(3, 40), spacing="uniform"
    )
    arguments = [
        *("--workdir", larger.workdir, "--stats", *larger.stats, "--batch-size", "8"),
        *("--num-samples", "405", "--save-every", "1", "--steps", "3", "40"),
        *("--etas", "0", "sigma_hat", "--spacing", "uniform"),
    ]
    command = [sys.executable, "experiments/fid_sweep.py", *arguments, "--out", str(tmp_path)]
    counts = []
    for wait in np.random.default_rng(0).uniform(0.1, 1.0, size=3):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        before = progress(tmp_path)
        while progress(tmp_path) == before:  # killed once it has gone on, not while it starts
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        counts.append(progress(tmp_path))
    assert counts == sorted(counts)
    assert (
        subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode == 0
    )
    fid_sweep.main(dataclasses.replace(larger, out=str(tmp_path / "straight")))
    assert len(lines(tmp_path)) == 4
    assert lines(tmp_path) == lines(tmp_path / "straight")


def progress(out: pathlib.Path) -> tuple[int, int]:
    """Finished cells, and images of the cell under way."""
    cells = len(read_results(out))
    for name in ("partial.npz", "drawn.npz"):
        with contextlib.suppress(FileNotFoundError), np.load(out / name) as file:
            return cells, int(file["count"])
    return cells, 0


def test_a_sweep_goes_on_whatever_the_measured_data_are_called(finished, tmp_path):
    """Statistics of the same images from another place; those of other images are refused."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    images = load_images("digits").take(np.arange(1437))["image"]
    for name, some in (("same", images), ("half", images[::2])):
        np.savez(tmp_path / f"{name}.npz", images=some)
        made = tmp_path / f"{name}-stats.npz"
        make_statistics.main(
            make_statistics.StatisticsConfig(
                data=str(tmp_path / f"{name}.npz"), out=str(made), features="pixels"
            )
        )
        moved = dataclasses.replace(finished, out=str(out), stats=(str(made),))
        if name == "same":
            fid_sweep.main(moved)
        else:
            with pytest.raises(ValueError, match=r"holds another sweep: .*statistics_hash"):
                fid_sweep.main(moved)
    assert lines(out) == lines(finished.out)


def test_a_sweep_of_other_settings_is_refused_and_left_alone(finished):
    before = (pathlib.Path(finished.out) / "sweep.json").read_text()
    for change, message in (
        ({"num_samples": 22}, "num_samples is 21 there and 22 now"),
        ({"batch_size": 4}, "batch_size is 12 there and 4 now"),
        ({"weights": "raw"}, "weights.kind is .*ema.* there and .*raw.* now"),
    ):
        with pytest.raises(ValueError, match=message):
            fid_sweep.main(dataclasses.replace(finished, **change))
    assert (pathlib.Path(finished.out) / "sweep.json").read_text() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": (1001,)}, "num_sample_steps"),
        ({"steps": (5, 5)}, "steps must be one or more different values"),
        ({"etas": (-1.0,)}, "eta must be at least 0"),
        ({"stats": ("no/such/file.npz",)}, "no/such/file.npz is not a file"),
        ({"workdir": "no/such/folder"}, "no config.json"),
        ({"metrics": ("fid",)}, "metric must be one of frechet, kid.*got 'fid'"),
        ({"metrics": ("kid",)}, "kid compares with kept_pool.*make_statistics.py --metrics kid"),
        ({"metrics": ("inception_score",)}, "inception_score reads logits.*gives pool only"),
        ({"kept_features": 1}, "kept_features must be at least 2"),
        ({"samplers": ("ddim",)}, "samplers must not name ddim"),
        ({"samplers": ("no",)}, "sampler must be one of ddim.*got 'no'"),
        ({"samplers": ("sigma_hat",)}, "etas and samplers must be one or more different values"),
        ({"spacing": "uniform", "spacings": ("uniform",)}, "must not both be given"),
        ({"guidance_scales": (1.0, 3.0)}, "guidance_scale must be left out"),
        ({"seed": 1, "seeds": (0, 1)}, "seed and seeds must not both be given"),
        ({"seeds": (1, 1)}, "seeds must be one or more different values"),
        ({"timesteps": ("9 x",)}, "timesteps must be time indices"),
        ({"timesteps": ("9,0", "9 0")}, "timesteps must be one or more different values"),
        ({"timesteps": ("0,9",)}, "timesteps must descend"),
        ({"timesteps": ("9", "5", "0")}, "For one list of 3 steps give 9,5,0"),
        ({"seeds": (-1,)}, r"seeds must be in \[0, 4294967295\]; got -1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(config, change, message, tmp_path):
    out = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        fid_sweep.main(dataclasses.replace(config, out=str(out), **change))
    assert not out.exists()


def test_a_refusal_is_one_line_and_exit_code_2(config, tmp_path):
    done = script("experiments/fid_sweep.py", "table1-cifar10", "--workdir", config.workdir,
                  "--stats", "no/such/file.npz", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 2
    assert "no/such/file.npz is not a file" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_distance_of_a_set_to_itself_is_zero(stats, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=load_images("digits").take(np.arange(1437))["image"])
    fid.main(fid.FidConfig(images=str(tmp_path / "images.npz"), stats=str(stats)))
    printed = capsys.readouterr().out
    assert float(re.match(r"fd_pixels ([\d.e-]+): N = 1437", printed)[1]) < 1e-6
    half = load_images("digits").take(np.arange(60))["image"]
    np.savez(tmp_path / "few.npz", images=half)
    fid.main(fid.FidConfig(images=str(tmp_path / "few.npz"), stats=str(stats)))
    assert "N = 60 samples do not exceed the 64 feature dimensions" in capsys.readouterr().out


def test_a_classifier_measures_from_beside_its_statistics(tmp_path, capsys):
    settings = dataclasses.replace(
        train_classifier.PRESETS["digits"][1], out=str(tmp_path), width=4, num_steps=60
    )
    train_classifier.main(settings)
    trained = load_classifier(tmp_path / "classifier.safetensors")
    assert trained.metadata["test_accuracy"] > 0.3  # chance is 0.1
    path = str(tmp_path / "stats.npz")
    statistics(path, "classifier", "frechet")
    assert load_statistics(path).network_hash == trained.content_hash
    fid.main(fid.FidConfig(images="digits", stats=path))
    assert re.search(r"fd_classifier ([\d.e-]+): N = 1437", capsys.readouterr().out)


# ------------------------------------------------------------------------- more rows, more columns


def test_a_sweep_goes_on_only_with_the_same_schedule(config, workdir, tmp_path):
    """The folder's schedule is edited between two calls: its images are others from then on."""
    model = tmp_path / "model"
    shutil.copytree(workdir, model)
    mine = dataclasses.replace(config, workdir=str(model), out=str(tmp_path / "out"), etas=(0.0,))
    fid_sweep.main(mine)
    described = edits.content(model / "config.json")
    described["schedule"]["name"] = "cosine"
    (model / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"schedule\.name is 'linear' there and 'cosine' now"):
        fid_sweep.main(dataclasses.replace(mine, etas=(0.0, 1.0)))
    assert len(lines(mine.out)) == 1


def test_all_etas_share_one_program(workdir):
    spec = load_trained(workdir).spec
    plain = [Cell(3, "ddim", eta, 1.0, "uniform") for eta in (0.0, 0.5, 1.0)]
    plain.append(Cell(3, "sigma_hat", None, 1.0, "uniform"))
    assert len(image_programs(spec, plain)) == 1
    others = [Cell(4, "ddim", 0.0, 1.0, "uniform"), Cell(3, "ddim", 0.0, 1.0, "quadratic")]
    others.append(Cell(3, "heun", None, 1.0, "uniform"))
    assert len(image_programs(spec, [*plain, *others])) == 4


def test_cells_are_named_as_before_and_say_what_is_not_plain():
    cell = Cell(10, "ddim", 0.0, 1.0, "quadratic")
    assert cell.name("quadratic") == "S0010_eta_0"
    assert cell._replace(eta=0.2).name("quadratic") == "S0010_eta_0.2"
    assert cell._replace(sampler="sigma_hat", eta=None).name("quadratic") == "S0010_sigma_hat"
    assert cell._replace(guidance_scale=1.5).name("uniform") == (
        "S0010_eta_0_guidance_1.5_quadratic"
    )


def fid_py(images, stats, capsys, *metrics: str) -> dict[str, float]:
    """The numbers that fid.py prints, by column."""
    capsys.readouterr()
    fid.main(fid.FidConfig(images=str(images), stats=str(stats), metrics=metrics))
    # What they depend on, which has numbers too, stands after the first colon of a line.
    numbers = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    found = re.findall(r"(\w+) (-?[\d.e-]+)(?:,|$)", "\n".join(numbers), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_rows_are_the_images_that_sample_py_draws(config, stats, tmp_path, capsys):
    mine = dataclasses.replace(
        config, out=str(tmp_path / "out"), etas=(), samplers=("heun", "dpm_solver_pp_2m")
    )
    fid_sweep.main(mine)
    found = lines(mine.out)
    assert [(line["sampler"], line["eta"]) for line in found] == [
        ("heun", None),
        ("dpm_solver_pp_2m", None),
    ]
    assert [line["name"] for line in found] == ["S0003_heun", "S0003_dpm_solver_pp_2m"]
    assert [line["network_calls"] for line in found] == [5, 3]
    for line in found:
        out = tmp_path / line["name"]
        draw(mine, out, sampler=line["sampler"])
        printed = fid_py(out / "images", stats, capsys, "frechet")
        assert line["values"] == pytest.approx(printed, rel=1e-3)


def test_spacings_are_rows_that_a_later_call_may_add(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    more = dataclasses.replace(
        finished, out=str(out), etas=(0.0,), spacings=("trailing", "uniform")
    )
    fid_sweep.main(more)
    before, (new,) = lines(finished.out), lines(out)[2:]
    assert lines(out)[:2] == before
    assert (new["spacing"], new["name"]) == ("trailing", "S0003_eta_0_trailing")
    assert new["values"] != before[0]["values"]
    assert "| DDIM, eta = 0, trailing |" in (out / "report.md").read_text()


def test_an_own_list_is_a_row_with_the_number_of_the_images_that_sample_py_draws(
    finished, stats, tmp_path, capsys
):
    out = shutil.copytree(finished.out, tmp_path / "out")
    mine = dataclasses.replace(finished, out=str(out), etas=(0.0,), paper="cifar10")
    fid_sweep.main(dataclasses.replace(mine, timesteps=("999,500 3",)))
    (new,) = lines(out)[2:]
    assert (new["S"], new["spacing"]) == (3, "999 500 3")
    assert new["name"] == "S0003_eta_0_times_999-500-3"
    assert "| DDIM, eta = 0, t = 999, 500, 3 |" in (out / "report.md").read_text()
    draw(mine, tmp_path / "s", timesteps=(999, 500, 3))
    printed = fid_py(tmp_path / "s" / "images", stats, capsys, "frechet")
    assert new["values"] == pytest.approx(printed, rel=1e-3)
    record = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert (record["num_sample_steps"], record["spacing"]) == (3, "999 500 3")
    # A named sub-sequence, spelt out, is the same images.
    draw(mine, tmp_path / "n", timesteps=(666, 333, 0))
    (uniform,) = (x for x in lines(out) if x["spacing"] == "uniform" and x["eta"] == 0)
    printed = fid_py(tmp_path / "n" / "images", stats, capsys, "frechet")
    assert uniform["values"] == pytest.approx(printed, rel=1e-3)
    for more in ({"spacing": "uniform"}, {"num_sample_steps": 7}, {"num_sample_steps": 50}):
        (name,) = more
        with pytest.raises(ValueError, match=f"{name} must be left out beside timesteps"):
            draw(mine, tmp_path / "b", timesteps=(999,), **more)


def test_an_own_list_that_starts_where_there_is_little_noise_is_warned_of(finished):
    """As a named one is, whose S = 3 is this list of 0.67 T."""
    spec = load_trained(finished.workdir).spec
    with pytest.warns(UserWarning, match=r"list of times t = 666, 333, 0 starts at t = 666"):
        times.timesteps_of(spec, 3, "666 333 0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times.timesteps_of(spec, 2, "700 0")


def test_a_sweep_of_a_model_that_trained_on_says_how_to_go_on(finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "model")
    out = shutil.copytree(finished.out, tmp_path / "out")
    fit(dataclasses.replace(SMALL, workdir=str(workdir), max_steps=8))
    mine = dataclasses.replace(finished, out=str(out), workdir=str(workdir), etas=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"step is 6 there and 8 now.* --step 6 among them"):
        fid_sweep.main(mine)
    fid_sweep.main(dataclasses.replace(mine, step=6))
    assert [line["weights"]["step"] for line in lines(out)] == [6, 6, 6]
    fid_sweep.main(dataclasses.replace(mine, out=str(tmp_path / "other")))
    assert {line["weights"]["step"] for line in lines(tmp_path / "other")} == {8}


def test_the_report_says_what_it_is_and_is_the_same_when_made_again(finished, tmp_path):
    out = tmp_path / "out"
    mine = dataclasses.replace(
        finished, out=str(out), paper="cifar10", max_seconds=0.0, batch_size=21, timesteps=("9,0",)
    )
    fid_sweep.main(mine)  # one cell of four
    text, page = ((out / f"report.{kind}").read_text() for kind in ("md", "html"))
    run = load_trained(finished.workdir)
    begun = json.loads((out / "sweep.json").read_text())["begun"]
    command = next(x for x in text.splitlines() if x.startswith("Command: "))
    for said in (
        f"Model: {finished.workdir}, ema weights of step 6, hash {run.weights_hash[:12]}; "
        f"fingerprint {run.fingerprint_id}.",
        f"Begun {begun}. Not complete: 3 of 4 cells are missing, of S = 2, 3;",
    ):
        assert said in text and said in html.unescape(page)
    python, path, *words = shlex.split(command.removeprefix("Command: "))
    assert (python, path) == ("python", "experiments/fid_sweep.py")
    assert tyro.cli(fid_sweep.SweepConfig, args=words) == mine
    fid_sweep.main(dataclasses.replace(mine, max_seconds=None))
    assert "Complete: all 4 cells are measured." in (out / "report.md").read_text()
    assert f"Begun {begun}." in (out / "report.md").read_text()
    copy = shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns("report.*"))
    sweep_report.main(sweep_report.ReportConfig(out=str(copy)))
    for name in ("report.md", "report.html"):
        assert (copy / name).read_bytes() == (out / name).read_bytes()
    # More that is asked for is missing until it is there; what was asked for before stays.
    fid_sweep.main(dataclasses.replace(mine, etas=(0.5, 1.0)))
    assert "Not complete: 3 of 8 cells are missing" in (out / "report.md").read_text()


def test_numbers_that_end_while_the_next_cell_begins_are_no_error(tmp_path, monkeypatch):
    """Its file is there when looked for, and gone when read."""
    read = sweep_store.read_npz

    def late(path, *arguments, **options):
        path.unlink()
        return read(path, *arguments, **options)

    (tmp_path / "drawn.npz").write_bytes(b"")
    monkeypatch.setattr(sweep_store, "read_npz", late)
    assert sweep_store.load_progress(tmp_path, "S0003_eta_0", []).count == 0


def test_seeds_are_cells_that_a_later_call_may_add_to_a_sweep_of_format_2(finished, tmp_path):
    """Each with the number of the sweep of that seed alone; the table has their mean and spread."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    for name in ("sweep.json", "results.jsonl"):  # which had no seals
        text = (out / name).read_text().replace('"format": 3', '"format": 2')
        (out / name).write_text(re.sub(r',\s*"seal": "\w+"', "", text))
    fid_sweep.main(dataclasses.replace(finished, out=str(out), etas=(0.0,), seeds=(0, 7)))
    alone = dataclasses.replace(finished, out=str(tmp_path / "alone"), etas=(0.0,), seed=7)
    fid_sweep.main(alone)
    (want,), (new,) = lines(alone.out), lines(out)[2:]
    assert (want["seed"], want["name"]) == (7, "S0003_eta_0")
    assert new == want | {"name": "S0003_eta_0_seed_7"}
    assert (out / "samples" / "S0003_eta_0_seed_7.png").exists()
    values = [line["values"]["fd_pixels"] for line in (lines(out)[0], new)]
    entry = f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}"
    report = (out / "report.md").read_text()
    assert f"| DDIM, eta = 0 | {entry} |" in report and "seed 0 alone |" in report
    assert "Mean over the seeds 0, 7; after ±: their standard deviation" in report


def draw(config, out, **options) -> None:
    """The images by sample.py, in batches as the sweep's: its program may be compiled already."""
    sample.main(
        sample.SampleConfig(
            workdir=config.workdir,
            out=str(out),
            num_images=21,
            batch_size=12,
            **({} if "timesteps" in options else {"num_sample_steps": 3}) | options,
        )
    )


def test_guidance_scales_are_rows_of_a_model_with_classes(config, stats, tmp_path, capsys):
    model = str(tmp_path / "model")
    classes = dataclasses.replace(TINY, num_classes=10)
    # Quick steps, so that the labels, whose way out starts at nearly 0, show in the pixels.
    quick = dataclasses.replace(SMALL, learning_rate=0.05, warmup_steps=0, ema_decay=0.0)
    fit(dataclasses.replace(quick, workdir=model, model=classes))
    mine = dataclasses.replace(
        config, workdir=model, out=str(tmp_path / "out"), etas=(0.0,), guidance_scales=(1.0, 3.0)
    )
    fid_sweep.main(mine)
    found = lines(mine.out)
    assert [(line["guidance_scale"], line["network_calls"]) for line in found] == [(1, 3), (3, 6)]
    assert [line["name"] for line in found] == ["S0003_eta_0", "S0003_eta_0_guidance_3"]
    for line in found:
        out = tmp_path / line["name"]
        draw(mine, out, guidance_scale=line["guidance_scale"])
        printed = fid_py(out / "images", stats, capsys, "frechet")
        assert line["values"] == pytest.approx(printed, rel=1e-3)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| DDIM, eta = 0, guidance 3 |" in report and ", 6 calls |" in report


METRIC_NAMES = ("frechet", "kid", "inception_score", "precision_recall", "density_coverage")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> pathlib.Path:
    """A folder with a classifier, and its statistics for every metric."""
    folder = tmp_path_factory.mktemp("classifier")
    settings = train_classifier.PRESETS["digits"][1]
    train_classifier.main(dataclasses.replace(settings, out=str(folder), width=4, num_steps=60))
    statistics(folder / "stats.npz", "classifier", *METRIC_NAMES)
    return folder


def test_every_metric_is_a_column_with_the_number_of_the_pure_function(
    config, classifier, tmp_path, capsys
):
    mine = dataclasses.replace(
        config,
        stats=(str(classifier / "stats.npz"),),
        out=str(tmp_path / "out"),
        etas=(0.0,),
        metrics=METRIC_NAMES,
        max_seconds=0.0,
    )
    fid_sweep.main(mine)  # stopped after a batch: the states of all metrics go on
    assert not lines(mine.out)
    fid_sweep.main(dataclasses.replace(mine, max_seconds=None))
    (line,) = lines(mine.out)

    draw(mine, tmp_path / "drawn", save_npz=True)
    trained = load_classifier(classifier / "classifier.safetensors")
    with np.load(tmp_path / "drawn" / "samples.npz") as file:
        ours = apply_classifier(trained.model, trained.params, file["images"])
    images = load_images("digits").take(np.arange(1437))["image"]
    real = apply_classifier(trained.model, trained.params, images).features
    want = {}
    want |= numbers("kid", kid(ours.features, real, subset_size=21))
    want |= numbers("inception_score", inception_score(ours.logits))
    want |= precision_recall(real, ours.features)._asdict()
    want |= density_coverage(real, ours.features)._asdict()
    for name, value in want.items():
        assert line["values"][f"{name}_classifier"] == pytest.approx(value, rel=1e-3), name
    assert line["values"].keys() == {f"{name}_classifier" for name in ("fd", *want)}

    shown = line["measures"]["kid_classifier"]
    assert shown["description"] == "21 images against 1437, 100 subsets of 21"
    assert "no error bar" in shown["warning"] and shown["direction"] == "lower"
    assert line["measures"]["kid_std_classifier"]["std_of"] == "kid_classifier"
    printed = fid_py(tmp_path / "drawn" / "images", mine.stats[0], capsys, *METRIC_NAMES)
    assert {name: printed[name] for name in line["values"]} == pytest.approx(
        line["values"], rel=1e-3
    )


def numbers(name: str, mean_and_std: tuple[float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_std"), mean_and_std, strict=True))


class Brightness(NamedTuple):
    total: np.ndarray
    count: np.ndarray


def brightness(num_kept: int) -> Metric:
    """How much brighter the images are than the reference: a metric of somebody's own."""
    return Metric(
        name="brightness",
        features="pool",
        state="brightness",
        numbers=(Number("brightness", "Brightness", "higher", "linear"),),
        init=lambda dim: Brightness(np.zeros(()), np.zeros((), np.int64)),
        update=lambda state, x, indices: Brightness(
            state.total + np.asarray(x, np.float64).mean(axis=1).sum(), state.count + len(indices)
        ),
        merge=lambda a, b: Brightness(a.total + b.total, a.count + b.count),
        compute=lambda state, reference: {
            "brightness": float(state.total / state.count - reference.total / reference.count)
        },
        describe=lambda state, reference: f"{state.count} images as bright as can be",
        warning=lambda state, reference: "bright is not good",
    )


def test_a_metric_of_ones_own_is_a_column_and_an_option(config, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "brightness", brightness)
    stats, out = tmp_path / "stats.npz", tmp_path / "out"
    statistics(stats, "pixels", "brightness")
    fid_sweep.main(
        tyro.cli(
            fid_sweep.SweepConfig,
            args=[
                *("--workdir", config.workdir, "--stats", str(stats), "--out", str(out)),
                *("--steps", "3", "--etas", "0", "1", "--num-samples", "21", "--batch-size", "12"),
                *("--metrics", "frechet", "brightness"),
            ],
        )
    )
    found = lines(out)
    drawn = tmp_path / "drawn"
    draw(config, drawn, save_npz=True)
    with np.load(drawn / "samples.npz") as file:
        want = pixels(file["images"]).mean() - pixels(digits()).mean()
    assert found[0]["values"]["brightness_pixels"] == pytest.approx(want, abs=5e-3)
    report = (out / "report.md").read_text()
    assert "## brightness_pixels" in report and "Higher is better." in report
    assert "Warning: bright is not good" in report
    assert "21 images as bright as can be" in report
    best = max(found, key=lambda line: line["values"]["brightness_pixels"])
    page = (out / "report.html").read_text()
    section = page[page.index("<h2>brightness_pixels") :]
    assert f'<td class="best">{best["values"]["brightness_pixels"]:.4g}</td>' in section


# ----------------------------------------------------------------- sweeps from before format 2


def old_weights_hash(params) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def as_in_format_1(there: pathlib.Path, out: pathlib.Path) -> None:
    """A sweep stopped within its second cell, as versions before format 2 left it in a folder."""
    settings = edits.content(there / "sweep.json")
    run, measure = load_trained(there.parent / "model"), settings["measures"]["fd_pixels"]
    shared = {
        "num_samples": 21,
        "spacing": "uniform",
        "seed": 0,
        "rounding": "nearest",
        "weights": {"kind": "ema", "step": 6, "hash": old_weights_hash(run.params.network)},
        "measures": {"fd_pixels": {k: v for k, v in measure.items() if k != "metric"}},
        "batch_size": 12,
    }
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps(shared, indent=2) + "\n")
    (line,) = lines(there)
    protocol = {"seconds": 1.5, **shared, "device": line["device"], "versions": line["versions"]}
    old = {"S": 3, "eta": 0.0, "distances": line["values"], **protocol}
    (out / "results.jsonl").write_text(json.dumps(old) + "\n")
    with np.load(there / "partial.npz") as file:
        moments = {
            f"fd_pixels.{field}": file[f"pixels.moments.{field}"]
            for field in ("count", "mean", "scatter")
        }
    np.savez(out / "partial.npz", cell="S0003_sigma_hat", count=12, seconds=0.5, **moments)


@pytest.fixture(scope="module")
def begun(config, workdir, tmp_path_factory) -> pathlib.Path:
    """The folder "old" that an older version began, beside its model."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(workdir, folder / "model")
    mine = dataclasses.replace(
        config, workdir=str(folder / "model"), out=str(folder / "new"), max_seconds=0.0
    )
    for _ in range(3):
        fid_sweep.main(mine)  # a batch to a call: one cell, and half of the other
    as_in_format_1(folder / "new", folder / "old")
    return folder


@pytest.fixture
def old_sweep(config, begun, tmp_path) -> fid_sweep.SweepConfig:
    """The settings of `config` on a copy of it."""
    shutil.copytree(begun / "old", tmp_path / "old")
    return dataclasses.replace(config, workdir=str(begun / "model"), out=str(tmp_path / "old"))


def test_an_old_sweep_goes_on_to_the_same_numbers(old_sweep, finished):
    fid_sweep.main(old_sweep)
    old, new = lines(old_sweep.out), lines(finished.out)
    assert [line["values"] for line in old] == [line["values"] for line in new]
    assert [line["name"] for line in old] == [line["name"] for line in new]
    assert old[1] == new[1]  # the finished cell says all that a new sweep's does
    settings = [
        edits.content(pathlib.Path(out) / "sweep.json") for out in (old_sweep.out, finished.out)
    ]
    assert settings[0].pop("begun") is None  # nobody knows
    del settings[1]["begun"]
    for content in settings:
        del content["model"], content["command"]  # which were asked for
    assert settings[0] == settings[1]
    report = (pathlib.Path(old_sweep.out) / "report.md").read_text()
    assert "| DDIM, eta = 0 |" in report and "| sigma-hat |" in report


def test_an_old_sweep_of_other_settings_is_refused(old_sweep):
    path = pathlib.Path(old_sweep.out) / "sweep.json"
    before = path.read_text()
    for change, message in (
        ({"num_samples": 22}, "num_samples is 21 there and 22 now"),
        ({"batch_size": 4}, "batch_size is 12 there and 4 now"),
        ({"weights": "raw"}, "weights.kind is 'ema' there and 'raw' now"),
    ):
        with pytest.raises(ValueError, match=message):
            fid_sweep.main(dataclasses.replace(old_sweep, **change))
    other = before.replace('"hash": "', '"hash": "0')
    path.write_text(other)
    with pytest.raises(ValueError, match=r"weights\.hash is '0"):
        fid_sweep.main(old_sweep)
    assert path.read_text() == other


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("sweep.json", '{"format": 4}', "must be of format 2 or 3, or of none.*got 4"),
        ("sweep.json", "{}", "does not describe a sweep"),
        ("results.jsonl", '{"S": 3', "delete the bad line"),
        ("results.jsonl", "{}", "delete the bad line"),
        ("partial.npz", "PK", "Delete it to draw this cell again"),
    ],
)
def test_damaged_files_are_named_with_the_way_out(old_sweep, name, content, message):
    (pathlib.Path(old_sweep.out) / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        fid_sweep.main(old_sweep)


def test_an_old_sweep_knew_no_dtype(old_sweep):
    with pytest.raises(ValueError, match="dtype must be left out to continue the sweep"):
        fid_sweep.main(dataclasses.replace(old_sweep, dtype="bfloat16"))


def test_results_whose_sweep_is_gone_are_not_taken_over(finished, tmp_path):
    """Else another model's cells would stand in one table with them."""
    out = shutil.copytree(finished.out, tmp_path / "sweep")
    (out / "sweep.json").unlink()
    with pytest.raises(ValueError, match="of a sweep whose"):
        fid_sweep.main(dataclasses.replace(finished, out=str(out), seed=7))


def test_settings_that_look_alike_have_files_of_their_own():
    etas = (0.3333333, 0.33333334, 0.1)
    names = [Cell(10, "ddim", eta, 1.0, "uniform").name("uniform") for eta in etas]
    assert len(set(names)) == 3 and names[2] == "S0010_eta_0.1"


def test_settings_that_look_alike_have_rows_of_their_own():
    etas = (0.3333333, 0.33333334, 0.1)
    scales = (1.2345678, 1.2345679)
    cells = [(eta, scale) for eta in etas for scale in scales]
    line = {"sampler": "ddim", "spacing": "uniform"}
    titles = rows_of([line | {"eta": eta, "guidance_scale": scale} for eta, scale in cells])
    assert len(set(titles.values())) == len(cells)
    assert "eta = 0.33333334, guidance 1.2345679" in titles.values()
    spec = RunSpec(ModelConfig(channels=8, norm_groups=4), ScheduleConfig(), (8, 8, 1))
    rows = likelihood._processes(spec, np.array([900, 500, 100]), etas)
    assert list(rows)[2:] == ["eta = 0.3333333", "eta = 0.33333334", "eta = 0.1"]


@pytest.mark.parametrize("save_images, want", [(False, {0: 12}), (True, {0: 12, 12: 12})])
def test_only_images_that_are_shown_leave_the_device(
    config, save_images, want, tmp_path, monkeypatch
):
    draw, came = Drawer.draw, {}

    def heard(self, cell, batches, *is_shown):
        batches = list(batches)
        for indices, batch in zip(batches, draw(self, cell, batches, *is_shown), strict=True):
            if batch.images is not None:
                assert isinstance(batch.images, np.ndarray)
                came[int(indices[0])] = len(batch.images)
            assert isinstance(batch.finite, np.ndarray) and len(batch.finite) == len(indices)
            yield batch

    monkeypatch.setattr(Drawer, "draw", heard)
    fid_sweep.main(dataclasses.replace(config, out=str(tmp_path), etas=(0.0,),
                                       save_images=save_images))  # fmt: skip
    assert came == want
    written = sorted((tmp_path / "images").rglob("*.png"))
    assert len(written) == (21 if save_images else 0)
    assert (tmp_path / "samples" / "S0003_eta_0.png").exists()


def test_the_images_of_a_sweep_are_all_of_its_cells_or_none(finished, tmp_path, capsys, stats):
    """Stopped in a cell's middle, with images lost since: the same images, which measure alike."""
    mine = dataclasses.replace(finished, out=str(tmp_path / "out"), etas=(0.0,), save_images=True)
    fid_sweep.main(dataclasses.replace(mine, max_seconds=0.0, save_every=1))
    folder = tmp_path / "out" / "images" / "S0003_eta_0"
    drawn = sorted(folder.glob("*.png"))
    assert len(drawn) == 12
    with pytest.raises(ValueError, match="is not complete: 12 of the 21 images"):
        fid_py(folder, stats, capsys, "frechet")
    with pytest.raises(ValueError, match="save_images is True there and False now"):
        fid_sweep.main(dataclasses.replace(mine, save_images=False))
    before = drawn[4].read_bytes()
    drawn[4].unlink()
    capsys.readouterr()
    fid_sweep.main(mine)
    assert "S0003_eta_0 is drawn anew" in capsys.readouterr().out
    assert drawn[4].read_bytes() == before and len(list(folder.glob("*.png"))) == 21
    (line,) = lines(tmp_path / "out")
    assert fid_py(folder, stats, capsys, "frechet") == pytest.approx(line["values"], rel=1e-6)
    assert line["values"] == lines(finished.out)[0]["values"]


def test_one_step_from_t_0_is_measured_again_from_noise(finished, tmp_path, capsys):
    """As an earlier version left it: a line of S = 1, and the next cell under way."""
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    old, kept = (edits.without_seal(json.loads(text)) for text in (out / "results.jsonl").open())
    del old["times"]
    old |= {"S": 1, "name": "S0001_eta_0", "network_calls": 1}
    (out / "results.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(kept) + "\n")
    partial = {"format": 2, "cell": "S0001_sigma_hat", "count": 12, "seconds": 1.0}
    np.savez(out / "partial.npz", **partial)  # whose states would be missing
    fid_sweep.main(dataclasses.replace(finished, out=str(out), steps=(1,)))
    assert "S0001_eta_0 was measured from other times" in capsys.readouterr().out
    found = {line["name"]: line for line in lines(out)}
    assert sorted(found) == ["S0001_eta_0", "S0001_sigma_hat", "S0003_sigma_hat"]
    assert found["S0001_eta_0"]["values"] != old["values"]
    kept.pop("seconds")
    assert found["S0003_sigma_hat"] == kept
