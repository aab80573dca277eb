"""train.py: the update and the average against closed forms, and what a loss is shown."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import refused

from ddim_jax import image_keys, train
from ddim_jax.objectives import Frozen


def quadratic_loss(params, inputs):
    """Half the squared distance to each example; its mean gradient is params - mean(batch)."""
    return 0.5 * jnp.sum((params - inputs.batch["x"]) ** 2, axis=-1), inputs.state


def run(steps, tx, batch, params, **kwargs):
    state = train.init_train_state(jax.random.key(0), params, tx)
    step = jax.jit(
        functools.partial(train.train_step, loss_fn=quadratic_loss, tx=tx, **kwargs),
        donate_argnums=0,
    )
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_sgd_and_average_follow_their_closed_forms(num_microbatches):
    x = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    rate, start, decay = 0.1, np.full(3, 5.0), 0.5
    state, metrics = run(
        6, optax.sgd(rate), {"x": x}, jnp.asarray(start, jnp.float32),
        ema_decay=decay, num_microbatches=num_microbatches,
    )  # fmt: skip
    mean = x.astype(np.float64).mean(0)
    path = [mean + (start - mean) * (1 - rate) ** k for k in range(7)]
    average = start
    for k in range(1, 7):
        d = min(decay, (1 + k) / (10 + k))
        average = d * average + (1 - d) * path[k]
    np.testing.assert_allclose(state.params, path[-1], rtol=1e-5)
    np.testing.assert_allclose(state.ema_params, average, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(path[5] - mean), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss"], 0.5 * ((path[5] - x) ** 2).sum(-1).mean(), rtol=1e-5
    )
    assert int(state.step) == 6


def test_long_runs_average_with_the_given_decay():
    tx = optax.sgd(0.0)
    state = train.init_train_state(jax.random.key(0), jnp.ones(1), tx)
    state = state._replace(step=jnp.asarray(10**7, jnp.int32), ema_params=jnp.zeros(1))
    step = functools.partial(train.train_step, loss_fn=quadratic_loss, tx=tx, ema_decay=0.999)
    state, _ = jax.jit(step)(state, {"x": jnp.zeros((2, 1))})
    np.testing.assert_allclose(state.ema_params, [0.001], rtol=1e-4)


def test_a_decay_that_warms_up_averages_over_a_tenth_of_the_updates():
    """Update m counts like m ** 8, whose mean is nine tenths of the way."""
    n = np.arange(1, 2001)
    decays = jax.vmap(lambda step: train.average_decay(step, 0.9999))(jnp.asarray(n))
    weights = (1 - np.float64(decays)) * np.append(np.cumprod(decays[:0:-1], dtype=float)[::-1], 1)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-4)
    np.testing.assert_allclose((weights * (2000 - n)).sum(), 200, rtol=2e-3)
    last = [train.average_decay(jnp.int32(n), 0.9999) for n in (89_000, 90_000)]  # 9 / (1 - decay)
    assert last[0] < 0.9999 and last[1] == np.float32(0.9999)


def test_warmup_rises_linearly_and_clipping_bounds_the_gradient():
    # Adam's first update is the rate times the gradient's sign, whatever its size.
    for steps_done, want in [(0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0)]:
        tx = train.adam_with_warmup(1.0, warmup_steps=10)
        counters = lambda a, n=steps_done: jnp.full_like(a, n) if a.dtype == jnp.int32 else a  # noqa: E731
        state = jax.tree.map(counters, tx.init(jnp.zeros(2)))
        # All counters moved on: Adam's bias corrections too, so undo them in the expectation.
        update, _ = tx.update(jnp.array([3.0, 4.0]), state)
        k = steps_done + 1
        g = np.array([0.6, 0.8])  # clipped to norm 1
        mu, nu = 0.1 * g / (1 - 0.9**k), 0.001 * g**2 / (1 - 0.999**k)
        np.testing.assert_allclose(update, -want * mu / (np.sqrt(nu) + 1e-8), rtol=1e-4)


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"num_microbatches must divide .* 8; got 3"):
        run(1, optax.sgd(0.1), {"x": np.zeros((8, 2), np.float32)}, jnp.zeros(2),
            ema_decay=0.9, num_microbatches=3)  # fmt: skip


def test_the_step_compiles_once():
    tx = optax.sgd(0.1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, batch):
        return train.train_step(state, batch, loss_fn=quadratic_loss, tx=tx, ema_decay=0.9)

    state = train.init_train_state(jax.random.key(0), jnp.zeros(2), tx)
    for _ in range(3):
        state, _ = step(state, {"x": jnp.ones((4, 2))})


# --------------------------------------------------------------------- what a loss is shown

RATE, DECAY, WEIGHT = 0.1, 0.5, 0.3


def contract_loss(params, inputs):
    """Of everything a loss is shown; it keeps the running mean of its losses and their number.

    |params - teacher * x|^2 / 2 + place * noise . params + WEIGHT |params - average|^2 / 2, noise
    from the example's own key.
    """
    keys = image_keys(inputs.key, inputs.places)
    noise = jax.vmap(lambda key: jax.random.normal(key, params.shape))(keys)
    losses = (
        0.5 * jnp.sum((params - inputs.frozen.objective["w"] * inputs.batch["x"]) ** 2, -1)
        + inputs.places * (noise @ params)
        + 0.5 * WEIGHT * jnp.sum((params - inputs.ema_params) ** 2)
    )
    count = inputs.state["count"] + 1
    mean = inputs.state["mean"] + (losses.mean() - inputs.state["mean"]) / count
    return losses, {"mean": mean, "count": count}


def contract_run(num_steps, x, w, start, num_parts=1):
    """The same in float64: params, average, and the mean of the losses; one part after another."""
    p = average = np.float64(start)
    kept = []
    for step in range(num_steps):
        key = jax.random.fold_in(jax.random.key(7), step)
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(image_keys(key, np.arange(8)))
        pushes = np.arange(8)[:, None] * np.float64(noise)
        losses = (
            0.5 * ((p - w * x) ** 2).sum(-1)
            + pushes @ p
            + 0.5 * WEIGHT * ((p - average) ** 2).sum()
        )
        kept += [part.mean() for part in np.split(losses, num_parts)]
        p = p - RATE * ((p - w * x + pushes).mean(0) + WEIGHT * (p - average))
        decay = min(DECAY, (2 + step) / (11 + step))
        average = decay * average + (1 - decay) * p
    return p, average, np.mean(kept)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_a_loss_sees_the_average_the_frozen_its_state_the_key_and_the_places(num_parts):
    rng = np.random.default_rng(2)
    x, w, start = (rng.normal(size=size).astype(np.float32) for size in ((8, 3), 3, 3))
    tx = optax.sgd(RATE)
    state = train.init_train_state(
        jax.random.key(7),
        jnp.asarray(start),
        tx,
        loss_state={"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)},
    )
    step = jax.jit(
        functools.partial(
            train.train_step,
            loss_fn=contract_loss,
            tx=tx,
            ema_decay=DECAY,
            num_microbatches=num_parts,
        ),
        donate_argnums=0,
    )
    frozen = Frozen(objective={"w": jnp.asarray(w)})
    for _ in range(5):
        state, metrics = step(state, {"x": x}, frozen)
    params, average, mean = contract_run(5, x, w, start, num_parts)
    np.testing.assert_allclose(state.params, params, rtol=1e-4)
    np.testing.assert_allclose(state.ema_params, average, rtol=1e-4)
    np.testing.assert_allclose(state.loss_state["mean"], mean, rtol=1e-4)
    assert int(state.loss_state["count"]) == 5  # once an update
    assert np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(frozen.objective["w"], w)  # not consumed with the state


def test_an_average_of_its_own_is_kept_by_a_decay_without_warm_up():
    tx = optax.sgd(0.0)
    params, average = jnp.float32([1.0, 2.0]), jnp.float32([5.0, 7.0])
    batch = {"x": jnp.zeros((2, 2))}

    def after_one_step(**options):
        state = train.init_train_state(jax.random.key(0), params + 0, tx, ema_params=average)
        step = functools.partial(train.train_step, loss_fn=quadratic_loss, tx=tx, **options)
        return jax.jit(step, donate_argnums=0)(state, batch)[0].ema_params

    np.testing.assert_allclose(after_one_step(ema_decay=0.9, ema_warmup=False), [4.6, 6.5])
    # With it the decay is 2 / 11.
    np.testing.assert_allclose(after_one_step(ema_decay=0.9), [19 / 11, 32 / 11], rtol=1e-6)
    np.testing.assert_array_equal(average, [5.0, 7.0])  # a copy was donated


def test_a_state_moves_once_an_update_whatever_the_microbatches():
    """A count goes up by one; the running mean is numpy's over the whole batch."""

    def loss_fn(params, inputs):
        losses = params["w"] * inputs.batch["x"]
        state = {"count": inputs.state["count"] + 1, "seen": inputs.state["seen"] + losses.mean()}
        return losses, state

    batch = {"x": jnp.arange(8.0)}
    tx = optax.sgd(0.0)
    for parts in (1, 2, 4):
        state = train.init_train_state(
            jax.random.key(0),
            {"w": jnp.float32(2.0)},
            tx,
            loss_state={"count": jnp.int32(0), "seen": jnp.float32(1.0)},
        )
        step = functools.partial(
            train.train_step, loss_fn=loss_fn, tx=tx, ema_decay=0.9, num_microbatches=parts
        )
        state, _ = jax.jit(step)(state, batch)
        assert state.loss_state["count"] == 1
        np.testing.assert_allclose(state.loss_state["seen"], 1 + 2 * np.arange(8).mean())


@pytest.mark.parametrize("shape", [(), (4, 4), (2,)])
def test_another_number_of_losses_is_refused(shape):
    tx = optax.sgd(0.1)
    state = train.init_train_state(jax.random.key(0), {"w": jnp.float32(1.0)}, tx)

    def loss_fn(params, inputs):
        return params["w"] * jnp.ones(shape), inputs.state

    with refused("one loss for each example"):
        train.train_step(state, {"x": jnp.zeros(4)}, loss_fn=loss_fn, tx=tx, ema_decay=0.9)
