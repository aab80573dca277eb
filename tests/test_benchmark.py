"""The benchmark: every row it was asked for, timed for itself, written down with its conditions."""

import json

import numpy as np
import pytest

pytest.importorskip("tyro")

import benchmark
from refusals import refused

from ddim_jax.runs import ModelConfig

SMALL = ModelConfig(
    channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=4
)


def config(**changes):
    return benchmark.BenchmarkConfig(
        model=SMALL,
        image_size=8,
        sample_batch_sizes=(2, 4),
        train_batch_sizes=(8,),
        matmul_size=64,
        num_turns=1,
        **changes,
    )


def test_every_row_is_there_with_its_conditions(tmp_path, capsys):
    benchmark.main(config(out=str(tmp_path / "new" / "figures.json")))
    figures = json.loads((tmp_path / "new" / "figures.json").read_text())
    rows = figures["rows"]
    assert [row["what"] for row in rows] == [
        "sampling, batch 2",
        "sampling, batch 4",
        "training, batch 8",
    ]
    assert all(row["ms_per_image"] > 0 and row["ours_takes"] == 1 for row in rows)
    assert figures["config"]["model"]["channels"] == 8 and figures["versions"]["jax"]
    assert "| training, batch 8 |" in capsys.readouterr().out


def test_the_arithmetic_is_the_networks():
    """Per image it does not depend on the batch; gradients cost about three forward passes."""
    model = SMALL.make(3)
    params = benchmark._random_params(model, 8)
    forward, both = benchmark._flops(model, params, 8, 4)
    np.testing.assert_allclose(benchmark._flops(model, params, 8, 8)[0] / 2, forward, rtol=0.05)
    # A 3x3 convolution of 8 to 8 channels on 8 x 8 pixels: 2 * 9 * 8 * 8 * 64 operations; the
    # network has 12 of them (2 have 3 channels on one side, 2 read 16), less the borders.
    convolutions = 4 * 2 * 9 * 64 * (8 * (3 + 3) + 8 * 8 * 8 + 8 * 16 * 2)
    assert 0.7 * convolutions < forward < 1.6 * convolutions
    assert 2.5 < both / forward < 3.5


def test_a_turn_runs_each_once_after_one_to_warm_up():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    for turn, times in enumerate(benchmark.take_turns(runs, 3), 1):
        assert calls == ["a", "b"] * (1 + turn)
        assert [len(times[name]) for name in "ab"] == [turn, turn]
    assert len(calls) == 8


def test_a_missing_peer_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with refused("peer diffusers needs torch and diffusers"):
        benchmark.main(config(peer="diffusers"))
