"""The scans: the peers' trajectories, exactly S calls, one trace, keys, dtypes and gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from counting import visited
from refusals import refused, unchecked

import ddim_jax as dj
from ddim_jax.schedule import Spacing

SCHEDULE = dj.linear_schedule()
TABLE = np.float64(SCHEDULE.alphas_cumprod)
KEY = jax.random.key(0)
SPACINGS = Spacing.__args__
X_T = jax.random.normal(jax.random.key(9), (2, 16, 16, 3))
TIMESTEPS = dj.ddim_timesteps(1000, 6)


def eps_fn(x, t):
    """The network of the golden files."""
    return jnp.sqrt(1 - SCHEDULE.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


def eps_fn_float64(x, t):
    return np.sqrt(1 - TABLE[t]) * x + 0.1 * np.sin(3 * x + t / 100)


# ------------------------------------------------------- golden trajectories, with recorded noise


class Recorded(NamedTuple):
    x: jax.Array
    x0: jax.Array
    i: jax.Array


def recorded(kind, noise, eta):
    """A sampler of one's own on the public steps: it adds the noise it is given, in order."""

    def init(x_T):
        return Recorded(x_T, jnp.zeros_like(x_T), jnp.int32(0))

    def step(key, state, eps_fn, schedule, t, t_prev):
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        eps, z = eps_fn(state.x, t), noise[state.i]
        x0 = dj.epsilon_to_x0(eps, state.x, ab)
        match kind:
            case "eta":
                x = dj.ddim_step(state.x, eps, ab, ab_prev, eta=eta, noise=z)
            case "sigma_hat":
                x = dj.sigma_hat_step(state.x, eps, ab, ab_prev, noise=z)
                x0 = dj.clip_x0(eps_fn, schedule)(state.x, t).x0
            case "clip_data":
                pair = dj.clip_x0_keep_eps(eps_fn, schedule)(state.x, t)
                x = dj.ddim_step(state.x, pair, ab, ab_prev, eta=eta, noise=z)
                x0 = pair.x0
            case variance:
                x = dj.ddpm_step(state.x, eps, ab, ab_prev, noise=z, variance=variance)
        return Recorded(x, x0, state.i + 1)

    return dj.Sampler(init, step)


@functools.partial(jax.jit, static_argnums=0)
def replay(kind, x_T, timesteps, noise, eta):
    sampler = recorded(kind, noise, eta)
    return dj.sample_trajectory(None, eps_fn, SCHEDULE, x_T, timesteps, sampler)


@functools.partial(jax.jit, static_argnums=(0, 4))
def draw(sampler, key, x_T, timesteps, network=eps_fn):
    return dj.sample_trajectory(key, network, SCHEDULE, x_T, timesteps, sampler)


@jax.jit
def draw_eta(key, x_T, timesteps, eta, sigma_hat):
    sampler = dj.ddim_or_sigma_hat(eta, sigma_hat)
    return dj.sample_trajectory(key, eps_fn, SCHEDULE, x_T, timesteps, sampler)


DDIM, DDPM, SIGMA_HAT = dj.ddim(), dj.ddpm(), dj.sigma_hat()
KEEPS_EPS = dj.clip_x0_keep_eps(eps_fn, SCHEDULE)

GRIDS = [("uniform", 10), ("uniform", 20), ("uniform", 50), ("quad", 10), ("quad", 20)]


@pytest.mark.parametrize("eta", ["0.0", "0.2", "0.5", "1.0", "sigma_hat"])
@pytest.mark.parametrize("spacing, S", GRIDS)
def test_the_papers_trajectories(golden, spacing, S, eta):
    stored = golden("sampler_trajectories.npz")
    want = {k: stored[f"{spacing}_{S}_{eta}/{k}"] for k in ("x_mid", "x0_pred_first", "x_0")}
    x_T, noise, ascending = (
        stored[f"{spacing}_{S}_{eta}/{k}"] for k in ("x_T", "noise", "timesteps")
    )
    timesteps = dj.ddim_timesteps(1000, S, {"quad": "quadratic"}.get(spacing, spacing))
    np.testing.assert_array_equal(timesteps[::-1], ascending)

    kind, number = ("eta", float(eta)) if eta != "sigma_hat" else (eta, 0.0)
    runs = [replay(kind, x_T, timesteps, noise, number)]
    if eta == "0.0":
        runs.append(draw(DDIM, None, x_T, timesteps))
    for states, x0s in runs:
        np.testing.assert_allclose(states[S // 2], want["x_mid"], atol=1e-4)
        np.testing.assert_allclose(x0s[0], want["x0_pred_first"], atol=1e-4)
        np.testing.assert_allclose(states[-1], want["x_0"], atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("S", [10, 50])
@pytest.mark.parametrize("clip", [0, 1])
def test_the_trajectories_of_diffusers(golden, clip, S, eta):
    stored = golden("diffusers_ddim.npz")
    x_T, noise, timesteps, x_0 = (
        stored[f"ddim_clip{clip}_{S}_{eta}/{k}"] for k in ("x_T", "noise", "timesteps", "x_0")
    )
    np.testing.assert_array_equal(dj.ddim_timesteps(1000, S), timesteps)
    states, _ = replay("clip_data" if clip else "eta", x_T, timesteps, noise, eta)
    np.testing.assert_allclose(states[-1], x_0, atol=1e-4)
    if eta == 0:
        states, _ = draw(DDIM, None, x_T, timesteps, KEEPS_EPS if clip else eps_fn)
        np.testing.assert_allclose(states[-1], x_0, atol=1e-4)


def test_the_samplers_are_the_steps_with_standard_normal_noise():
    """The noise is read off one run in float64; fed back, it gives every other sampler's run."""
    states, _ = draw(DDPM, KEY, X_T, TIMESTEPS)
    noise = np.zeros((6, *X_T.shape))
    for i, (t, t_prev) in enumerate(reference.transitions(TIMESTEPS)[:-1]):
        ab, ab_prev = TABLE[t], reference.level(TABLE, t_prev)
        x = np.float64(states[i])
        mean = reference.ddim_step(x, eps_fn_float64(x, t), ab, ab_prev, 1.0)
        noise[i] = (states[i + 1] - mean) / reference.ddim_sigma(ab, ab_prev, 1.0)

    z = noise[:-1].reshape(5, -1)
    n = z.shape[1]
    assert np.all(np.abs(z.mean(1)) < 4 / np.sqrt(n))
    assert np.all(np.abs(z @ z.T / n - np.eye(5)) < 4 * np.sqrt(2 / n))
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / z.size)

    noise = np.float32(noise)
    for kind, eta, got in [
        ("eta", 0.3, draw_eta(KEY, X_T, TIMESTEPS, 0.3, False)),
        ("eta", 1.0, draw_eta(KEY, X_T, TIMESTEPS, 1.0, False)),
        ("sigma_hat", 0.0, draw_eta(KEY, X_T, TIMESTEPS, 0.0, True)),
        ("sigma_hat", 0.0, draw(SIGMA_HAT, KEY, X_T, TIMESTEPS)),
        ("fixed_large", 0.0, draw(dj.ddpm("fixed_large"), KEY, X_T, TIMESTEPS)),
        ("clip_data", 0.5, draw(dj.ddim(0.5), KEY, X_T, TIMESTEPS, KEEPS_EPS)),
    ]:
        for a, b in zip(got, replay(kind, X_T, TIMESTEPS, noise, eta), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3, err_msg=kind)


def test_clip_data_clips_to_the_bounds_it_is_given():
    network = dj.clip_x0_keep_eps(eps_fn, SCHEDULE, low=0.0, high=0.25)
    states, x0s = draw(DDIM, None, X_T, TIMESTEPS, network)
    # The last step lands on the clipped prediction itself: in the bounds, and on both of them.
    for x in (states[-1], x0s[-1]):
        np.testing.assert_allclose((x.min(), x.max()), (0.0, 0.25), atol=1e-6)


def test_ddpm_with_the_small_variance_is_ddim_with_eta_1():
    states, x0s = draw(DDPM, KEY, X_T, TIMESTEPS)
    want, want_x0s = draw_eta(KEY, X_T, TIMESTEPS, 1.0, False)
    np.testing.assert_allclose(states, want, atol=2e-5)
    np.testing.assert_allclose(x0s, want_x0s, atol=2e-4)


def test_any_descending_list_is_a_sub_sequence():
    timesteps = [997, 640, 640, 333, 3, 1]
    states, _ = draw(DDIM, None, X_T, np.array(timesteps))
    want = reference.trajectory(
        eps_fn_float64, TABLE, X_T, timesteps, lambda i, *args: reference.ddim_step(*args)
    )
    np.testing.assert_allclose(states, want, atol=2e-4)


def test_a_trajectory_holds_the_states_and_what_each_step_saw():
    states, x0s = draw_eta(KEY, X_T, TIMESTEPS, 0.5, False)
    assert states.shape == (7, *X_T.shape) and x0s.shape == (6, *X_T.shape)
    np.testing.assert_array_equal(states[0], X_T)
    x_0 = jax.jit(lambda: dj.sample(KEY, eps_fn, SCHEDULE, X_T, TIMESTEPS, dj.ddim(0.5)))()
    np.testing.assert_allclose(states[-1], x_0, atol=1e-6)
    np.testing.assert_allclose(states[-1], x0s[-1], atol=1e-6)  # the last step goes to clean data
    for i, t in enumerate(TIMESTEPS):
        x = np.float64(states[i])
        want = reference.convert("epsilon", "x0", eps_fn_float64(x, t), x, TABLE[t])
        np.testing.assert_allclose(x0s[i], want, atol=1e-4)


# --------------------------------------------------------------- exactly S calls, finite outputs


class Tally(NamedTuple):
    state: dj.SamplerState
    visits: jax.Array

    @property
    def x(self):
        return self.visits  # so that `sample` hands out the count


def tallied(sampler):
    """The sampler, whose result is how often each of the 1000 indices was given to the network."""

    def step(key, tally, eps_fn, schedule, t, t_prev):
        indices = []

        def spy(x, t):
            indices.append(t)
            return eps_fn(x, t)

        state = sampler.step(key, tally.state, spy, schedule, t, t_prev)
        return Tally(state, tally.visits.at[jnp.stack(indices)].add(1))

    return dj.Sampler(lambda x_T: Tally(sampler.init(x_T), jnp.zeros(1000, int)), step)


def check_calls(S):
    """In one compiled program for each S, every index of every spacing's list, once, no other."""
    x_T = jnp.ones(2)
    run = jax.jit(lambda ts: dj.sample(KEY, eps_fn, SCHEDULE, x_T, ts, tallied(DDIM)))
    draw = jax.jit(lambda ts: dj.sample(KEY, eps_fn, SCHEDULE, x_T, ts))
    for spacing in SPACINGS:
        timesteps = dj.ddim_timesteps(1000, S, spacing)
        with unchecked():  # what comes out is no data
            visits = run(timesteps)
        np.testing.assert_array_equal(visits, np.bincount(timesteps, minlength=1000))
        assert visits.sum() == S and np.isfinite(draw(timesteps)).all()


@pytest.mark.parametrize("S", [1, 2, 7, 100, 333, 1000])
def test_exactly_one_network_call_for_each_time_index(S):
    check_calls(S)


@pytest.mark.slow
def test_exactly_s_calls_for_every_s():
    for S in range(1, 1001):
        check_calls(S)


@pytest.mark.parametrize(
    "sampler", [DDIM, dj.ddim(0.5), SIGMA_HAT, DDPM, dj.ddim_or_sigma_hat(0.5, True)]
)
@pytest.mark.parametrize("clips", [False, True])
def test_the_network_is_called_along_the_list_and_nowhere_else(sampler, clips):
    timesteps = [997, 640, 640, 3]
    x_T = jnp.ones(2)

    def wrap(f):
        return dj.clip_x0_keep_eps(f, SCHEDULE) if clips else f

    for run in (dj.sample, lambda *args: dj.sample_trajectory(*args)[0]):
        calls = visited(lambda f, r=run: r(KEY, wrap(f), SCHEDULE, x_T, timesteps, sampler), eps_fn)
        assert calls == timesteps


def test_encoding_calls_the_network_once_a_step_and_never_at_clean_data():
    timesteps = dj.ddim_timesteps(1000, 10, "trailing")
    # x_0 is met at the lowest index, as if it were there already; then every index but the last.
    want = [timesteps[-1], *timesteps[:0:-1]]
    assert visited(lambda f: dj.encode(f, SCHEDULE, jnp.ones(2), timesteps), eps_fn) == want


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_number_of_steps_and_every_spacing_is_finite(eta):
    """All 4000 at once: a short list is led by repeats of its first index, which leave x alone."""
    lists = [dj.ddim_timesteps(1000, S, spacing) for spacing in SPACINGS for S in range(1, 1001)]
    padded = np.stack([np.pad(ts, (1000 - len(ts), 0), mode="edge") for ts in lists])
    x_T = jnp.array([-3.0, -0.2, 0.9, 2.5])
    run = jax.jit(
        jax.vmap(lambda ts: dj.sample(KEY, eps_fn, SCHEDULE, x_T, ts, dj.ddim(jnp.float32(eta))))
    )
    x_0 = np.asarray(run(padded))
    assert np.isfinite(x_0).all() and np.abs(x_0).max() < 50
    if eta == 0:
        for i in (0, 49, 1009, 2499, 3110):  # the padding was harmless
            want = reference.trajectory(
                eps_fn_float64, TABLE, x_T, lists[i], lambda i, *args: reference.ddim_step(*args)
            )
            np.testing.assert_allclose(x_0[i], want[-1], atol=1e-3)


# ------------------------------------------------------------------------- one compiled program


def test_one_trace_for_each_number_of_steps_and_shape():
    traces = []

    @jax.jit
    def run(key, x_T, timesteps, eta, sigma_hat):
        traces.append((x_T.shape, timesteps.shape))
        sampler = dj.ddim_or_sigma_hat(eta, sigma_hat)
        return dj.sample(key, eps_fn, SCHEDULE, x_T, timesteps, sampler)

    for S, x_T in [(3, X_T), (5, X_T), (5, X_T[:1])]:
        for eta in (0.0, 0.2, 0.5, 1.0):
            for spacing in ("uniform", "quadratic"):
                run(KEY, x_T, dj.ddim_timesteps(1000, S, spacing), eta, False)
        run(jax.random.key(5), x_T, dj.ddim_timesteps(1000, S), 0.0, True)
    assert len(traces) == 3 and len(set(traces)) == 3


def sines(program, *args):
    """How often the compiled program holds the one sine of the network."""
    return jax.jit(program).lower(*args).as_text().count("stablehlo.sine")


def test_the_network_stands_once_in_the_program_of_all_rows():
    def run(sampler):
        return dj.sample(KEY, eps_fn, SCHEDULE, X_T, TIMESTEPS, sampler)

    assert sines(lambda eta, flag: run(dj.ddim_or_sigma_hat(eta, flag)), 0.5, True) == 1
    assert sines(lambda eta: run(dj.ddim(eta)), 0.5) == 1
    assert sines(lambda: run(SIGMA_HAT)) == 1
    assert sines(lambda: run(dj.heun())) == 2  # it can tell


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_the_flag_chooses_between_ddim_and_sigma_hat(eta):
    """Known or traced, the flag gives what the sampler of that name gives."""
    known = jax.jit(
        lambda flag: draw(dj.ddim_or_sigma_hat(eta, flag), KEY, X_T, TIMESTEPS),
        static_argnums=0,
    )
    for flag, sampler in [(False, dj.ddim(eta)), (True, SIGMA_HAT)]:
        want = draw(sampler, KEY, X_T, TIMESTEPS)
        for got in (known(flag), draw_eta(KEY, X_T, TIMESTEPS, eta, flag)):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-5)


def test_traced_eta_and_flag_equal_known_ones():
    for sampler, eta, sigma_hat in [
        (DDIM, 0.0, False),
        (dj.ddim(0.4), 0.4, False),
        (SIGMA_HAT, 0.7, True),
    ]:
        traced = draw_eta(KEY, X_T, TIMESTEPS, eta, sigma_hat)
        known = draw(sampler, KEY, X_T, TIMESTEPS)
        for got, want in zip(traced, known, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-4)
        if not sigma_hat:
            run = jax.jit(lambda eta: draw(dj.ddim(eta), KEY, X_T, TIMESTEPS))
            for got, want in zip(run(eta), known, strict=True):
                np.testing.assert_allclose(got, want, atol=2e-4)


def test_a_flag_may_be_mapped():
    flags = jnp.array([False, True])
    got, _ = jax.vmap(lambda flag: draw_eta(KEY, X_T, TIMESTEPS, 0.4, flag))(flags)
    for i, sampler in enumerate([dj.ddim(0.4), SIGMA_HAT]):
        np.testing.assert_allclose(got[i], draw(sampler, KEY, X_T, TIMESTEPS)[0], atol=2e-5)


def test_known_arrays_are_known_numbers():
    want = dj.sample(None, eps_fn, SCHEDULE, X_T, [500, 0], dj.ddim(0.0))
    for sampler in (dj.ddim(jnp.float32(0.0)), dj.ddim(np.float64(0.0)), dj.ddim()):
        got = dj.sample(None, eps_fn, SCHEDULE, X_T, [500, 0], sampler)
        np.testing.assert_array_equal(got, want)


def test_memory_does_not_grow_with_the_number_of_steps():
    """Nor does it with a key for each image; only the list of indices itself has a length S."""
    keys, x_T = jax.random.split(KEY, 64), jnp.zeros((64, 8, 8))

    def working_memory(run, S):
        timesteps = dj.ddim_timesteps(1000, S)
        program = jax.jit(lambda k, x: run(k, eps_fn, SCHEDULE, x, timesteps, dj.ddim(0.5)))
        memory = program.lower(keys, x_T).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    short, long = (working_memory(dj.sample, S) for S in (10, 1000))
    assert long - short < 4 * 4 * 1000
    assert working_memory(dj.sample_trajectory, 20) > short + 20 * x_T.nbytes  # it can tell


# --------------------------------------------------------------------------------- random keys


def test_an_image_depends_on_its_own_key_alone():
    x_T, keys = dj.initial_noise(KEY, np.arange(4), (4, 3))
    run = jax.jit(lambda key, x: dj.sample(key, eps_fn, SCHEDULE, x, TIMESTEPS, dj.ddim(1.0)))
    batch = run(keys, x_T)
    np.testing.assert_allclose(run(keys[2:3], x_T[2:3]), batch[2:3], atol=1e-6)
    shuffled = jnp.array([3, 1, 0, 2])
    np.testing.assert_allclose(run(keys[shuffled], x_T[shuffled]), batch[shuffled], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run)(keys, x_T), batch, atol=1e-6)  # one image each
    assert len(np.unique(np.asarray(batch[:, 0, 0]))) == 4


def test_keys_decide_the_noise():
    one = draw_eta(KEY, X_T, TIMESTEPS, 1.0, False)[0][-1]
    np.testing.assert_array_equal(draw_eta(KEY, X_T, TIMESTEPS, 1.0, False)[0][-1], one)
    other = draw_eta(jax.random.key(1), X_T, TIMESTEPS, 1.0, False)[0][-1]
    assert np.mean(one == other) < 0.01
    # Without noise the key is no matter, and may be left out.
    for key in (KEY, jax.random.key(1)):
        np.testing.assert_array_equal(
            draw(DDIM, key, X_T, TIMESTEPS)[0], draw(DDIM, None, X_T, TIMESTEPS)[0]
        )


def test_old_style_keys_draw_the_same():
    got, _ = draw_eta(jax.random.PRNGKey(3), X_T, TIMESTEPS, 1.0, False)
    want, _ = draw_eta(jax.random.key(3), X_T, TIMESTEPS, 1.0, False)
    np.testing.assert_array_equal(got, want)
    run = jax.jit(lambda key: dj.sample(key, eps_fn, SCHEDULE, X_T, [700, 0], DDPM))
    old, new = (jax.random.split(key) for key in (jax.random.PRNGKey(3), jax.random.key(3)))
    np.testing.assert_array_equal(run(old), run(new))


def test_no_key_is_used_twice():
    x_T = jnp.zeros((2, 3))
    with jax.debug_key_reuse(True):
        for sampler in (DDPM, SIGMA_HAT, dj.ddim_or_sigma_hat(0.5, False)):
            for number in ((), (2,)):
                keys = jax.random.split(jax.random.key(0), number)
                jax.jit(lambda k, s=sampler: dj.sample(k, eps_fn, SCHEDULE, x_T, [9, 5, 0], s))(
                    keys
                )
        with pytest.raises(jax.errors.KeyReuseError):  # it can tell
            jax.jit(lambda k: jax.random.normal(k) + jax.random.normal(k))(jax.random.key(0))


def test_hardware_keys_keep_images_apart():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    x_T = jnp.zeros((3, 4))
    run = jax.jit(lambda k, x: dj.sample(k, eps_fn, SCHEDULE, x, [900, 500, 0], DDPM))
    np.testing.assert_allclose(run(keys[1:2], x_T[:1])[0], run(keys, x_T)[1], atol=1e-6)


# ---------------------------------------------------------------------- shapes, dtypes, x64


@pytest.mark.parametrize("shape", [(), (5,), (2, 4, 4, 1), (1, 2, 1, 3, 1)])
def test_any_shape(shape):
    x_T = jax.random.normal(KEY, shape)
    x_0 = jax.jit(lambda x: dj.sample(KEY, eps_fn, SCHEDULE, x, [700, 0], dj.ddim(0.5)))(x_T)
    assert x_0.shape == shape and np.isfinite(x_0).all()
    latent = jax.jit(lambda x: dj.encode(eps_fn, SCHEDULE, x, [700, 0]))(x_0)
    assert latent.shape == shape and np.isfinite(latent).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_data_keeps_its_dtype_with_float32_levels(dtype):
    seen = []

    def spy(x, t):
        seen.append((x.dtype, SCHEDULE.alpha_bar(t).dtype))
        return eps_fn(x, t).astype(dtype)

    x_T = X_T.astype(dtype)
    run = jax.jit(lambda x: dj.sample_trajectory(KEY, spy, SCHEDULE, x, TIMESTEPS, dj.ddim(0.5)))
    states, x0s = run(x_T)
    assert states.dtype == x0s.dtype == dtype
    assert set(seen) == {(jnp.dtype(dtype), jnp.dtype(jnp.float32))}
    want, _ = draw_eta(KEY, x_T.astype(jnp.float32), TIMESTEPS, 0.5, False)
    np.testing.assert_allclose(np.float32(states), want, atol=0.1)
    assert jax.eval_shape(lambda x: dj.encode(spy, SCHEDULE, x, TIMESTEPS), x_T).dtype == dtype


def test_a_float32_network_may_serve_bfloat16_data():
    got = dj.sample(KEY, eps_fn, SCHEDULE, X_T.astype(jnp.bfloat16), [700, 0], dj.ddim(0.5))
    assert got.dtype == jnp.bfloat16


def test_float64_stays_float64():
    timesteps = dj.ddim_timesteps(1000, 10)
    with jax.enable_x64(True):
        schedule = dj.Schedule(jnp.asarray(TABLE))
        x_T = jax.random.normal(KEY, (5,), jnp.float64)

        def network(x, t):
            return jnp.sqrt(1 - schedule.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)

        x_0 = dj.sample(None, network, schedule, x_T, timesteps)
        mixed = dj.sample(KEY, eps_fn, SCHEDULE, x_T, timesteps, dj.ddim(0.5))
        single = dj.sample(KEY, eps_fn, SCHEDULE, jnp.float32(x_T), timesteps, dj.ddim(0.5))
        assert x_0.dtype == mixed.dtype == jnp.float64 and single.dtype == jnp.float32
        want = reference.trajectory(
            eps_fn_float64, TABLE, x_T, timesteps, lambda i, *args: reference.ddim_step(*args)
        )
        np.testing.assert_allclose(x_0, want[-1], rtol=1e-12)


# -------------------------------------------------------------------------------- vmap and grad


def test_vmap_over_eta():
    etas = jnp.array([0.0, 0.5, 1.0])
    run = functools.partial(draw_eta, KEY, X_T, TIMESTEPS)
    got, _ = jax.vmap(run, in_axes=(0, None))(etas, False)
    for i, eta in enumerate(etas):
        np.testing.assert_allclose(got[i], run(eta, False)[0], atol=1e-5)


def test_eta_for_each_image():
    got, _ = draw_eta(KEY, X_T, TIMESTEPS, jnp.array([0.0, 1.0]), False)
    for i, eta in enumerate([0.0, 1.0]):
        want, _ = draw_eta(KEY, X_T, TIMESTEPS, eta, False)
        np.testing.assert_allclose(got[-1, i], want[-1, i], atol=1e-5)


def test_gradients_through_the_sampler_equal_finite_differences():
    timesteps = dj.ddim_timesteps(1000, 4)
    with jax.enable_x64(True):
        x_T = jax.random.normal(KEY, (3,), jnp.float64)

        @jax.jit
        def total(x_T, eta, weight, table):
            schedule = dj.Schedule(table)

            def network(x, t):
                return weight * jnp.sqrt(1 - schedule.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x)

            return dj.sample(KEY, network, schedule, x_T, timesteps, dj.ddim(eta)).sum()

        at = (x_T, jnp.float64(0.6), jnp.float64(0.8), jnp.asarray(TABLE))
        grads = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*at)
        assert all(np.isfinite(g).all() for g in grads)
        nudges = [(0, jnp.eye(3)[1]), (1, 1.0), (2, 1.0), (3, jnp.eye(1000)[500])]
        for i, direction in nudges:
            h = 1e-6
            up, down = (list(at) for _ in range(2))
            up[i], down[i] = at[i] + h * direction, at[i] - h * direction
            want = (total(*up) - total(*down)) / (2 * h)
            np.testing.assert_allclose(jnp.vdot(grads[i], direction), want, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gradients_are_finite_at_the_ends_of_the_family(eta):
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(x_T, eta, schedule):
        x_0 = dj.sample(KEY, eps_fn, schedule, x_T, [999, 500, 1, 0], dj.ddim(eta))
        return jnp.square(x_0).sum()

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(X_T, eta, SCHEDULE)))


def test_gradients_through_encode_and_sigma_hat_are_finite():
    def encoded(x, schedule):
        return dj.encode(eps_fn, schedule, x, [999, 500, 0]).sum()

    def clipped(x, schedule):
        return dj.sample(KEY, eps_fn, schedule, x, [999, 500, 0], SIGMA_HAT).sum()

    for total in (encoded, clipped):
        grads = jax.jit(jax.grad(total, argnums=(0, 1)))(X_T, SCHEDULE)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_nothing_alarms_jax_at_its_strictest():
    """Users debug with these flags: no NaN on the way, no rank promoted, no dtype by surprise."""

    def total(x_T):
        latent = dj.encode(eps_fn, SCHEDULE, x_T, [900, 0])
        noisy = dj.sample(KEY, eps_fn, SCHEDULE, latent, [900, 0], dj.ddim(1.0))
        clipped = dj.sample(KEY, eps_fn, SCHEDULE, noisy, [900, 0], SIGMA_HAT)
        return jnp.square(clipped).sum() + dj.eps_loss(KEY, eps_fn, SCHEDULE, x_T[0, :, :, 0]).sum()

    def eps_fn(x, t):
        return 0.5 * x

    with (
        jax.debug_nans(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.checking_leaks(),
    ):
        value, gradient = jax.value_and_grad(total)(X_T)
    assert np.isfinite(value) and np.any(gradient != 0)


# ------------------------------------------------------------------------------------ refusals


def sample(*, key=KEY, network=eps_fn, x_T=X_T, timesteps=(5, 0), sampler=DDIM):
    return dj.sample(key, network, SCHEDULE, x_T, timesteps, sampler)


@pytest.mark.parametrize(
    "timesteps, message",
    [
        ([], "non-empty vector of integers"),
        ([0, 5], "timesteps must descend.*Reverse"),
        ([1000, 0], r"timesteps must lie in \[0, 999\], the trained schedule"),
        ([5, -1], r"timesteps must lie in \[0, 999\]"),
        (np.array([5.0, 0.0]), "vector of integers.*dtype float64"),
        (7, "vector of integers"),
    ],
)
def test_bad_timesteps_are_refused(timesteps, message):
    with refused(message):
        sample(timesteps=timesteps)
    with refused(message):
        dj.sample_trajectory(KEY, eps_fn, SCHEDULE, X_T, timesteps)
    with refused(message):
        dj.encode(eps_fn, SCHEDULE, X_T, timesteps)


def test_traced_timesteps_outside_the_schedule_give_nan():
    run = jax.jit(lambda ts: sample(timesteps=ts))
    assert np.isfinite(run(jnp.array([999, 0]))).all()
    assert np.isnan(run(jnp.array([1000, 0]))).all()
    assert np.isnan(run(jnp.array([999, -2]))).all()


def test_eta_below_zero_is_refused_when_the_sampler_is_built():
    for make in (dj.ddim, lambda eta: dj.ddim_or_sigma_hat(eta, True)):
        for eta in (-0.5, float("nan"), jnp.array([0.0, -1.0])):
            with refused(r"eta must be at least 0 \(0 is DDIM, 1 is DDPM\); got"):
                make(eta)


def test_other_bad_arguments_are_refused_when_the_sampler_is_built():
    with refused("variance must be one of .*fixed_small.*fixed_large.*; got 'fixed'"):
        dj.ddpm("fixed")
    with refused(r"is_sigma_hat must be one flag, true or false; got Array"):
        dj.ddim_or_sigma_hat(0.0, jnp.array([True, False]))


@pytest.mark.parametrize(
    "sampler",
    [dj.ddim(0.1), SIGMA_HAT, DDPM, dj.ddim_or_sigma_hat(0.0, False)],
)
def test_a_sampler_that_draws_noise_needs_a_key(sampler):
    for key in (None, 0):
        with refused(r"key must be a PRNG key, such as jax.random.key\(0\); got"):
            sample(key=key, sampler=sampler)


def test_a_traced_eta_needs_a_key_too():
    with refused("key must be a PRNG key"):
        jax.jit(lambda eta: sample(key=None, sampler=dj.ddim(eta)))(0.0)


def test_a_wrong_number_of_keys_is_refused():
    for sampler in (DDIM, DDPM):
        with refused(r"key must be one key, or one for each of the \(2,\) images; got \(3,\)"):
            sample(key=jax.random.split(KEY, 3), sampler=sampler)


def test_a_network_of_another_shape_is_refused():
    for network in (lambda x, t: x[:1], lambda x, t: jnp.concatenate([x, x], -1)):
        for sampler in (DDIM, SIGMA_HAT, DDPM):
            with refused(r"eps_fn must return an array of x's shape \(2, 16, 16, 3\); got"):
                sample(network=network, sampler=sampler)
        with refused(r"eps_fn must return an array of x.s shape \(2, 16, 16, 3\); got"):
            sample(network=dj.clip_x0_keep_eps(network, SCHEDULE))
        with refused("eps_fn must return an array of x's shape"):
            dj.encode(network, SCHEDULE, X_T, [5, 0])


def test_integer_data_is_refused():
    image = jnp.zeros((2, 8, 8), jnp.uint8)
    with refused(r"x_T must be floating point, data in \[-1, 1\]; got dtype uint8.*127.5"):
        sample(x_T=image)
    with refused("x_0 must be floating point"):
        dj.encode(eps_fn, SCHEDULE, image, [5, 0])


def test_what_is_no_sampler_or_no_array_is_refused():
    with refused("sampler must be a Sampler.*Call it first"):
        sample(sampler=dj.ddim)
    with refused("x_T must be an array; got list"):
        sample(x_T=[0.0, 1.0])
    with refused("eps_fn must return an array or a Prediction of two; got tuple"):
        sample(network=lambda x, t: (x, x))
    with refused("sampler must be one of ddim, sigma_hat.*got 'euler'"):
        dj.named_sampler("euler")


def by_hand(cut):
    """The network whose x0_hat, by eq. 9, is cut by `cut(x0, t)`; eps goes with it."""

    def clipped(x, t):
        signal, noise = jnp.sqrt(SCHEDULE.alpha_bar(t)), jnp.sqrt(1 - SCHEDULE.alpha_bar(t))
        return (x - signal * cut((x - noise * eps_fn(x, t)) / signal, t)) / noise

    return clipped


clips_by_hand = by_hand(lambda x0, t: jnp.clip(x0, -1, 1))
"""What a user writes without `clip_x0`."""
CUTS_BY_HAND = {
    "channels first": lambda x0, t: jnp.clip(x0.T, -1, 1).T,
    "flat": lambda x0, t: jnp.clip(x0.reshape(-1), -1, 1).reshape(x0.shape),
    "each image": lambda x0, t: jax.vmap(lambda a: jnp.clip(a, -1, 1))(x0),
    "maxima alone": lambda x0, t: -jnp.maximum(-jnp.maximum(x0, -1.0), -1.0),
    "but at the lowest time": lambda x0, t: jnp.where(t > 0, jnp.clip(x0, -1, 1), x0),
    "to [0, 1]": lambda x0, t: jnp.clip(x0, 0, 1),
    "and divided": lambda x0, t: jnp.clip(x0, -9, 9) / 9,
}


def cut_networks(clip):
    """One that clips, as users hand it on: the wrapper's own type is seen in the first alone."""
    clipped = clip(eps_fn, SCHEDULE)

    def in_a_function(x, t):
        return clipped(x, t)

    return {
        "itself": clipped,
        "in a function": in_a_function,
        "in jit": jax.jit(clipped),
        "in guided": dj.guided(clipped, clipped, 2.0),
        "under remat": jax.checkpoint(in_a_function),
    }


both_encodings = pytest.mark.parametrize("encode", [dj.encode, dj.encode_fixed_point])


@both_encodings
def test_encoding_a_clipped_network_is_refused(encode):
    cut = {clip: cut_networks(clip) for clip in (dj.clip_x0, dj.clip_x0_keep_eps)}
    for name, clipped in [pair for of in cut.values() for pair in of.items()]:
        for wrap in (lambda f: f, jax.jit):  # by itself, and where its input is traced
            with refused("eps_fn must not clip its data prediction when encoding.*Pass the netw"):
                wrap(lambda x, f=clipped: encode(f, SCHEDULE, x, [5, 0]))(X_T)
                pytest.fail(name)
    for network in (clips_by_hand, dj.guided(clips_by_hand, clips_by_hand, 2.0)):
        with refused("eps_fn must not clip its data prediction.*got a network that does"):
            encode(network, SCHEDULE, X_T, [5, 0])
        inside = jax.jit(lambda x, f=network: encode(f, SCHEDULE, x, [5, 0]))(X_T)
        assert np.isnan(inside).all()


@pytest.mark.parametrize("name", CUTS_BY_HAND)
def test_a_clip_is_found_however_it_is_written(name):
    with refused("eps_fn must not clip its data prediction.*got a network that does"):
        dj.encode(by_hand(CUTS_BY_HAND[name]), SCHEDULE, X_T, [900, 5, 0])


@both_encodings
def test_what_cuts_something_else_is_encoded(encode):
    """Networks of other operations that look like clipping, whose x0_hat goes with x."""
    image = jnp.where(jnp.arange(X_T.size).reshape(X_T.shape) % 2, -1.0, 1.0)
    others = {
        "relu6 inside": lambda x, t: 0.1 * jnp.minimum(jax.nn.relu(x), 6.0),
        "ends in tanh": dj.from_x0(lambda x, t: jnp.where(t < 0, x, jnp.tanh(x)), SCHEDULE),
        "ends in a steep tanh": dj.from_x0(
            lambda x, t: jnp.maximum(jnp.tanh(5 * x), -2.0), SCHEDULE
        ),
        "clips what it is asked of": lambda x, t: 0.5 * jnp.clip(x, -1, 1),
        "knows one image of two colours": lambda x, t: dj.x0_to_epsilon(
            jnp.clip(image, -1, 1), x, SCHEDULE.alpha_bar(t)
        ),
    }
    for name, network in others.items():
        assert np.isfinite(encode(network, SCHEDULE, X_T, [5, 0])).all(), name


def test_an_eta_of_another_shape_is_refused():
    with refused(r"level \(alpha_bar, t, eta\) must .* got level shape \(3,\)"):
        sample(sampler=dj.ddim(jnp.ones(3)))
