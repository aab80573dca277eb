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


# ------------------------------------------------------------------- other predictions, weights


def by_hand(predicts, x0, x_t, ab, said, norm="l2"):
    """The loss in float64, from the noise that x_t must hold."""
    x0, x_t, ab = np.float64(x0), np.float64(x_t), np.float64(ab).reshape(-1, *[1] * (x0.ndim - 1))
    eps = (x_t - np.sqrt(ab) * x0) / np.sqrt(1 - ab)
    right = {"eps": eps, "x0": x0, "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0}[predicts]
    error = right - said
    distance = error**2 if norm == "l2" else np.abs(error)
    return distance.mean(axis=tuple(range(1, x0.ndim)))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_the_loss_of_each_prediction_is_its_distance_by_hand(predicts, norm):
    x0 = jax.random.uniform(jax.random.key(1), (4, 20, 20), minval=-1.0)
    t, seen = jnp.array([3, 200, 600, 999]), []

    def network(x, t):
        seen.append(x)
        return 0.3 * x

    loss = dj.prediction_loss(KEY, network, SCHEDULE, x0, predicts=predicts, t=t, norm=norm)
    want = by_hand(predicts, x0, seen[0], TABLE[t], 0.3 * np.float64(seen[0]), norm)
    # At t = 3 float32 knows the noise in x_t to 1e-5 of its size.
    np.testing.assert_allclose(loss, want, rtol=1e-4)


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_the_expected_loss_of_a_linear_network(predicts):
    """Says c x of data with x0^2 = 1: the error is linear in x0 and eps, which are independent."""
    c, t = 0.6, 300
    signal, noise = np.sqrt(TABLE[t]), np.sqrt(1 - TABLE[t])
    of_x0, of_eps = {"eps": (0, 1), "x0": (1, 0), "v": (-noise, signal)}[predicts]
    want = (of_x0 - c * signal) ** 2 + (of_eps - c * noise) ** 2
    x0 = jax.random.rademacher(jax.random.key(1), (32, 40, 40), jnp.float32)
    loss = jax.jit(
        lambda t: dj.prediction_loss(KEY, lambda x, t: c * x, SCHEDULE, x0, predicts=predicts, t=t)
    )(jnp.full(32, t))
    np.testing.assert_allclose(loss.mean(), want, rtol=0.03)


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_the_right_answer_costs_nothing(predicts):
    x0 = jax.random.uniform(KEY, (16, 8, 8, 3), minval=-1.0)
    right = dj.PARAMETRIZATIONS[predicts].target

    def network(x, t):
        ab = SCHEDULE.alpha_bar(t)
        return right(x0, dj.x0_to_epsilon(x0, x, ab), ab)

    loss = jax.jit(lambda k: dj.prediction_loss(k, network, SCHEDULE, x0, predicts=predicts))(KEY)
    np.testing.assert_allclose(loss, 0, atol=1e-3)


def test_eps_loss_is_the_loss_of_eps():
    x0, t = jax.random.normal(KEY, (4, 5)), jnp.array([0, 5, 500, 999])
    for norm in ("l2", "l1"):
        got = dj.eps_loss(KEY, lambda x, t: 0.3 * x, SCHEDULE, x0, t=t, norm=norm)
        want = dj.prediction_loss(KEY, lambda x, t: 0.3 * x, SCHEDULE, x0, t=t, norm=norm)
        np.testing.assert_array_equal(got, want)


def test_a_prediction_of_ones_own_is_an_entry_of_the_table(monkeypatch):
    """Half the noise: its loss is a quarter of that of the noise, when the network says zero."""
    kind = dj.Parametrization(
        lambda fn, schedule: lambda x, t: 2 * fn(x, t), lambda x0, eps, alpha_bar: eps / 2
    )
    monkeypatch.setitem(dj.PARAMETRIZATIONS, "half", kind)
    x0 = jax.random.normal(KEY, (4, 5))
    got = dj.prediction_loss(KEY, zero, SCHEDULE, x0, predicts="half")
    np.testing.assert_allclose(got, dj.eps_loss(KEY, zero, SCHEDULE, x0) / 4, rtol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_min_snr_is_its_three_formulas(predicts, gamma):
    """Hang et al. 2023, section 3.4, over the whole schedule and beyond."""
    log_snr = np.concatenate([SCHEDULE.log_snr(np.arange(1000)), np.linspace(-60, 60, 25)])
    snr = np.exp(np.float64(log_snr))
    want = {
        "x0": np.minimum(snr, gamma),
        "eps": np.minimum(snr, gamma) / snr,
        "v": np.minimum(snr, gamma) / (snr + 1),
    }[predicts]
    got = jax.jit(dj.min_snr(predicts, gamma))(jnp.asarray(log_snr))
    np.testing.assert_allclose(got, want, rtol=2e-5)  # the exponential of up to 60, in float32


def test_min_snr_at_both_ends():
    """SNR 0, where a schedule may end, and infinite: at clean data."""
    ends = jnp.array([-jnp.inf, jnp.inf])
    for predicts, want in [("eps", [1, 0]), ("v", [0, 0]), ("x0", [0, 5])]:
        np.testing.assert_array_equal(dj.min_snr(predicts)(ends), want)


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_a_weighted_loss_is_the_loss_times_its_weight(predicts):
    x0, t = jax.random.normal(KEY, (4, 5)), jnp.array([0, 5, 500, 999])
    run = functools.partial(dj.prediction_loss, KEY, zero, SCHEDULE, x0, predicts=predicts, t=t)
    snr = TABLE[t] / (1 - TABLE[t])
    np.testing.assert_allclose(run(weight=lambda log_snr: log_snr), np.log(snr) * run(), rtol=2e-4)
    weight = np.minimum(snr, 5) / {"eps": snr, "v": snr + 1, "x0": 1}[predicts]
    np.testing.assert_allclose(run(weight=dj.min_snr(predicts)), weight * run(), rtol=2e-4)


def test_min_snr_weighs_every_prediction_as_the_error_of_x0():
    """One network, read in three ways: the three weighted losses are one number."""
    x0, t = jax.random.normal(KEY, (6, 500)), jnp.array([10, 100, 300, 500, 700, 900])

    def says(x, t):  # of x0, and by it of the others
        return 0.8 * x

    def loss(predicts):
        def network(x, t):
            ab = SCHEDULE.alpha_bar(t)
            return right(says(x, t), dj.x0_to_epsilon(says(x, t), x, ab), ab)

        right = dj.PARAMETRIZATIONS[predicts].target
        return dj.prediction_loss(
            KEY, network, SCHEDULE, x0, predicts=predicts, t=t, weight=dj.min_snr(predicts)
        )

    for predicts in ("eps", "v"):
        np.testing.assert_allclose(loss(predicts), loss("x0"), rtol=1e-3)


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_pure_noise_trains_with_a_finite_loss(predicts):
    """The last index of a schedule without signal at its end, weighted too; v is then -x0."""
    schedule = dj.zero_terminal_snr(SCHEDULE)
    x0, t = jax.random.normal(KEY, (3, 50)), jnp.full(3, 999)

    def loss(w, weight):
        return dj.prediction_loss(
            KEY, lambda x, t: w * x, schedule, x0, predicts=predicts, t=t, weight=weight
        )

    for weight in (None, dj.min_snr(predicts)):
        assert np.isfinite(loss(0.5, weight)).all()
        assert np.isfinite(jax.grad(lambda w, a=weight: loss(w, a).sum())(0.5))
    if predicts != "eps":
        np.testing.assert_allclose(loss(0.0, None), np.square(x0).mean(1), rtol=1e-6)


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
        schedule = dj.linear_schedule(10)
        jax.jit(lambda k: dj.antithetic_timesteps(k, jnp.arange(4), 4, schedule))(jax.random.key(0))


# --------------------------------------------------------------------------- antithetic indices


@pytest.mark.parametrize("batch_size, num_steps", [(1, 10), (2, 1), (7, 1000), (64, 10)])
def test_antithetic_indices_come_in_pairs(batch_size, num_steps):
    schedule = dj.linear_schedule(num_steps)
    t = dj.antithetic_timesteps(KEY, jnp.arange(batch_size), batch_size, schedule)
    t = np.asarray(t)
    assert t.shape == (batch_size,) and t.dtype == np.int32
    assert t.min() >= 0 and t.max() < num_steps
    drawn = batch_size // 2 + 1
    np.testing.assert_array_equal(t[drawn:], num_steps - 1 - t[: batch_size - drawn])


def test_antithetic_indices_do_not_depend_on_how_the_batch_is_sharded():
    def draw(indices):
        return dj.antithetic_timesteps(KEY, indices, 16, SCHEDULE)

    whole = draw(jnp.arange(16))
    shards = [draw(jnp.arange(i, i + 4)) for i in (0, 4, 8, 12)]
    np.testing.assert_array_equal(jnp.concatenate(shards), whole)
    assert len(np.unique(whole)) > 8


def test_antithetic_indices_are_uniform():
    n = 20_000
    t = dj.antithetic_timesteps(KEY, jnp.arange(n), n, dj.linear_schedule(10))
    counts = np.bincount(t, minlength=10)
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
    with refused("norm must be one of l2, l1; got 'huber'"):
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


def test_bad_predictions_and_weights_are_refused_by_name():
    x0 = jnp.zeros((3, 4))
    with refused("predicts must be one of eps, v, x0; got 'score'"):
        dj.prediction_loss(KEY, zero, SCHEDULE, x0, predicts="score")
    with refused("predicts must be one of eps, v, x0; got 'score'"):
        dj.min_snr("score")
    for gamma in (0.0, -5.0, float("nan")):
        with refused(f"gamma must be above 0; got {gamma}"):
            dj.min_snr("v", gamma)
    with refused(r"eps_fn must return an array of x's shape \(3, 4\); got \(3,\)"):
        dj.prediction_loss(KEY, lambda x, t: x[:, 0], SCHEDULE, x0, predicts="v")


def test_an_index_outside_the_schedule_gives_nan():
    loss = dj.eps_loss(KEY, lambda x, t: x, SCHEDULE, jnp.zeros((2, 4)), t=jnp.array([5, 1000]))
    assert np.isnan(loss).tolist() == [False, True]


def test_a_denoiser_in_the_place_of_its_network_is_refused():
    v = dj.from_v(lambda x, t: x, dj.linear_schedule())
    with pytest.raises(ValueError, match="got a Prediction"):
        dj.prediction_loss(
            jax.random.key(0), v, dj.linear_schedule(), jnp.zeros((2, 3)), predicts="v"
        )
