"""Updates that are not finite: they stop a run, or are left out and counted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import SMALL, assert_same_bits, leaves

from ddim_jax import objectives
from ddim_jax.objectives import Denoising
from ddim_jax.runs import fit
from ddim_jax.train import init_train_state, train_step


def test_a_bad_update_changes_nothing_but_the_step():
    """A quadratic whose loss is NaN at every third step: by hand, SGD of the other steps alone."""

    def loss_fn(params, inputs):
        x = inputs.batch["x"]
        return jnp.square(params["w"] - x), inputs.state

    tx = optax.sgd(0.25)
    state = init_train_state(jax.random.key(0), {"w": jnp.float32(4.0)}, tx)
    want, average = 4.0, 4.0
    for i in range(6):
        x = jnp.full(2, jnp.nan if i % 3 == 1 else float(i))
        state, metrics = train_step(
            state, {"x": x}, loss_fn=loss_fn, tx=tx, ema_decay=0.5, ema_warmup=False,
            skip_nonfinite=True,
        )  # fmt: skip
        assert np.isfinite(metrics["loss"]) == (i % 3 != 1)
        if i % 3 != 1:
            want -= 0.25 * 2 * (want - i)
            average = (average + want) / 2
        assert int(state.step) == i + 1
        assert float(state.params["w"]) == want and float(state.ema_params["w"]) == average


@dataclasses.dataclass(frozen=True)
class Blinks(Denoising):
    """The usual loss, NaN at step 2 and an infinite gradient at step 4."""

    def loss_fn(self, setup):
        usual = super().loss_fn(setup)

        def loss(params, inputs):
            losses, state = usual(params, inputs)
            # The key of a step is fold_in(key, step), known from the run's seed.
            own = jax.random.key_data(inputs.key)
            _, run_key = jax.random.split(jax.random.key(0, impl="threefry2x32"))
            at = [
                jnp.all(own == jax.random.key_data(jax.random.fold_in(run_key, i))) for i in (1, 3)
            ]
            losses = jnp.where(at[0], jnp.nan, losses)
            bias = params["conv_out"]["bias"].sum()
            on = jnp.where(at[1], 0.0, 1.0)  # at 0 the slope of the root is 0 / 0
            return losses + jnp.sqrt(on * jnp.square(bias) + on), state

        return loss


@pytest.fixture
def blinks(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "blinks", Blinks)
    return dataclasses.replace(SMALL, objective=Blinks(flip=False), max_steps=6, log_every=1)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def test_bad_updates_are_left_out_and_counted_whether_resumed_or_not(tmp_path, blinks, capsys):
    config = dataclasses.replace(blinks, workdir=str(tmp_path / "a"), skip_updates=2)
    fit(config)
    assert capsys.readouterr().err.count("this update is left out") == 2
    said = [line for line in lines(tmp_path / "a") if "skipped" in line]
    assert said == [
        {"step": 2, "skipped": "the loss of step 2 is nan"},
        {"step": 4, "skipped": "the grad_norm of step 4 is nan"},
    ]
    assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path / "a").values())
    for max_steps in (3, 6):
        fit(dataclasses.replace(config, workdir=str(tmp_path / "b"), max_steps=max_steps))
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert [x["step"] for x in lines(tmp_path / "a")] == [x["step"] for x in lines(tmp_path / "b")]


@pytest.mark.parametrize("allowed, step", [(0, 2), (1, 4)])
def test_one_more_than_allowed_stops_the_run(tmp_path, blinks, allowed, step):
    config = dataclasses.replace(blinks, workdir=str(tmp_path), skip_updates=allowed)
    with pytest.raises(FloatingPointError, match=rf"of step {step} is nan.*by skip_updates"):
        fit(config)
