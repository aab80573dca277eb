"""Schedules against exactly summed products; sub-sequences against the paper, one by one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused, unchecked

import ddim_jax as dj
from ddim_jax.schedule import Spacing, zero_terminal_snr

SPACINGS = Spacing.__args__
SCHEDULE = dj.linear_schedule()


def test_linear_schedule_is_the_published_one():
    assert SCHEDULE.num_steps == 1000
    assert SCHEDULE.alphas_cumprod.dtype == jnp.float32
    np.testing.assert_allclose(SCHEDULE.alpha_bar(0), 0.9999, rtol=1e-7)
    np.testing.assert_allclose(SCHEDULE.alpha_bar(999), 4.0358e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "schedule, betas",
    [
        (dj.linear_schedule(), reference.linear_betas()),
        (dj.linear_schedule(7, 0.01, 0.3), reference.linear_betas(7, 0.01, 0.3)),
        (dj.linear_schedule(1, 0.25, 0.5), [0.25]),
        (dj.scaled_linear_schedule(), reference.scaled_linear_betas()),
        (dj.schedule_from_betas([0.5, 0.1, 0.9]), [0.5, 0.1, 0.9]),
    ],
    ids=["linear", "linear-7", "linear-1", "scaled_linear", "from_betas"],
)
def test_levels_are_the_product_rounded_once(schedule, betas):
    want = reference.cumulative_levels(betas)
    # Half a unit in the last place of float32: a product taken in float32 is off by far more.
    np.testing.assert_allclose(schedule.alphas_cumprod, want, rtol=2**-24 * 1.001)
    np.testing.assert_allclose(schedule.noise_variances, 1 - want, rtol=2**-24 * 1.001)


@pytest.mark.parametrize("num_steps", [1, 10, 1000, 4000])
def test_cosine_schedule_follows_its_formula_until_the_clip(num_steps):
    schedule = dj.cosine_schedule(num_steps)
    want = [reference.cosine_level((t + 1) / num_steps) for t in range(num_steps - 1)]
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], want, rtol=1e-6)
    before_last = reference.cosine_level((num_steps - 1) / num_steps)
    np.testing.assert_allclose(schedule.alphas_cumprod[-1], 0.001 * before_last, rtol=1e-5)


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, dj.scaled_linear_schedule(), dj.cosine_schedule(), dj.cosine_schedule(4)]
)
def test_levels_fall_strictly_inside_0_1(schedule):
    levels = np.asarray(schedule.alphas_cumprod)
    assert levels[0] < 1 and levels[-1] > 0 and np.all(np.diff(levels) < 0)


@given(betas=st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=40))
@settings(deadline=None, max_examples=40)
def test_any_betas_give_their_own_ratios(betas):
    levels = np.concatenate([[1.0], dj.schedule_from_betas(betas).alphas_cumprod])
    np.testing.assert_allclose(1 - levels[1:] / levels[:-1], betas, atol=2e-7)


# ------------------------------------------------------------------------------------- alpha_bar


@pytest.mark.parametrize("jitted", [False, True])
def test_alpha_bar_inside_at_clean_data_and_outside(jitted):
    alpha_bar = jax.jit(SCHEDULE.alpha_bar) if jitted else SCHEDULE.alpha_bar
    t = jnp.array([-(2**31), -1000, -2, -1, 0, 999, 1000, 1001, 2**31 - 1])
    got = np.asarray(alpha_bar(t))
    table = np.asarray(SCHEDULE.alphas_cumprod)
    nan = np.nan
    np.testing.assert_array_equal(got, [nan, nan, nan, 1.0, table[0], table[999], nan, nan, nan])
    assert got.dtype == np.float32


@pytest.mark.parametrize("t", [3, np.int64(3), np.array(3), jnp.uint8(3), jnp.int16(3)])
def test_alpha_bar_takes_any_integer(t):
    assert SCHEDULE.alpha_bar(t) == SCHEDULE.alphas_cumprod[3]


def test_the_largest_unsigned_index_is_not_clean_data():
    assert SCHEDULE.alpha_bar(jnp.uint8(255)) == SCHEDULE.alphas_cumprod[255]


@pytest.mark.parametrize("t", [0.0, jnp.zeros(3), True])
def test_alpha_bar_refuses_what_is_no_index(t):
    with refused(r"t must be integer indices .* got dtype"):
        SCHEDULE.alpha_bar(t)


def test_clean_data_is_no_alarm_to_debug_nans():
    with jax.debug_nans(True):
        assert SCHEDULE.alpha_bar(-1) == 1
        assert SCHEDULE.log_snr(-1) == math.inf
        with pytest.raises(FloatingPointError):
            SCHEDULE.alpha_bar(1000)


def test_alpha_bar_keeps_the_index_shape():
    t = jnp.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(SCHEDULE.alpha_bar(t), SCHEDULE.alphas_cumprod[t])


@pytest.mark.parametrize("table", ["its own", "none"])
def test_noise_variance_is_what_alpha_bar_leaves(table):
    levels = reference.cumulative_levels(reference.linear_betas())
    schedule = SCHEDULE if table == "its own" else dj.Schedule(SCHEDULE.alphas_cumprod)
    # The difference of float32 numbers near 1 is right to half their last digit, 6e-8.
    exact = dict(rtol=2**-24 * 1.001) if table == "its own" else dict(rtol=0, atol=6e-8)
    got = jax.jit(schedule.noise_variance)(jnp.arange(-1, 1001))
    np.testing.assert_allclose(got[1:-1], 1 - levels, **exact)
    assert got[0] == 0 and np.isnan(got[-1])


def test_log_snr_is_the_log_of_the_ratio():
    levels = reference.cumulative_levels(reference.linear_betas())
    want = [math.log(ab) - math.log1p(-ab) for ab in levels]
    np.testing.assert_allclose(
        jax.jit(SCHEDULE.log_snr)(jnp.arange(1000)), want, rtol=2e-6, atol=2e-7
    )
    assert SCHEDULE.log_snr(-1) == math.inf
    assert np.isnan(SCHEDULE.log_snr(1000))


def test_a_table_may_be_a_numpy_array():
    with unchecked():
        schedule = dj.Schedule(np.linspace(0.99, 0.01, 100, dtype=np.float32))
        level = schedule.alpha_bar(99)
    assert level == np.float32(0.01) and schedule.num_steps == 100


def test_a_learned_table_gets_the_whole_gradient():
    """d log_snr / d alpha_bar = 1 / (alpha_bar (1 - alpha_bar))."""
    ab = 0.3
    slope = jax.grad(lambda ab: dj.Schedule(ab[None]).log_snr(0))(jnp.asarray(ab))
    np.testing.assert_allclose(slope, 1 / (ab * (1 - ab)), rtol=1e-6)


def test_schedule_is_a_pytree():
    leaves, treedef = jax.tree.flatten(SCHEDULE)
    assert [leaf.shape for leaf in leaves] == [(1000,), (1000,)]
    assert isinstance(jax.tree.unflatten(treedef, leaves), dj.Schedule)


def test_schedule_passes_jit_vmap_and_grad_as_an_argument():
    level = jax.jit(lambda schedule, t: schedule.alpha_bar(t))
    assert level(SCHEDULE, 7) == SCHEDULE.alphas_cumprod[7]

    with unchecked():  # a stack of schedules is no Schedule until vmap takes its axis away
        stacked = jax.tree.map(lambda *x: jnp.stack(x), SCHEDULE, dj.cosine_schedule())
        got = jax.vmap(level, in_axes=(0, None))(stacked, 500)
    np.testing.assert_array_equal(got, stacked.alphas_cumprod[:, 500])

    gradient = jax.grad(level)(SCHEDULE, 7).alphas_cumprod
    np.testing.assert_array_equal(gradient, np.eye(1000)[7])
    np.testing.assert_array_equal(jax.grad(level)(SCHEDULE, -1).alphas_cumprod, 0)


def test_schedule_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEDULE.alphas_cumprod = jnp.ones(3)


# ------------------------------------------------------------------------------- the protocol


def test_a_schedule_is_a_noise_schedule():
    assert isinstance(SCHEDULE, dj.NoiseSchedule)
    assert not isinstance(np.asarray(SCHEDULE.alphas_cumprod), dj.NoiseSchedule)


def test_minus_one_is_clean_data_and_nothing_else_is():
    assert SCHEDULE.clean == -1
    t = jnp.arange(-1, 1000)
    np.testing.assert_array_equal(jax.jit(SCHEDULE.is_clean)(t), np.arange(-1, 1000) == -1)
    assert SCHEDULE.alpha_bar(SCHEDULE.clean) == 1 and SCHEDULE.noise_variance(SCHEDULE.clean) == 0


def test_timesteps_are_those_of_its_length():
    for spacing in SPACINGS:
        want = dj.ddim_timesteps(400, 7, spacing)
        np.testing.assert_array_equal(dj.linear_schedule(400).timesteps(7, spacing), want)
    np.testing.assert_array_equal(SCHEDULE.timesteps(5), [800, 600, 400, 200, 0])
    with refused(r"num_sample_steps must be an integer in \[1, 400\].*got 401"):
        dj.linear_schedule(400).timesteps(401)


def test_times_are_drawn_uniformly_over_the_noisy_ones():
    schedule = dj.linear_schedule(10)
    t = np.asarray(jax.jit(lambda k: schedule.draw(k, (100, 200)))(jax.random.key(0)))
    assert t.shape == (100, 200) and t.dtype == np.int32
    counts = np.bincount(t.ravel(), minlength=10)
    assert len(counts) == 10 and np.all(np.abs(counts - 2000) < 4 * np.sqrt(2000 * 0.9))
    one = schedule.draw(jax.random.key(1))
    assert one.shape == () and 0 <= one < 10


def test_mirror_turns_the_schedule_round():
    t = jnp.array([0, 1, 400, 999])
    np.testing.assert_array_equal(SCHEDULE.mirror(t), [999, 998, 599, 0])
    np.testing.assert_array_equal(SCHEDULE.mirror(SCHEDULE.mirror(t)), t)


@pytest.mark.parametrize(
    "schedule",
    [SCHEDULE, dj.scaled_linear_schedule(), dj.cosine_schedule(), zero_terminal_snr(SCHEDULE)],
    ids=["linear", "scaled_linear", "cosine", "zero"],
)
def test_nearest_is_the_index_with_the_nearest_log_snr(schedule):
    t = jnp.arange(1000)
    log_snr = jax.jit(schedule.log_snr)(t)
    nearest = jax.jit(schedule.nearest)
    np.testing.assert_array_equal(nearest(log_snr), t)

    exact = np.float64(log_snr)[:998]  # between two of these, a share of the way to the next
    share = np.random.default_rng(0).uniform(0.05, 0.45, 997)
    for shift, near in [(share, 0), (1 - share, 1)]:
        between = exact[:-1] + shift * np.diff(exact)
        np.testing.assert_array_equal(nearest(np.float32(between)), np.arange(997) + near)
    np.testing.assert_array_equal(
        nearest(np.float32([50, np.inf, -100, -np.inf])), [0, 0, 999, 999]
    )


# ---------------------------------------------------------------------------------- sub-sequences


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_timesteps_for_every_number_of_steps(spacing):
    for S in range(2, 1000):
        got = dj.ddim_timesteps(1000, S, spacing)
        assert got.dtype == np.int32 and got.shape == (S,)
        exact, denominator = reference.timesteps(1000, S, spacing)
        # The other tools' points are rounded to the nearest index, to either one half way.
        off = 0 if spacing in ("uniform", "quadratic") else denominator
        assert np.all(2 * np.abs(np.int64(got) * denominator - exact) <= off), S
        assert got[-1] >= 0 and got[0] <= 999
        steps = np.diff(got)
        assert np.all(steps <= 0) if spacing == "quadratic" else np.all(steps < 0), S


def test_the_sub_sequences_printed_in_the_specification():
    ten = {spacing: dj.ddim_timesteps(1000, 10, spacing).tolist() for spacing in SPACINGS}
    assert ten["uniform"] == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert ten["quadratic"] == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]
    assert ten["linspace"] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert ten["trailing"] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 1000, 4001])
def test_all_steps_are_each_index_once_and_one_step_starts_at_noise(num_steps, spacing):
    all_of_them = dj.ddim_timesteps(num_steps, num_steps, spacing)
    np.testing.assert_array_equal(all_of_them, range(num_steps - 1, -1, -1))
    assert dj.ddim_timesteps(num_steps, 1, spacing).tolist() == [num_steps - 1]


def test_one_step_from_noise_gives_the_mean_of_the_data_and_not_noise():
    """All data is the one image 0.5: eps is known, and its x0 from any x_T is that image."""
    schedule = dj.linear_schedule(1000)

    def eps_fn(x, t):
        ab = schedule.alpha_bar(t)
        return (x - jnp.sqrt(ab) * 0.5) / jnp.sqrt(1 - ab)

    x_T = jax.random.normal(jax.random.key(0), (100,))
    for spacing in SPACINGS:
        x = dj.sample(None, eps_fn, schedule, x_T, dj.ddim_timesteps(1000, 1, spacing))
        np.testing.assert_allclose(x, 0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("spacing", "steps", "start"),
    [("uniform", 501, 500), ("uniform", 2, 500), ("uniform", 3, 666), ("uniform", 690, 689)],
)
def test_a_sub_sequence_that_starts_short_of_noise_warns(spacing, steps, start):
    with pytest.warns(UserWarning, match=rf'starts at t = {start},.*spacing="trailing"') as caught:
        dj.linear_schedule(1000).timesteps(steps, spacing)
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
def test_others_do_not_warn():
    for S in [1, 4, 10, 20, 50, 100, 250, 333, 500, 701, 1000]:
        for spacing in SPACINGS:
            dj.ddim_timesteps(1000, S, spacing)
    for S in [2, 3, 501]:
        dj.ddim_timesteps(1000, S, "trailing")


def test_uniform_equals_the_published_range_when_steps_divide():
    for S in [2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000]:
        assert dj.ddim_timesteps(1000, S).tolist() == list(range(0, 1000, 1000 // S))[::-1]


@given(num_steps=st.integers(1, 5000), data=st.data(), spacing=st.sampled_from(SPACINGS))
@settings(deadline=None, max_examples=200)
def test_ddim_timesteps_for_any_schedule_length(num_steps, data, spacing):
    S = data.draw(st.integers(1, num_steps))
    got = dj.ddim_timesteps(num_steps, S, spacing)
    assert got.shape == (S,) and np.all(np.diff(got) <= 0)
    assert got[-1] >= 0 and got[0] < num_steps
    levels = np.linspace(0.99, 0.01, num_steps, dtype=np.float32)
    schedule = dj.Schedule(jnp.asarray(levels))
    np.testing.assert_array_equal(schedule.timesteps(S, spacing), got)
    np.testing.assert_array_equal(schedule.check_timesteps(got), got)


def test_ddim_timesteps_can_be_written_to_and_owns_its_memory():
    got = dj.ddim_timesteps(1000, 10)
    got[0] = 999
    assert dj.ddim_timesteps(1000, 10)[0] == 900


@pytest.mark.parametrize("S", [0, -1, 1001, 2.5, math.nan])
def test_step_counts_outside_the_schedule_are_refused(S):
    with refused(r"num_sample_steps must be an integer in \[1, 1000\].*got"):
        dj.ddim_timesteps(1000, S)


def test_unknown_spacing_is_refused_with_the_valid_names():
    with refused(r"uniform.*quadratic.*linspace.*trailing.*got 'cubic'"):
        dj.ddim_timesteps(1000, 10, "cubic")


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("betas", [[], 0.1, [[0.1, 0.2]]])
def test_betas_of_another_rank_are_refused(betas):
    with refused(r"betas must be a non-empty vector \(T,\); got shape"):
        dj.schedule_from_betas(betas)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.0], [-0.1, 0.2], [0.1, math.nan]])
def test_betas_outside_0_1_are_refused(betas):
    with refused(r"betas must lie in \(0, 1\); got values from"):
        dj.schedule_from_betas(betas)


@pytest.mark.parametrize("betas", [[1e-9], [0.1, 1e-9], [0.999] * 60])
def test_betas_that_float32_cannot_resolve_are_refused(betas):
    with refused("fall strictly from 1 towards 0 in float32"):
        dj.schedule_from_betas(betas)


@pytest.mark.parametrize(
    "make", [dj.linear_schedule, dj.scaled_linear_schedule, dj.cosine_schedule]
)
def test_a_schedule_needs_a_step(make):
    with refused("num_steps must be at least 1; got 0"):
        make(0)


def test_betas_of_the_wrong_sign_are_refused():
    with refused(r"must lie in \(0, 1\)"):
        dj.linear_schedule(10, -0.1, 0.2)
    with refused(r"must lie in \(0, 1\)"):
        dj.scaled_linear_schedule(10, -0.1, 0.2)


@pytest.mark.parametrize(
    "timesteps, message",
    [
        ([], "non-empty vector of integers"),
        (5, "non-empty vector of integers"),
        ([[5, 0]], "non-empty vector of integers"),
        ([5.0, 0.0], "non-empty vector of integers"),
        ([0, 5], "must descend.*got .0, 5.*Reverse"),
        ([5, 7, 0], "must descend"),
        ([1000, 0], r"must lie in \[0, 999\]"),
        ([5, -1], r"must lie in \[0, 999\]"),
    ],
)
def test_bad_timesteps_are_refused(timesteps, message):
    with refused(message):
        SCHEDULE.check_timesteps(timesteps)


@pytest.mark.parametrize("bad", [np.zeros(2), np.int32(5), np.zeros((1, 2), int)])
def test_traced_timesteps_of_another_rank_or_dtype_are_refused(bad):
    with refused("non-empty vector of integers"):
        jax.jit(SCHEDULE.check_timesteps)(bad)


@pytest.mark.parametrize("good", [[5], [5, 5, 0], (999, 0), np.array([3, 2]), jnp.array([3, 2])])
def test_good_timesteps_come_back_as_int32(good):
    got = SCHEDULE.check_timesteps(good)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.asarray(good))


# ----------------------------------------------------------------------------- zero terminal SNR


def without_signal_at_the_end(betas):
    """Lin et al. 2023, algorithm 1, in float64: the levels of the betas that it returns."""
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    level = root**2
    alphas = np.concatenate([level[:1], level[1:] / level[:-1]])
    return np.cumprod(1 - (1 - alphas))


@pytest.mark.parametrize(
    "schedule, betas",
    [
        (dj.linear_schedule(), reference.linear_betas()),
        (dj.linear_schedule(7, 0.01, 0.3), reference.linear_betas(7, 0.01, 0.3)),
        (dj.scaled_linear_schedule(), reference.scaled_linear_betas()),
        (dj.schedule_from_betas([0.5, 0.1, 0.9]), [0.5, 0.1, 0.9]),
        (dj.schedule_from_betas([0.3, 0.2]), [0.3, 0.2]),
    ],
    ids=["linear", "linear-7", "scaled_linear", "from_betas", "two"],
)
def test_zero_terminal_snr_is_algorithm_1(schedule, betas):
    got, want = zero_terminal_snr(schedule), without_signal_at_the_end(betas)
    # At the noisy end the shift cancels two digits of the float32 tables; at the clean end none.
    np.testing.assert_allclose(got.alphas_cumprod, want, rtol=2e-5)
    np.testing.assert_allclose(got.noise_variances, 1 - want, rtol=2**-23)


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, dj.cosine_schedule(), dj.Schedule(SCHEDULE.alphas_cumprod)]
)
def test_zero_terminal_snr_ends_in_noise_and_keeps_the_first_level(schedule):
    got = zero_terminal_snr(schedule)
    assert got.alpha_bar(999) == 0 and got.noise_variance(999) == 1
    assert got.log_snr(999) == -math.inf
    assert got.alpha_bar(0) == schedule.alpha_bar(0)
    assert got.noise_variance(0) == schedule.noise_variance(0)
    assert got.alphas_cumprod.dtype == got.noise_variances.dtype == jnp.float32


@given(betas=st.lists(st.floats(1e-5, 0.5), min_size=2, max_size=40))
@settings(deadline=None, max_examples=40)
def test_zero_terminal_snr_of_any_betas_falls_strictly_to_0(betas):
    before = np.asarray(dj.schedule_from_betas(betas).alphas_cumprod)
    after = np.asarray(zero_terminal_snr(dj.schedule_from_betas(betas)).alphas_cumprod)
    assert after[-1] == 0 and np.all(np.diff(after) < 0) and np.all(after <= before)


def test_zero_terminal_snr_needs_a_first_and_a_last_step():
    with refused("schedule must have at least 2 steps.* got 1"):
        zero_terminal_snr(dj.linear_schedule(1))
