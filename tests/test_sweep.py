"""Statistics, classifier, sweep and report, run as their users run them on a tiny network."""

import dataclasses
import html.parser
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")

import fid
import fid_sweep
import make_statistics
import sample
import sweep_report
import train
import train_classifier
from test_experiments import ROOT, SMALL, script

from ddim_jax.data import load_images
from ddim_jax.metrics.classifier import load_classifier
from ddim_jax.metrics.frechet import frechet_distance
from ddim_jax.metrics.statistics import load_statistics

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("model")
    train.run(dataclasses.replace(SMALL, workdir=str(path)))
    return path


@pytest.fixture(scope="module")
def stats(tmp_path_factory) -> pathlib.Path:
    """Statistics of the digits' pixels."""
    path = tmp_path_factory.mktemp("stats") / "pixels.npz"
    make_statistics.main(make_statistics.StatisticsConfig("digits", str(path), "pixels"))
    return path


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
    found = sweep_report.read_results(pathlib.Path(out))
    assert all(line.pop("seconds") > 0 for line in found)
    return found


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1


def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return np.round(load_digits().images * (255 / 16))[..., None]


def test_statistics_are_of_every_image_once(stats):
    statistics = load_statistics(stats)
    want = pixels(digits())
    assert statistics.num_samples == len(want) == 1797
    np.testing.assert_allclose(statistics.mean, want.mean(axis=0), atol=5e-3)
    np.testing.assert_allclose(statistics.cov, np.cov(want, rowvar=False), atol=5e-3)
    assert statistics.data == {
        "name": "digits",
        "split": "train",
        "image_shape": [8, 8, 1],
        "resized_to": None,
    }


def test_the_statistics_script_leaves_the_standard_module_alone(tmp_path):
    done = script("experiments/statistics.py", "digits", "--features", "pixels", "--out",
                  str(tmp_path / "s.npz"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1797 images of digits" in done.stdout
    code = "import statistics, sys; print(statistics.fmean([1, 2]), sys.modules['statistics'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "experiments", capture_output=True, text=True
    )
    assert done.stdout.startswith("1.5") and "experiments" not in done.stdout, done.stderr


def test_each_cell_is_the_distance_of_the_images_sample_py_draws(finished, stats, tmp_path):
    reference = load_statistics(stats)
    assert [line["eta"] for line in lines(finished.out)] == [0.0, "sigma_hat"]
    for line in lines(finished.out):
        sample.main(
            sample.SampleConfig(
                workdir=finished.workdir,
                out=str(tmp_path),
                num_images=21,
                num_sample_steps=3,
                sigma_hat=line["eta"] == "sigma_hat",
                save_npz=True,
            )
        )
        with np.load(tmp_path / "samples.npz") as file:
            drawn = pixels(file["images"])
        want = frechet_distance(
            drawn.mean(axis=0), np.cov(drawn, rowvar=False), reference.mean, reference.cov
        )
        assert line["distances"]["fd_pixels"] == pytest.approx(want, rel=1e-3)


def test_a_line_carries_its_protocol(finished, stats):
    line = lines(finished.out)[0]
    measure = line["measures"]["fd_pixels"]
    assert measure["statistics_hash"] == load_statistics(stats).content_hash[:16]
    assert measure["dim"] == 64 and re.fullmatch("[0-9a-f]{16}", measure["network_hash"])
    assert line["weights"]["kind"] == "ema" and line["weights"]["step"] == 6
    assert (line["S"], line["num_samples"], line["spacing"]) == (3, 21, "uniform")
    assert line["rounding"] == "nearest" and line["device"] and line["versions"]["jax"]


def test_the_batch_size_does_not_matter(finished, tmp_path):
    fid_sweep.main(dataclasses.replace(finished, out=str(tmp_path), batch_size=21))
    for a, b in zip(lines(finished.out), lines(tmp_path), strict=True):
        assert a["distances"]["fd_pixels"] == pytest.approx(b["distances"]["fd_pixels"], rel=1e-3)


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
        assert eight["distances"] == pytest.approx(one["distances"], rel=1e-3)


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
    cells = len(sweep_report.read_results(out))
    try:
        with np.load(out / "partial.npz") as file:
            return cells, int(file["count"])
    except FileNotFoundError:
        return cells, 0


def test_a_sweep_of_other_settings_is_refused_and_left_alone(finished):
    before = (pathlib.Path(finished.out) / "sweep.json").read_text()
    for change, message in (
        ({"num_samples": 22}, "num_samples is 21 there and 22 now"),
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"batch_size": 4}, "batch_size is 12 there and 4 now"),
        ({"weights": "raw"}, "weights is .*ema.* there and .*raw.* now"),
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
    np.savez(tmp_path / "images.npz", images=load_images("digits").take(np.arange(1797))["image"])
    fid.main(fid.FidConfig(str(tmp_path / "images.npz"), str(stats)))
    printed = capsys.readouterr().out
    assert float(re.match(r"fd_pixels ([\d.e-]+): N = 1797", printed)[1]) < 1e-6
    half = load_images("digits").take(np.arange(60))["image"]
    np.savez(tmp_path / "few.npz", images=half)
    fid.main(fid.FidConfig(str(tmp_path / "few.npz"), str(stats)))
    assert "N = 60 samples do not exceed the 64 feature dimensions" in capsys.readouterr().out


def test_a_classifier_measures_from_beside_its_statistics(tmp_path, capsys):
    settings = dataclasses.replace(
        train_classifier.PRESETS["digits"][1], out=str(tmp_path), width=4, num_steps=60
    )
    train_classifier.main(settings)
    trained = load_classifier(tmp_path / "classifier.safetensors")
    assert trained.metadata["test_accuracy"] > 0.3  # chance is 0.1
    path = str(tmp_path / "stats.npz")
    make_statistics.main(make_statistics.StatisticsConfig("digits", path, "classifier"))
    assert load_statistics(path).network_hash == trained.content_hash
    fid.main(fid.FidConfig("digits", path))
    assert re.search(r"fd_classifier ([\d.e-]+): N = 1797", capsys.readouterr().out)


@pytest.mark.parametrize(
    "paper, key, want",
    [
        ("cifar10", (100, 0.0), 4.16),
        ("celeba64", (1000, "sigma_hat"), 3.26),
        ("bedroom", (10, 1.0), 42.78),
        ("church", (50, 0.0), 10.84),
    ],
)
def test_the_papers_numbers_are_found(paper, key, want):
    assert sweep_report.paper_values(paper)[key] == want


def test_the_presets_are_the_papers_protocol():
    for name, (_, preset) in fid_sweep.TABLES.items():
        wanted = {(s, eta) for s in preset.steps for eta in preset.etas}
        assert wanted == sweep_report.paper_values(preset.paper).keys(), name
        assert preset.num_samples == 50_000
        assert preset.spacing == ("quadratic" if name == "table1-cifar10" else "uniform")


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory) -> pathlib.Path:
    """The report of a whole Table 1, its numbers made up, its pictures drawn by the sweep."""
    out = tmp_path_factory.mktemp("report")
    line = sweep_report.read_results(pathlib.Path(finished.out))[0]
    picture = next((pathlib.Path(finished.out) / "samples").glob("*.png"))
    (out / "samples").mkdir()
    cells = []
    for (s, eta), value in sweep_report.paper_values("cifar10").items():
        cells.append(line | {"S": s, "eta": eta, "distances": {"fd_pixels": value + 1},
                             "seconds": 0.1 * s})  # fmt: skip
        shutil.copy(picture, out / "samples" / f"{sweep_report.cell_name(s, eta)}.png")
    (out / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    sweep_report.write_report(out, "cifar10")
    return out


def test_the_table_has_ours_beside_the_papers_and_the_warning(report):
    text = (report / "report.md").read_text()
    assert "| DDIM, eta = 0 | 14.36 (13.36) | 7.84 (6.84) |" in text
    assert "| sigma-hat | 368.4 (367.43) |" in text
    assert "compare the order of the methods" in text  # the paper's are FID, ours are not
    assert "N = 21 samples do not exceed the 64 feature dimensions" in text


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tables = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "path", "use"):
            self.open.append(tag)
        self.tables += tag == "table"
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.open.pop() == tag


def test_the_report_is_one_file_with_every_picture(report):
    page = Page()
    page.feed((report / "report.html").read_text())
    assert page.open == [] and page.tables == 1
    pictures = [source for source in page.sources if source.startswith("data:image/png")]
    assert len(pictures) == 25
    assert all(source.startswith(("data:", "#")) for source in page.sources)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_a_phone_and_a_desktop(report, width, tmp_path):
    """A frame of that width, since a browser's own window has a least width."""
    probe = """<script>onload = () => parent.postMessage({
        needed: document.documentElement.scrollWidth, images: [...document.images].every(
        image => image.naturalWidth > 0 && image.complete)}, "*")</script></body>"""
    page = (report / "report.html").read_text().replace("</body>", probe)
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe src="report.html" style="border:0;width:{width}px;'
        'height:2400px"></iframe><script>onmessage = message => document.body.dataset.answer = '
        "JSON.stringify(message.data)</script></body>"
    )
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},2400"),
        *("--allow-file-access-from-files", "--virtual-time-budget=10000"),
    ]
    address = f"file://{tmp_path / 'frame.html'}"
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True)
    answer = re.search(r'data-answer="({.*?})"', done.stdout)
    assert answer is not None, done.stderr
    found = json.loads(answer[1].replace("&quot;", '"'))
    assert found["images"] and found["needed"] <= width
    subprocess.run([*command, f"--screenshot={tmp_path / 'page.png'}", address], check=True)
    shown = np.asarray(PIL.Image.open(tmp_path / "page.png").convert("L"), float)[:, :width]
    assert shown.std() > 10  # something is drawn
