"""What the demo says of its table, and refuses before it trains."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import demo
from common.sample_set import rule_of
from refusals import refused

from ddim_jax.files import write_json


def cell(num_steps: int, eta: float, seed: int, distance: float) -> dict:
    return {
        "S": num_steps, "sampler": "ddim", "eta": eta, "guidance_scale": 1.0, "spacing": "uniform",
        "seed": seed, "seconds": 1.0, "values": {"fd": distance},
        "measures": {"fd": {"std_of": None}},
    }  # fmt: skip


def table(num_steps: int, plain: tuple[float, float], noisy: tuple[float, float]) -> list[dict]:
    return [
        cell(num_steps, eta, seed, distance)
        for eta, distances in ((0.0, plain), (0.5, noisy))
        for seed, distance in enumerate(distances)
    ]


def test_who_is_ahead_is_said_with_the_gap_and_the_spread_of_both():
    """At S = 20 means 3 and 1.5, variances 2 and 1/2: a gap of 1.5 and a spread of 2.5 ** 0.5."""
    lines = table(10, (1, 3), (4, 6)) + table(20, (2, 4), (1, 2)) + table(50, (9, 9.1), (1, 1.1))
    assert demo._who_is_ahead(lines) == (
        "By fd DDIM is nearest at S = 10; at S = 20 eta = 0.5 is, by 1.5, within the seeds' spread "
        "of 1.6; at S = 50 eta = 0.5 is, by 8, beyond the seeds' spread of 0.1."
    )
    said = demo._who_is_ahead(table(5, (2, 4), (1, 2)))
    assert said.startswith("By fd DDIM is never nearest; at S = 5 eta = 0.5 is, by 1.5, within")
    # Nearest within the spread is said to be no more than that.
    assert demo._who_is_ahead(table(5, (1, 2), (2, 4))) == (
        "By fd DDIM is nearest at S = 5, by less than the seeds' spread."
    )
    assert "at S = 1 eta = 0.5 is as near" in demo._who_is_ahead(table(1, (7, 8), (7, 8)))
    # Of DDPM, here 10 and 12, it is ahead by 8, the spread being 2.
    ddpm = [cell(20, 1.0, 0, 10), cell(20, 1.0, 1, 12)]
    said = demo._who_is_ahead(table(20, (2, 4), (1, 2)) + ddpm)
    assert said.endswith("; of DDPM it is ahead by more than the spread at S = 20.")


def test_of_one_seed_no_spread_is_said():
    lines = [line for line in table(10, (1, 3), (4, 6)) if line["seed"] == 0]
    lines += [line for line in table(20, (5, 3), (4, 6)) if line["seed"] == 0]
    assert demo._who_is_ahead(lines) == (
        "By fd DDIM is nearest at S = 10; at S = 20 eta = 0.5 is, by 1. "
        "Of one seed nobody knows how much is chance."
    )


def test_the_floor_is_of_random_parts_with_the_bias_of_the_samples():
    """Of N(0, 1) in d = 1 the distance of means alone has the mean 1 / small + 1 / large."""
    rng = np.random.default_rng(3)
    ordered = np.sort(rng.normal(size=(1000, 1)), axis=0)
    floor = demo._floor(ordered, 200)
    assert 1 / floor.small + 1 / floor.large == pytest.approx(1 / 200 + 1 / 1000, rel=0.01)
    assert floor.small + floor.large == 1000
    # Means give (1/a + 1/b), deviations half of it; 20 splits know that to about a quarter.
    assert floor.mean == pytest.approx(1.5 * (1 / 200 + 1 / 1000), rel=0.6)
    assert demo._floor(ordered, 900)[2:] == (500, 500)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_samples": 5}, "num_samples must be that of the demo in .*, 448; got 5"),
        ({"train_steps": 20}, "train_steps must be that of the demo in .*, 30; got 20"),
    ],
)
def test_another_demo_is_refused_before_the_training(changes, message, tmp_path):
    (tmp_path / "sweep").mkdir()
    write_json(tmp_path / "sweep" / "sweep.json", {"num_samples": 448})
    (tmp_path / "model" / "checkpoints" / "30").mkdir(parents=True)
    config = demo.DemoConfig(out=str(tmp_path), num_samples=448, train_steps=40)
    with refused(message):
        demo.main(dataclasses.replace(config, **changes))


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,), (2**32,)])
def test_seeds_are_refused_before_the_training(seeds, tmp_path):
    with refused("seeds must be"):
        demo.main(demo.DemoConfig(out=str(tmp_path / "out"), seeds=seeds))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "sampler, eta, words",
    [
        ("ddim", 0.5, "eta 0.5"),
        ("sigma_hat", None, "sigma-hat"),
        ("heun", None, "heun"),
        ("mine", 0.3, "mine, eta 0.3"),
    ],
)
def test_a_sampler_is_called_by_its_name_and_its_eta(sampler, eta, words):
    assert rule_of(sampler, eta) == words
