"""Guidance needs a row of "no class" that was trained: who knows of it, and who refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from refusals import refused
from small_runs import SMALL

from ddim_jax.keys import seed_key
from ddim_jax.objectives import Denoising, Objective
from ddim_jax.runs import fit, image_program, load_trained, read_config
from ddim_jax.runs.folder import load_spec
from ddim_jax.runs.init_from import check_init_from


def of(workdir, **changes):
    return dataclasses.replace(SMALL, workdir=str(workdir), **changes)


def test_guidance_from_a_row_that_never_moved_is_refused(tmp_path):
    """Without label dropout the row of "no class" is as it was drawn."""
    model = dataclasses.replace(SMALL.model, num_classes=10)
    never = dataclasses.replace(SMALL.objective, label_dropout=0.0)
    config = of(tmp_path / "never", model=model, objective=never, max_steps=2)
    fit(config)
    there = read_config(config.workdir)
    assert there["unconditional"] is False
    run = load_trained(config.workdir)
    label = jnp.array([1, 5])
    drawn = seed_of_row(config, run)
    np.testing.assert_allclose(
        run.params.network["label_embed"]["embedding"][10], drawn, rtol=1e-5, atol=1e-7
    )
    for guided in (
        lambda: run.denoiser(label, 3.0),
        lambda: run.spec.denoiser(run.params, label, 0.0),
        lambda: run.sample(jax.random.key(0), 2, 2, guidance_scale=3.0),
        lambda: image_program(run.spec, run.spec.timesteps(2), guidance_scale=3.0),
    ):
        with refused("guidance_scale must be 1 .* label dropout of 0.*; got [30]"):
            guided()
    with refused(r"label must be in \[0, 9\].*'no class' is not trained; got 10"):
        run.denoiser(jnp.array([3, 10]))
    run.denoiser(label)

    # A file that does not say so, of a version before: its objective does.
    del there["unconditional"]
    (tmp_path / "never" / "config.json").write_text(json.dumps(there))
    assert not load_spec(config.workdir).unconditional
    fit(dataclasses.replace(config, max_steps=3))  # and is resumed
    there["objective"]["label_dropout"] = 0.1
    (tmp_path / "never" / "config.json").write_text(json.dumps(there))
    assert load_spec(config.workdir).unconditional
    # Whether guidance is allowed decides no number.
    assert "unconditional" not in run.fingerprint and "no_class_row" not in run.fingerprint["model"]


def seed_of_row(config, run):
    """The row of "no class" as the initial weights have it."""
    init_key, _ = jax.random.split(seed_key(config.seed))
    x = jnp.zeros(run.spec.latent_shape)
    return run.spec.model.init(init_key, x, 0, 0)["params"]["label_embed"]["embedding"][10]


def test_a_network_may_be_trained_without_the_row(tmp_path):
    model = dataclasses.replace(SMALL.model, num_classes=10, no_class_row=False)
    config = of(tmp_path / "run", model=model, max_steps=1)
    with refused("model.no_class_row must be true for an objective .* label_dropout of 0"):
        fit(config)
    fit(dataclasses.replace(config, objective=Denoising(flip=False, label_dropout=0.0)))
    run = load_trained(config.workdir)
    assert run.params.network["label_embed"]["embedding"].shape[0] == 10
    assert run.fingerprint["model"]["no_class_row"] is False
    with refused("guidance_scale must be 1 for a network without a row for 'no class'"):
        run.denoiser(3, 2.0)
    # As many rows as nine classes and "no class" have: the shapes do not show it.
    nine = dataclasses.replace(model, num_classes=9, no_class_row=True)
    with refused("model.num_classes must be 10, as in the network of init_from"):
        check_init_from(config.workdir, of(tmp_path / "nine", model=nine).spec((8, 8, 1)))


def test_an_objective_of_ones_own_says_whether_it_trains_no_class():
    @dataclasses.dataclass(frozen=True)
    class Silent(Objective):
        pass

    @dataclasses.dataclass(frozen=True)
    class Dropping(Objective):
        label_dropout: float = 0.2

    @dataclasses.dataclass(frozen=True)
    class Saying(Objective):
        def trains_no_class(self):
            return True

    said = [o.trains_no_class() for o in (Silent(), Dropping(), Dropping(0.0), Saying())]
    assert said == [False, True, False, True]
    assert of("x", objective=Saying()).spec((8, 8, 1)).unconditional
