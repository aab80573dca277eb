"""Two processes that disagree, or of which one refuses: both say so, and neither waits for ever."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")

from refusals import refused

from ddim_jax import parallel
from ddim_jax.runs import TrainConfig, fit

TESTS = pathlib.Path(__file__).parent
SAID = {  # case -> on process 0, on process 1
    "rates": 2 * (r"learning_rate is 0\.001 on process 0, 0\.002 on process 1",),
    "workdirs": (r"process 1 refused: workdir must be one folder", "workdir must be one folder"),
    "missing data": (r"process 1 refused: .*none", "none"),
    "other data": 2 * (r"data_content\S* is .* on process 0, .* on process 1",),
    "an option": ("batch_size must be .*; got 0", "process 0 refused: batch_size must be"),
    "locked": ("locked is in use by another", "process 0 refused: .*locked is in use by another"),
    "damaged": ("metrics.jsonl", "metrics.jsonl"),
    "agreed": ("^$", "^$"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, dict]]:
    """What each process said: case -> its line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path_factory.mktemp("hosts")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "two_hosts.py"), port, str(index), str(folder)],
            env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-3000:]
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        found.append({line["case"]: line for line in lines})
    return found


@pytest.mark.parametrize("case", SAID)
def test_both_refuse_in_words_of_the_reason(said, case):
    for process, pattern in enumerate(SAID[case]):
        assert re.search(pattern, said[process][case]["said"], re.DOTALL), said[process][case]


def test_no_one_waits_for_the_heartbeat(said):
    """JAX's own way to notice takes 42 s and more."""
    for case in SAID:
        assert said[1][case]["seconds"] < 42


@pytest.mark.parametrize("name, value", [("process_id", 1), ("num_processes", 2)])
def test_a_process_of_several_is_named_with_distributed_only(tmp_path, name, value):
    with refused(f"{name} must be given with distributed only; got {value}"):
        fit(TrainConfig(workdir=str(tmp_path), data="digits", **{name: value}))
    assert not list(tmp_path.iterdir())


def test_one_process_agrees_with_itself_for_nothing():
    def never():
        raise AssertionError

    parallel.agree(never, "No way out.")
    assert parallel.gather("text") == ["text"]
    assert parallel.together(lambda: 3) == 3
