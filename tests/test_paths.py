"""The door for paths: `~` expanded once, remote paths refused by name, and nobody goes round it."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import typing

import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from common import cli
from refusals import refused

import ddim_jax
from ddim_jax.checkpoint import Checkpointer
from ddim_jax.convert import load_diffusers, load_paper_checkpoint
from ddim_jax.data.load import load_images, splits_of
from ddim_jax.files import only_one_process, read_json, read_npz, write_whole
from ddim_jax.metrics.classifier import load_classifier
from ddim_jax.metrics.inception import load_inception
from ddim_jax.metrics.statistics import load_statistics
from ddim_jax.paths import File, Folder, expanded, local_path
from ddim_jax.runs import TrainConfig, fit, load_spec, load_trained, read_config
from ddim_jax.runs.folder import load_codec_params, write_config
from ddim_jax.runs.options import path_options, with_local_paths

PACKAGE = pathlib.Path(ddim_jax.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"
SCRIPTS = sorted(
    path
    for path in [*EXPERIMENTS.glob("*.py"), *(EXPERIMENTS / "benchmarks").glob("*.py")]
    if "cli.run(" in path.read_text()
)
NO_PATHS = {
    "metrics", "split", "train_split", "test_split", "features", "sampler", "samplers", "predicts",
    "coordinator", "weights", "dtype", "spacing", "spacings", "preset", "source", "target", "paper",
    "etas", "peer", "reduction", "loss", "timesteps", "weighting", "name",
    "held_out_split", "precision", "topology",
}  # fmt: skip
"""Options that are words, and no path."""


def configs(module):
    """The dataclass a script hands to the command line, and all that stand in it."""
    found = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and name.endswith(("Config", "Options"))
    ]
    return found


def holds_text(hint) -> bool:
    return hint is str or any(map(holds_text, typing.get_args(hint)))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_option_that_may_be_a_path_goes_through_the_door(script):
    """A new option of a new script is either of a type of paths.py or listed above as a word."""
    found = configs(importlib.import_module(script.stem))
    assert found
    for config in found:
        hints, paths = typing.get_type_hints(config), path_options(config)
        for field in dataclasses.fields(config):
            if holds_text(hints[field.name]) and field.name not in NO_PATHS:
                assert field.name in paths, f"{script.name}: {config.__name__}.{field.name}"
        assert not paths.keys() & NO_PATHS


def test_nobody_expands_or_parses_a_path_on_his_own():
    """pathlib.Path(argument) of the library is local_path; of a script it comes after the door."""
    allowed = {"paths.py", "load.py", "folder.py"}  # names after the door; folder.py lists files
    for file in PACKAGE.rglob("*.py"):
        calls = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call)
        ]
        assert not [c for c in calls if c.endswith(".expanduser()")], file
        if file.name not in allowed:
            made = [c for c in calls if c.startswith("pathlib.Path(") and "," not in c]
            assert not [c for c in made if "huggingface_hub" not in c], (file, made)
    for file in EXPERIMENTS.rglob("*.py"):
        assert "expanduser" not in file.read_text(), file


@dataclasses.dataclass(frozen=True)
class Inner:
    there: Folder = "~/inner"


@dataclasses.dataclass(frozen=True)
class Settings:
    workdir: Folder
    stats: tuple[File, ...] = ()
    images: tuple[int, int] | tuple[File, File] | None = None
    word: str = "~"
    inner: Inner = Inner()


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_is_expanded_once_and_in_every_path(home):
    settings = Settings("~/x/", ("~/a", "/b", "c~"), ("~/1.png", "2.png"))
    got = with_local_paths(settings)
    stats, images = (f"{home}/a", "/b", "c~"), (f"{home}/1.png", "2.png")
    assert got == Settings(f"{home}/x/", stats, images, "~", Inner(f"{home}/inner"))
    assert with_local_paths(got) == got
    assert with_local_paths(Settings("w", (), (3, 4))).images == (3, 4)
    assert local_path("~") == home and local_path(pathlib.Path("~/a")) == home / "a"
    assert expanded("cifar10") == "cifar10" and expanded("lsun/bedroom") == "lsun/bedroom"


def test_a_command_line_reaches_its_script_expanded(home, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sys.argv", ["script", "--workdir=~/x", "--stats", "~/a", "--inner.there=~/y"]
    )
    cli.run(seen.append, Settings)
    assert seen == [Settings(f"{home}/x", (f"{home}/a",), inner=Inner(f"{home}/y"))]


@pytest.mark.parametrize("path", ["gs://b/x", "s3://b", "hdfs://h/x", "file:///tmp/x"])
def test_remote_paths_are_one_line_with_a_way_out_and_exit_code_2(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script", "--workdir", path])
    with pytest.raises(SystemExit) as stopped:
        cli.run(print, Settings)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"workdir must be a path of this machine; got {path}" in error and "copy" in error
    assert len(error.splitlines()) == 1


LIBRARY = [
    load_trained, load_spec, read_config, load_codec_params, load_statistics, load_classifier,
    load_inception, load_diffusers, Checkpointer, read_json, load_images, splits_of,
    lambda path: write_config(path, {}),
    lambda path: write_whole(path, b""),
    lambda path: read_npz(path, "arrays"),
    lambda path: load_paper_checkpoint(path, None, 8),
    lambda path: only_one_process(path).__enter__(),
    lambda path: load_images("mnist", data_dir=path),
    lambda path: fit(TrainConfig(workdir=str(path))),
    lambda path: fit(TrainConfig(workdir="w", data=str(path))),
    lambda path: fit(TrainConfig(workdir="w", init_from=str(path))),
]  # fmt: skip


@pytest.mark.parametrize("function", LIBRARY)
def test_the_library_refuses_remote_paths_and_makes_no_folder_of_them(
    function, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for path in ("gs://bucket/x", pathlib.Path("gs://bucket/x")):
        with refused("must be a path of this machine; got gs:/"):
            function(path)
    assert not list(tmp_path.iterdir())


def test_a_file_for_a_folder_and_the_reverse(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    with refused(rf"workdir must be a folder; {file} is a file"):
        with_local_paths(Settings(str(file)))
    with refused(rf"stats must be a file; {folder} is a folder"):
        with_local_paths(Settings("w", (str(folder),)))
    with refused("workdir must be a folder"):
        load_trained(file)
    with refused("must be a file"):
        load_statistics(folder)
    with refused("must be a path; got ''"):
        local_path("")
    with refused("home of a user unknown here; got ~nobody-of-that-name/x"):
        local_path("~nobody-of-that-name/x")
    assert local_path(tmp_path / "new", kind="folder") == tmp_path / "new"
