"""train.py: the update against closed forms, the loss against its expectation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddim_jax import linear_schedule, train

SCHEDULE = linear_schedule()
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)


def quadratic_loss(params, key, indices, batch):
    """Half the squared distance to each example; its mean gradient is params - mean(batch)."""
    del key, indices
    return 0.5 * jnp.sum((params - batch["x"]) ** 2, axis=-1)


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


def zero_network(variables, x, t, *labels, train, rngs):
    del variables, t, labels, train, rngs
    return jnp.zeros_like(x)


def losses(apply_fn=zero_network, images=IMAGES, indices=None, key=0, **kwargs):
    indices = jnp.arange(len(images)) if indices is None else indices
    loss_fn = train.diffusion_loss(apply_fn, SCHEDULE, batch_size=8, **kwargs)
    return jax.jit(loss_fn)({}, jax.random.key(key), indices, {"image": images})


def test_a_network_that_predicts_nothing_loses_the_variance_of_the_noise():
    keys = range(60)
    got = np.concatenate([losses(key=k) for k in keys])
    assert got.shape == (480,)
    # The mean of 480 * 16 squared normals: 1 with standard error sqrt(2 / 7680) = 0.016.
    assert abs(got.mean() - 1) < 0.07
    np.testing.assert_allclose(losses(reduction="sum"), 16 * losses(), rtol=1e-6)
    absolute = np.concatenate([losses(key=k, norm="l1") for k in keys])
    assert abs(absolute.mean() - np.sqrt(2 / np.pi)) < 0.04


def test_an_example_depends_on_its_place_and_not_on_its_shard():
    def noisy_network(variables, x, t, *labels, train, rngs):
        return x * jax.random.normal(rngs["dropout"], x.shape) + t

    for timesteps in ("independent", "antithetic"):
        whole = losses(noisy_network, timesteps=timesteps, flip=True)
        for i in range(0, 8, 2):
            part = losses(
                noisy_network, IMAGES[i : i + 2], jnp.arange(i, i + 2),
                timesteps=timesteps, flip=True,
            )  # fmt: skip
            np.testing.assert_allclose(part, whole[i : i + 2], rtol=1e-5)


def test_antithetic_indices_come_in_pairs():
    def shows_t(variables, x, t, *labels, train, rngs):
        return jnp.full_like(x, t * 1000.0)  # far above the noise, so that the loss shows t

    t = np.round(np.sqrt(losses(shows_t, timesteps="antithetic")) / 1000)
    # 8 // 2 + 1 = 5 are drawn, the last three mirror the first three.
    np.testing.assert_array_equal(t[5:], 999 - t[:3])


def test_flips_mirror_half_of_the_images_left_to_right():
    ramp = np.tile(np.array([0, 85, 170, 255], np.uint8), (8, 4, 1))[..., None]

    def shows_orientation(variables, x, t, *labels, train, rngs):
        return x  # eps - x_t is small only if x_t's signal is; orientation shows in the gradient

    plain, flipped = losses(shows_orientation, ramp), losses(shows_orientation, ramp, flip=True)
    # The keys are the same, so examples that were not flipped lose exactly the same.
    same = np.isclose(plain, flipped, rtol=1e-6)
    assert 0 < same.sum() < 8


def test_labels_reach_the_network_only_if_it_wants_them():
    def wants_label(variables, x, t, label, *, train, rngs):
        return jnp.full_like(x, label * 1000.0)

    loss_fn = train.diffusion_loss(wants_label, SCHEDULE, batch_size=8, num_classes=10)
    batch = {"image": IMAGES, "label": np.arange(8)}
    got = loss_fn({}, jax.random.key(0), jnp.arange(8), batch)
    np.testing.assert_allclose(np.sqrt(got), np.arange(8) * 1000, atol=2)


def test_a_share_of_the_labels_becomes_no_class():
    """Each example's own coin: 10 in place of its label, in about a quarter of 4000."""

    def wants_label(variables, x, t, label, *, train, rngs):
        return jnp.full_like(x, label * 1000.0)

    loss_fn = train.diffusion_loss(
        wants_label, SCHEDULE, batch_size=4000, num_classes=10, label_dropout=0.25
    )
    labels = np.arange(4000) % 10
    batch = {"image": np.zeros((4000, 2, 2, 1), np.uint8), "label": labels}
    seen = np.sqrt(loss_fn({}, jax.random.key(0), jnp.arange(4000), batch)) / 1000
    dropped = np.isclose(seen, 10, atol=0.01)
    np.testing.assert_allclose(seen[~dropped], labels[~dropped], atol=0.01)
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    later = {name: array[3000:] for name, array in batch.items()}  # as another device holds them
    again = np.sqrt(loss_fn({}, jax.random.key(0), jnp.arange(3000, 4000), later)) / 1000
    np.testing.assert_array_equal(np.isclose(again, 10, atol=0.01), dropped[3000:])


@pytest.mark.parametrize("options", [{"label_dropout": 0.1}, {"label_dropout": 1.0}])
def test_a_label_dropout_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="label_dropout must be in"):
        train.diffusion_loss(zero_network, SCHEDULE, batch_size=8, **options)


def test_the_step_compiles_once():
    tx = optax.sgd(0.1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, batch):
        return train.train_step(state, batch, loss_fn=quadratic_loss, tx=tx, ema_decay=0.9)

    state = train.init_train_state(jax.random.key(0), jnp.zeros(2), tx)
    for _ in range(3):
        state, _ = step(state, {"x": jnp.ones((4, 2))})


def test_hardware_generators_are_refused():
    loss_fn = train.diffusion_loss(zero_network, SCHEDULE, batch_size=8)
    with pytest.raises(ValueError, match=r"threefry2x32.*got rbg"):
        loss_fn({}, jax.random.key(0, impl="rbg"), jnp.arange(8), {"image": IMAGES})
