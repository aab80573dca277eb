"""What a sweep's report says and shows: lines as a sweep writes them, with numbers made up."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

import fid_sweep
import sweep_report
from common import pictures
from common.sweep_page import write_report
from common.sweep_store import Cell, read_results
from common.sweep_table import paper_values

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

PIXELS = {
    "features": "pixels",
    "dim": 64,
    "network_hash": "44136fa355b3678a",
    "statistics_hash": "0123456789abcdef",
    "statistics_of": {"name": "digits", "split": "train"},
    "statistics_num_samples": 1797,
    "std_of": None,
}
FD = PIXELS | {
    "metric": "frechet",
    "title": "fd_pixels",
    "published_as": "fid",
    "direction": "lower",
    "axis": "log",
    "description": "21 images",
    "warning": "N = 21 samples do not exceed the 64 feature dimensions: biased.",
}
KID = FD | {
    "metric": "kid",
    "title": "kid_pixels",
    "published_as": "kid",
    "axis": "linear",
    "description": "21 images against 1797, 100 subsets of 21",
    "warning": None,
}
KID_STD = KID | {"title": "kid_std_pixels", "published_as": "kid_std", "std_of": "kid_pixels"}
PRECISION = KID | {
    "metric": "precision_recall",
    "title": "precision_pixels",
    "published_as": "precision",
    "direction": "higher",
    "description": "21 images against 1797, k = 3",
}
LINE = {
    "format": 3,
    "times": 2,
    "S": 10,
    "sampler": "ddim",
    "eta": 0.0,
    "guidance_scale": 1.0,
    "spacing": "uniform",
    "network_calls": 10,
    "name": "S0010_eta_0",
    "values": {},
    "seconds": 1.0,
    "num_samples": 21,
    "seed": 0,
    "batch_size": 12,
    "kept_features": 10_000,
    "rounding": "nearest",
    "clip_x0": False,
    "dtype": "float32",
    "matmul_precision": "default",
    "weights": {"kind": "ema", "step": 6, "hash": "0011223344556677"},
    "fingerprint_id": "a1b2c3d4e5f6",
    "measures": {"fd_pixels": FD},
    "device": "1 x cpu",
    "versions": {"python": "3.11", "ddim_jax": "0.1", "jax": "0.10", "numpy": "2.0"},
}
"""A finished cell; test_sweep.py has its keys compared with a real one's."""


def line(cell: Cell, values: dict[str, float], **more) -> dict:
    keys = ("S", "sampler", "eta", "guidance_scale", "spacing", "seed")
    calls = cell.network_calls()
    return LINE | dict(zip(keys, cell, strict=True)) | {
        "values": values,
        "name": cell.name("uniform"),
        "network_calls": calls,
        "seconds": 0.1 * calls,
        **more,
    }  # fmt: skip


def written(out: pathlib.Path, lines: list[dict], paper=None) -> pathlib.Path:
    """A sweep's folder with these cells, a picture each, and its report."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    for cell in lines:
        pictures.save_grid(out / "samples" / f"{cell['name']}.png", noise)
    (out / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in lines))
    write_report(out, paper)
    return out


@pytest.mark.parametrize(
    "paper, key, want",
    [
        ("cifar10", (100, 0.0, "quadratic"), 4.16),
        ("celeba64", (1000, "sigma_hat", "uniform"), 3.26),
        ("cifar10", (1000, 0.0, "trailing"), 4.04),
        ("bedroom", (10, 1.0, "uniform"), 42.78),
        ("church", (50, 0.0, "uniform"), 10.84),
        ("bedroom", (1000, 1.0, "uniform"), 6.36),
        ("church", (1000, 1.0, "linspace"), 7.89),
    ],
)
def test_the_papers_numbers_are_found(paper, key, want):
    assert paper_values(paper)[key] == want


def test_the_presets_are_the_papers_protocol():
    for name, (_, preset) in fid_sweep.TABLES.items():
        wanted = {(s, eta, preset.spacing) for s in preset.steps for eta in preset.etas}
        # The paper has no DDIM there.
        more = {(1000, 0.0, "uniform")} if name.startswith("table3") else set()
        theirs = {key for key in paper_values(preset.paper) if key[2] == preset.spacing}
        assert wanted == theirs | more, name
        assert preset.num_samples == 50_000
        assert preset.spacing == ("quadratic" if name == "table1-cifar10" else "uniform")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> pathlib.Path:
    """The report of a whole Table 1."""
    lines = [
        line(_cell(s, eta), {"fd_pixels": value + 1})
        for (s, eta, spacing), value in paper_values("cifar10").items()
        if spacing == "quadratic"
    ]
    return written(tmp_path_factory.mktemp("report"), lines, "cifar10")


def _cell(num_steps: int, eta: float | str) -> Cell:
    if isinstance(eta, str):
        return Cell(num_steps, eta, None, 1.0, "quadratic")
    return Cell(num_steps, "ddim", eta, 1.0, "quadratic")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> pathlib.Path:
    """The report of several metrics over samplers, guidance scales and spacings."""
    measures = {
        "fd_pixels": FD,
        "kid_pixels": KID,
        "kid_std_pixels": KID_STD,
        "precision_pixels": PRECISION,
    }
    lines = []
    for s in (10, 20, 50):
        for spacing in ("quadratic", "trailing"):
            for scale in (1.0, 3.0):
                for sampler, eta in (("ddim", 0.0), ("ddim", 1.0), ("heun", None)):
                    cell = Cell(s, sampler, eta, scale, spacing)
                    fd = 40 / s + 2 * (eta or 0.3) + scale / 4 + (spacing == "trailing")
                    values = {
                        "fd_pixels": fd,
                        "kid_pixels": fd / 300 - 0.005,
                        "kid_std_pixels": 0.0007,
                        "precision_pixels": 1 / (1 + fd),
                    }
                    lines.append(line(cell, values, measures=measures))
    return written(tmp_path_factory.mktemp("wide"), lines, "cifar10")


def test_the_table_has_ours_beside_the_papers_and_the_warning(report):
    text = (report / "report.md").read_text()
    assert "| DDIM, eta = 0 | 14.36 (13.36) | 7.84 (6.84) |" in text
    assert "| sigma-hat | 368.4 (367.43) |" in text
    assert "compare the order of the methods" in text  # the paper's are FID, ours are not
    assert "N = 21 samples do not exceed the 64 feature dimensions" in text


def test_the_papers_dotted_lines_are_named_where_they_are_drawn(report, tmp_path):
    dotted = "Dotted: the paper's numbers"
    assert dotted not in (report / "report.html").read_text()  # another distance than the paper's
    lines = [line(_cell(10, eta), {"fid": 2.0}, measures={"fid": FD | {"title": "FID"}})
             for eta in (0.0, 1.0)]  # fmt: skip
    page = (written(tmp_path, lines, "cifar10") / "report.html").read_text()
    assert dotted in page and page.count("<!-- the paper -->") == 1
    assert dotted not in (written(tmp_path, lines) / "report.html").read_text()


def test_numbers_say_in_what_the_papers_are_otherwise(tmp_path):
    """The paper has no number of a cell of another sub-sequence, and did not clip."""
    cell = Cell(10, "ddim", 0.0, 1.0, "uniform")
    other = line(cell, {"fid": 2.0}, measures={"fid": FD | {"title": "FID"}})
    text = (written(tmp_path / "other", [other], "cifar10") / "report.md").read_text()
    assert "| DDIM, eta = 0 | 2 |" in text and "In brackets" not in text
    assert "No cell is one of the paper's, which are of the quadratic sub-sequence" in text
    own = line(_cell(10, 0.0), {"fid": 2.0}, measures={"fid": FD | {"title": "FID"}})
    clipped = own | {"clip_x0": True, "dtype": "bfloat16", "matmul_precision": "highest"}
    text = (written(tmp_path / "clipped", [clipped], "cifar10") / "report.md").read_text()
    assert "In brackets: the FID the paper reports, of the quadratic sub-sequence" in text
    assert "The paper clipped no x0_hat in its rows of eta; here it was clipped." in text
    assert "The paper computed in float32; these are of bfloat16." in text
    assert "x0 clipped, computed in bfloat16, matrix products of precision highest," in text


def test_converted_weights_are_of_no_step(tmp_path):
    weights = LINE["weights"] | {"step": 0}
    out = written(tmp_path, [line(_cell(10, 0.0), {"fd_pixels": 2.0}, weights=weights)])
    text = (out / "report.md").read_text()
    assert "converted ema weights, hash 001122334455" in text and "step 0" not in text


def test_each_row_says_its_method_guidance_and_spacing(wide):
    text = (wide / "report.md").read_text()
    first = text[: text.index("## kid_pixels")]
    assert [row.split(" | ")[0] for row in first.splitlines() if row.startswith("| ")] == [
        "| S",
        "| ---",
        *(
            f"| {method}{guidance}, {spacing}"
            for spacing in ("quadratic", "trailing")
            for guidance in ("", ", guidance 3")
            for method in ("DDIM, eta = 0", "DDPM, eta = 1", "heun")
        ),
        "| time for one of S calls",
    ]
    assert "| heun, quadratic | 4.85, 19 calls |" in text
    assert "| DDIM, eta = 0, guidance 3, quadratic | 5.35, 20 calls |" in text
    assert "| DDIM, eta = 0, quadratic | 4.85 (13.36) |" in text  # the paper's guide nothing
    assert "| DDIM, eta = 0, trailing | 5.85 |" in text  # and are of the quadratic sub-sequence


def test_titles_directions_and_deviations_are_the_metrics_own(wide):
    text = (wide / "report.md").read_text()
    fd, kid, precision = re.split("## (?:kid|precision)_pixels", text)
    assert "Lower is better." in fd and "Lower is better." in kid
    assert "Higher is better." in precision
    assert "| 0.01117 ± 0.0007 |" in kid and "After ±: kid_std_pixels." in kid
    assert "(13.36)" in fd and "(13.36)" not in kid + precision  # theirs are distances
    assert "kid_pixels: 21 images against 1797, 100 subsets of 21, 64 pixels features" in text
    assert "run a1b2c3d4e5f6" in text and "quadratic and trailing sub-sequence" in text
    page = (wide / "report.html").read_text()
    for column, choose in (("fd_pixels", min), ("precision_pixels", max)):
        values = [x["values"][column] for x in read_results(wide) if x["S"] == 50]
        section = page[page.index(f"<h2>{column}") :]
        section = section[: section.index("</table>")]
        best = [text.partition(" ")[0] for text in re.findall('<td class="best">([^<,]*)', section)]
        assert len(best) == 3 and best[2] == f"{choose(values):.4g}"


def test_the_report_is_written_again_from_its_folder_alone(wide, tmp_path, capsys):
    shutil.copytree(wide, tmp_path / "copy")
    for name in ("report.md", "report.html"):
        (tmp_path / "copy" / name).unlink()
    sweep_report.main(sweep_report.ReportConfig(out=str(tmp_path / "copy"), paper="cifar10"))
    assert "report.html" in capsys.readouterr().out
    for name in ("report.md", "report.html"):
        assert (tmp_path / "copy" / name).read_text() == (wide / name).read_text()
    with pytest.raises(ValueError, match=r"no results\.jsonl"):
        sweep_report.main(sweep_report.ReportConfig(out=str(tmp_path)))


def test_seeds_are_pooled_to_mean_and_spread(tmp_path):
    """By hand: 1, 2 and 6 have mean 3 and standard deviation 2.646; the best is by the mean."""
    cells = [Cell(10, "ddim", 0.0, 1.0, "quadratic", seed) for seed in (0, 1, 2)]
    one = Cell(20, "ddim", 0.0, 1.0, "quadratic")
    ddpm = [cell._replace(eta=1.0) for cell in cells]
    made = list(zip([*cells, one, *ddpm], (1, 2, 6, 0.5, 3, 3.5, 4), strict=True))
    out = written(tmp_path, [line(cell, {"fd_pixels": float(x)}) for cell, x in made], "cifar10")
    text = (out / "report.md").read_text()
    assert "| DDIM, eta = 0 | 3 ± 2.6 (13.36) | 0.5 (6.84), seed 0 alone |" in text
    assert "| DDPM, eta = 1 | 3.5 ± 0.5 (41.07) | – |" in text
    assert "Mean over the seeds 0, 1, 2; after ±: their standard deviation." in text
    assert "seeds 0, 1, 2, pixels rounded" in text
    assert '<td class="best">3 ± 2.6' in (out / "report.html").read_text()


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


@pytest.mark.parametrize("name, tables, cells", [("report", 1, 25), ("wide", 3, 36)])
def test_the_report_is_one_file_with_every_picture(request, name, tables, cells):
    page = Page()
    page.feed((request.getfixturevalue(name) / "report.html").read_text())
    assert page.open == [] and page.tables == tables
    drawn = [source for source in page.sources if source.startswith("data:image/png")]
    assert len(drawn) == cells
    assert all(source.startswith(("data:", "#")) for source in page.sources)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("name", ["report", "wide"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_a_phone_and_a_desktop(request, name, width, tmp_path):
    """A frame of that width, since a browser's own window has a least width."""
    probe = """<script>onload = () => parent.postMessage({
        needed: document.documentElement.scrollWidth, images: [...document.images].every(
        image => image.naturalWidth > 0 && image.complete)}, "*")</script></body>"""
    report = request.getfixturevalue(name)
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
