"""What the demo says of its table, and refuses before it trains."""

import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import demo
from common.sample_set import rule_of
from refusals import refused


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
        "By fd DDIM is ahead at S = 10; at S = 20 eta = 0.5 is, by 1.5, within the seeds' spread "
        "of 1.6; at S = 50 eta = 0.5 is, by 8, beyond the seeds' spread of 0.1."
    )
    assert demo._who_is_ahead(table(5, (2, 4), (1, 2))).startswith("By fd DDIM is never ahead; at")


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
