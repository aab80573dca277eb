"""L_gamma: zero for the true noise, its expectation in closed form, and the draws of t."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

import ddim_jax as dj

SCHEDULE = dj.linear_schedule()
TABLE = np.float64(SCHEDULE.alphas_cumprod)
KEY = jax.random.key(0)


def knows(x0):
    """The network that sees the clean data, and so the noise."""
    return lambda x, t: dj.x0_to_epsilon(x0, x, SCHEDULE.alpha_bar(t))


def zero(x, t):
    return jnp.zeros_like(x)


@functools.partial(jax.jit, static_argnums=2, static_argnames="schedule_length")
def shown(key, x0, norm="l2", t=None, schedule_length=1000):
    """The loss of a network that says nothing, and the x_t and t it was shown."""
    seen = []

    def spy(x, t):
        seen.append((x, t))
        return zero(x, t)

    loss = dj.eps_loss(key, spy, dj.linear_schedule(schedule_length), x0, norm=norm, t=t)
    return loss, *seen[0]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_loss_of_the_true_noise_is_zero(norm):
    x0 = jax.random.uniform(KEY, (16, 8, 8, 3), minval=-1.0)
    loss = jax.jit(lambda k: dj.eps_loss(k, knows(x0), SCHEDULE, x0, norm=norm))(KEY)
    assert loss.shape == (16,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0, atol=1e-3)


@pytest.mark.parametrize(
    "norm, moment, variance", [("l2", 1.0, 2.0), ("l1", np.sqrt(2 / np.pi), 1 - 2 / np.pi)]
)
def test_a_network_that_says_nothing_pays_the_norm_of_the_noise(norm, moment, variance):
    """E eps^2 = 1 and E |eps| = sqrt(2 / pi), each a mean over the data's axes."""
    x0 = jnp.zeros((64, 20, 20, 2))
    loss, *_ = shown(KEY, x0, norm)
    assert abs(loss.mean() - moment) < 4 * np.sqrt(variance / x0.size)
    assert abs(loss.var() * x0[0].size / variance - 1) < 0.8  # each example has its own noise


@pytest.mark.parametrize("t", [0, 300, 999])
def test_a_linear_network_pays_its_closed_form(t):
    """eps_fn = c x errs by (1 - c sqrt(1 - ab)) eps - c sqrt(ab) x0, whose mean square is known."""
    c, ab = 0.6, TABLE[t]
    x0 = jax.random.rademacher(jax.random.key(1), (32, 40, 40), jnp.float32)  # x0^2 = 1
    run = jax.jit(lambda t: dj.eps_loss(KEY, lambda x, t: c * x, SCHEDULE, x0, t=t))
    loss = run(jnp.full(32, t))
    want = (1 - c * np.sqrt(1 - ab)) ** 2 + c**2 * ab
    np.testing.assert_allclose(loss.mean(), want, rtol=0.03)


def test_the_network_is_shown_the_noised_data_at_its_index():
    x0 = jnp.full((4, 5000), 0.5)
    t = jnp.array([0, 10, 500, 999])
    loss, x_t, t_shown = shown(KEY, x0, t=t)
    np.testing.assert_array_equal(t_shown, t)
    ab = TABLE[t][:, None]
    eps = (np.float64(x_t) - np.sqrt(ab) * 0.5) / np.sqrt(1 - ab)
    np.testing.assert_allclose(loss, (eps**2).mean(1), rtol=2e-3)
    # For the paper's code, which sums over the data's axes:
    np.testing.assert_allclose(loss * x0[0].size, (eps**2).sum(1), rtol=2e-3)
    assert np.all(np.abs(eps.mean(1)) < 4 / np.sqrt(5000))
    assert np.all(np.abs(np.corrcoef(eps) - np.eye(4)) < 4 * np.sqrt(2 / 5000))


def test_indices_are_drawn_uniformly_from_the_whole_schedule():
    _, _, t = shown(KEY, jnp.zeros((20_000, 1)), schedule_length=10)
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10 and np.all(np.abs(counts - 2000) < 4 * np.sqrt(2000 * 0.9))


# ----------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_an_example_with_its_own_key_does_not_depend_on_the_batch(impl):
    x0 = jax.random.normal(KEY, (6, 5))
    keys = dj.image_keys(jax.random.key(2, impl=impl), np.arange(6))
    run = jax.jit(lambda k, x: dj.eps_loss(k, lambda x, t: x * (t % 7)[:, None], SCHEDULE, x))
    loss = run(keys, x0)
    np.testing.assert_allclose(run(keys[3:5], x0[3:5]), loss[3:5], rtol=1e-6)
    order = jnp.array([5, 0, 3, 1, 4, 2])
    np.testing.assert_allclose(run(keys[order], x0[order]), loss[order], rtol=1e-6)
    assert len(np.unique(loss)) == 6


def test_keys_decide_the_loss():
    x0 = jnp.zeros((4, 3))
    one, *_ = shown(KEY, x0)
    np.testing.assert_array_equal(shown(jax.random.PRNGKey(0), x0)[0], one)
    assert not np.any(shown(jax.random.key(1), x0)[0] == one)


def test_the_index_and_the_noise_are_independent():
    keys = jax.random.split(KEY, 5000)
    for key in (KEY, keys):
        loss, _, t = shown(key, jnp.zeros((5000, 4)))
        assert abs(np.corrcoef(t, loss)[0, 1]) < 4 / np.sqrt(5000)


def test_no_key_is_used_twice():
    x0 = jnp.zeros((2, 3))
    with jax.debug_key_reuse(True):
        for number in ((), (2,)):
            keys = jax.random.split(jax.random.key(0), number)
            jax.jit(lambda k: dj.eps_loss(k, zero, SCHEDULE, x0))(keys)
        jax.jit(lambda k: dj.antithetic_timesteps(k, jnp.arange(4), 4, 10))(jax.random.key(0))


# --------------------------------------------------------------------------- antithetic indices


@pytest.mark.parametrize("batch_size, num_steps", [(1, 10), (2, 1), (7, 1000), (64, 10)])
def test_antithetic_indices_come_in_pairs(batch_size, num_steps):
    t = dj.antithetic_timesteps(KEY, jnp.arange(batch_size), batch_size, num_steps)
    t = np.asarray(t)
    assert t.shape == (batch_size,) and t.dtype == np.int32
    assert t.min() >= 0 and t.max() < num_steps
    drawn = batch_size // 2 + 1
    np.testing.assert_array_equal(t[drawn:], num_steps - 1 - t[: batch_size - drawn])


def test_antithetic_indices_do_not_depend_on_how_the_batch_is_sharded():
    whole = dj.antithetic_timesteps(KEY, jnp.arange(16), 16, 1000)
    shards = [dj.antithetic_timesteps(KEY, jnp.arange(i, i + 4), 16, 1000) for i in (0, 4, 8, 12)]
    np.testing.assert_array_equal(jnp.concatenate(shards), whole)
    assert len(np.unique(whole)) > 8


def test_antithetic_indices_are_uniform():
    n = 20_000
    counts = np.bincount(dj.antithetic_timesteps(KEY, jnp.arange(n), n, 10), minlength=10)
    # Half of them are drawn, so a count varies as that of n / 2 independent ones, doubled.
    assert np.all(np.abs(counts - n / 10) < 4 * 2 * np.sqrt(n / 2 * 0.1 * 0.9))
    assert counts[0] == pytest.approx(counts[9], abs=2)


# --------------------------------------------------------------- shapes, dtypes, vmap and grad


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 4, 2)])
def test_any_shape_with_a_leading_axis(shape):
    loss, x_t, t = shown(KEY, jnp.zeros(shape))
    assert loss.shape == t.shape == (3,) and x_t.shape == shape
    assert np.isfinite(loss).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_data_meets_a_float32_loss(dtype):
    x0 = jnp.zeros((8, 100), dtype)
    loss, x_t, _ = shown(KEY, x0)
    assert x_t.dtype == dtype and loss.dtype == jnp.float32
    want, *_ = shown(KEY, x0.astype(jnp.float32))
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # the noise itself is never rounded


def test_float64_data_keeps_its_dtype():
    with jax.enable_x64(True):
        loss, x_t, _ = jax.eval_shape(shown, KEY, jnp.zeros((2, 3), jnp.float64))
    assert loss.dtype == x_t.dtype == jnp.float64


def test_the_gradient_descends_to_the_best_network():
    """Among eps_fn = w x on data N(0, 1), w = sqrt(1 - ab) is the best: there the slope is zero."""
    x0 = jax.random.normal(KEY, (64, 500))
    t = 300

    @jax.jit
    @jax.grad
    def slope(w):
        loss = dj.eps_loss(KEY, lambda x, t: w * x, SCHEDULE, x0, t=jnp.full(64, t))
        return loss.mean()

    best = np.sqrt(1 - TABLE[t])
    np.testing.assert_allclose(slope(best), 0, atol=0.05)
    np.testing.assert_allclose(slope(best + 0.5), 1.0, atol=0.05)  # the loss is w^2 - 2 w best + 1


def test_vmap_of_one_example_losses_is_the_batch():
    x0 = jax.random.normal(KEY, (4, 6))
    keys = jax.random.split(KEY, 4)
    t = jnp.array([0, 5, 500, 999])
    run = jax.jit(lambda k, x, t: dj.eps_loss(k, zero, SCHEDULE, x, t=t))
    batch = run(keys, x0, t)
    each = jax.jit(jax.vmap(lambda k, x, t: run(k[None], x[None], t[None])[0]))
    np.testing.assert_allclose(each(keys, x0, t), batch, rtol=1e-6)


# ------------------------------------------------------------------------------------ refusals


def test_bad_input_is_refused_by_name():
    x0 = jnp.zeros((3, 4))
    with refused(r"norm must be one of \('l2', 'l1'\); got 'huber'"):
        dj.eps_loss(KEY, zero, SCHEDULE, x0, norm="huber")
    with refused(r"x0 must be floating point, data in \[-1, 1\]; got dtype uint8.*127.5"):
        dj.eps_loss(KEY, zero, SCHEDULE, x0.astype(jnp.uint8))
    with refused("x0 must have a leading axis of examples; got a scalar"):
        dj.eps_loss(KEY, zero, SCHEDULE, jnp.zeros(()))
    with refused(r"key must be one key, or one for each of the \(3,\) images; got \(2,\)"):
        dj.eps_loss(jax.random.split(KEY), zero, SCHEDULE, x0)
    with refused("key must be a PRNG key"):
        dj.eps_loss(0, zero, SCHEDULE, x0)
    with refused(r"level \(alpha_bar, t, eta\) must .* got level shape \(2,\)"):
        dj.eps_loss(KEY, zero, SCHEDULE, x0, t=jnp.zeros(2, int))
    with refused("t must be integer indices"):
        dj.eps_loss(KEY, zero, SCHEDULE, x0, t=jnp.zeros(3))
    with refused(r"eps_fn must return an array of x's shape \(3, 4\); got \(3, 8\)"):
        dj.eps_loss(KEY, lambda x, t: jnp.concatenate([x, x], -1), SCHEDULE, x0)


def test_an_index_outside_the_schedule_gives_nan():
    loss = dj.eps_loss(KEY, lambda x, t: x, SCHEDULE, jnp.zeros((2, 4)), t=jnp.array([5, 1000]))
    assert np.isnan(loss).tolist() == [False, True]
