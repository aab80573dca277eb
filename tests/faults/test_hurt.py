"""Real commands, hurt: the same end as without, and nothing left lying about."""

import os
import random
import shutil

import hosts
import hurt
import machines
import pytest

pytest.importorskip("tyro")


@pytest.fixture(scope="module")
def ready():
    with hurt.prepared() as (folder, jobs):
        yield folder, jobs


def test_training_killed_three_times_ends_as_ever(ready):
    folder, jobs = ready
    figures = hurt.kill_often(folder, jobs["train"], "train", 3, random.Random(1))
    assert figures.kills == 3 and figures.wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("job", machines.FOLDERS)
@pytest.mark.parametrize("kind", machines.KINDS)
def test_another_machine_is_the_same_end(ready, kind, job):
    folder, jobs = ready
    place = folder / kind.replace(" ", "_") / job
    assert not machines.change(place, jobs[job], machines.KINDS[kind], 2, random.Random(0))


@pytest.mark.slow
def test_a_full_disk_is_one_line(ready):
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    folder, jobs = ready
    for name, job in jobs.items():
        figures = hurt.fill_disk(folder / "d", job, name, 3, random.Random(0))
        assert figures.wrong == [], name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kills",
    [("train", 100), ("sweep", 40), ("sample", 20), ("statistics", 20), ("convert", 20)],
)
def test_kills(ready, name, kills):
    folder, jobs = ready
    figures = hurt.kill_often(folder / name, jobs[name], name, kills, random.Random(0))
    assert figures.wrong == []
    assert name != "train" or figures.while_saving >= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "sweep", "sample"])
def test_signals(ready, name):
    folder, jobs = ready
    figures = hurt.signal_often(folder / "s", jobs[name], name, 10, random.Random(0))
    assert figures.wrong == []


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    figures = hosts.stop_often(tmp_path, 3, random.Random(0))
    assert figures.wrong == []
