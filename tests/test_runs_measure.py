"""Distance and held-out loss while a run trains, and the report of them."""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))

import make_statistics
import train
import training_report
from refusals import refused
from small_runs import SMALL, assert_same_bits

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.data import load_images
from ddim_jax.data.content import content_of
from ddim_jax.data.source import ArraySource
from ddim_jax.metrics.statistics import load_statistics
from ddim_jax.runs import Watcher, fit, load_trained

N, S = 90, 3


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("stats") / "pixels.npz")
    make_statistics.main(
        make_statistics.StatisticsConfig(data="digits", out=out, features="pixels")
    )
    return out


def of(workdir, **changes):
    every = {"fid_every": 2, "fid_samples": N, "fid_sample_steps": S, "max_steps": 4}
    return dataclasses.replace(SMALL, workdir=str(workdir), **every | changes)


def measured(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" not in line]


def frechet(a, b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of pixels, by the roots of A B."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) / 127.5 - 1 for x in (a, b))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * roots


def test_the_distance_is_that_of_the_samples_and_training_goes_on_as_without_it(stats, tmp_path):
    heard = {}

    class Ear(Watcher):
        def measured(self, step, numbers):
            heard[step] = numbers

    fit(of(tmp_path / "a", fid_stats=stats, batch_size=32), [Ear()])  # 90 are not whole batches
    two, four = measured(tmp_path / "a")
    assert (two["step"], four["step"]) == (2, 4)
    names = {"fd_pixels", "num_samples", "num_sample_steps", "held_out_loss", "num_held_out"}
    protocol = four.pop("measured_with")
    assert four.keys() == names | {"step"}
    assert [heard[4] | {"step": 4}, heard.keys()] == [four, {2, 4}]
    assert protocol["statistics"] == load_statistics(stats).content_hash[:16]
    test = load_images("digits", split="test")
    first = ArraySource(test.images[:N], test.labels[:N].astype(np.int32), num_classes=10)  # pyright: ignore
    assert protocol["held_out"] == content_of(first)
    drawn = load_trained(tmp_path / "a").sample(jax.random.key(0), N, S, batch_size=32)
    want = frechet(drawn, load_images("digits").images)  # pyright: ignore
    assert four["fd_pixels"] == pytest.approx(want, rel=1e-3)
    fit(of(tmp_path / "b", fid_every=0, batch_size=32))
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_a_run_that_was_killed_measures_once_what_it_would_have(tmp_path, monkeypatch):
    fit(of(tmp_path / "straight", checkpoint_every=3))
    save = Checkpointer.save

    class Killed(BaseException):
        pass

    def dies(self, step, tree):
        save(self, step, tree)
        self.wait()
        if step == 3:
            raise Killed

    monkeypatch.setattr(Checkpointer, "save", dies)
    with contextlib.suppress(Killed):
        fit(of(tmp_path / "killed", checkpoint_every=3))
    fit(of(tmp_path / "killed", checkpoint_every=3))
    assert measured(tmp_path / "killed") == measured(tmp_path / "straight")


def test_the_held_out_loss_of_a_network_that_says_nothing_is_the_noises_square(tmp_path):
    """The U-Net's last layer starts at 0, so that eps_hat = 0 and the loss is the mean of eps^2."""
    fit(of(tmp_path, max_steps=1, learning_rate=1e-30, fid_samples=1000))
    (line,) = measured(tmp_path)
    assert line.keys() == {"step", "held_out_loss", "num_held_out", "measured_with"}
    assert line["num_held_out"] == 360  # all of the split test: digits are trained on the others
    deviation = np.sqrt(2 / (360 * 64))
    assert abs(line["held_out_loss"] - 1) < 4 * deviation


def test_samples_that_are_not_finite_are_unknown_and_training_goes_on(
    stats, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("ddim_jax.runs.draw.to_pixels", _nothing_finite)
    fit(of(tmp_path, fid_stats=stats, max_steps=2))
    assert measured(tmp_path)[0]["fd_pixels"] is None
    assert "fd_pixels of step 2 is unknown: samples are not finite" in capsys.readouterr().err


def _nothing_finite(x):
    from ddim_jax.data.pixels import nearest_levels
    from ddim_jax.runs.draw import Pixels

    return Pixels(nearest_levels(x), jax.numpy.zeros(len(x), bool))


def test_numbers_of_two_statistics_are_two_curves_and_who_joins_them_is_told(
    stats, tmp_path, capsys
):
    images, other = str(tmp_path / "images.npz"), str(tmp_path / "other.npz")
    np.savez(images, images=np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8))
    make_statistics.main(
        make_statistics.StatisticsConfig(data=images, out=other, features="pixels")
    )
    run = tmp_path / "run"
    for max_steps in (2, 4):
        fit(of(run, fid_stats=stats, fid_samples=40, max_steps=max_steps))
    said = capsys.readouterr().err
    assert "N = 40 samples do not exceed the 64 feature dimensions" in said
    assert "begin anew" not in said
    fit(of(run, fid_stats=other, fid_samples=40, max_steps=6))
    assert "from step 6 on (statistics is " in capsys.readouterr().err
    one, two = (load_statistics(path).content_hash[:12] for path in (stats, other))
    training_report.main(training_report.ReportConfig(workdir=str(run)))
    text = (run / "training.md").read_text()
    for number, of_whom in enumerate((one, two), 1):
        assert (
            f"fd_pixels ({number}) is of 40 samples in 3 steps of DDIM against statistics {of_whom}"
            in text
        )
    found = cells(text)
    assert found["4"]["fd_pixels (2)"] == found["6"]["fd_pixels (1)"] == ""
    assert float(found["6"]["fd_pixels (2)"]) > 0
    assert "Warning: N = 40 samples do not exceed" in text


def test_what_cannot_be_measured_is_refused_before_anything_is_written(stats, tmp_path):
    images = str(tmp_path / "images.npz")
    np.savez(images, images=np.zeros((20, 4, 4, 1), np.uint8))
    workdir = tmp_path / "run"
    for changes, message in [
        ({"data": images}, "fid_stats must be given with fid_every for data without a split"),
        ({"data": images, "fid_stats": stats}, "are of 64 features; pixels gives 16"),
        ({"fid_stats": str(tmp_path / "none.npz")}, "fid_stats .*none.npz does not exist"),
        ({"held_out_split": "validation"}, "split must be one of"),
    ]:
        with refused(message):
            fit(of(workdir, **changes))
        assert not workdir.exists()


def test_tensorboard_gets_the_numbers_that_say_how_good_it_is(tmp_path):
    said = []
    board = train._Board(tmp_path)
    board._board = type("Writer", (), {
        "add_scalar": lambda self, *scalar: said.append(scalar), "flush": lambda self: None
    })()  # fmt: skip
    board.measured(7, {"fid": 3.5, "num_samples": 9, "held_out_loss": 0.25, "fd": None})
    assert said == [("fid", 3.5, 7), ("held_out_loss", 0.25, 7)]


# ---------------------------------------------------------------------------------------- report


def report(workdir, lines, data="cifar10"):
    workdir.mkdir(exist_ok=True)
    config = {"format": 2, "data": data, "batch_size": 128, "model": {}, "schedule": {}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    training_report.main(training_report.ReportConfig(workdir=str(workdir)))
    assert (workdir / "training.png").stat().st_size > 1000
    return (workdir / "training.md").read_text()


def cells(text):
    """step -> the cells of its row, by the names of the columns."""
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if x[:1] == "|"]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_published_curve_is_beside_the_fid_of_cifar10_alone(tmp_path):
    fid = {"num_samples": 5000, "num_sample_steps": 50, "held_out_loss": 0.03, "num_held_out": 64}
    lines = [{"step": 90_000, "loss": 0.04}, {"step": 93_600, "fid": 6.25, **fid}]
    text = report(tmp_path / "a", lines)
    found = cells(text)
    curve = {46_800: 9.16, 93_600: 5.78, 187_000: 4.08, 421_000: 3.31, 796_000: 3.19}
    assert {int(s): float(row["published, DDPM's recipe"]) for s, row in found.items()} == curve
    ours = {"fid": "6.25", "held_out_loss": "0.03", "loss": "0.04"}
    assert ours.items() <= found["93600"].items()
    assert found["187000"]["fid"] == found["187000"]["loss"] == ""
    assert "fid is of 5000 samples in 50 steps" in text

    others = [{**line, "fd_pixels": line.get("fid")} for line in lines]
    for line in others:
        line.pop("fid", None)
    assert "published, DDPM" not in report(tmp_path / "b", others)
    assert "published" not in report(tmp_path / "c", lines, data="digits")
    assert cells(report(tmp_path / "d", lines[:1]))["90000"] == {"step": "90000", "loss": "0.04"}


def test_a_report_of_nothing_is_refused(tmp_path):
    with refused("has no line yet"):
        report(tmp_path, [])
    with refused("has a damaged line"):
        report(tmp_path, [{"loss": 1}])
