"""Wrappers: every parametrisation is the same network; guidance and clipping are what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from refusals import refused

import ddim_jax as dj

SCHEDULE = dj.linear_schedule()
TIMESTEPS = dj.ddim_timesteps(1000, 6)
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
KEY = jax.random.key(1)
T = jnp.int32(5)


def eps_fn(x, t):
    return jnp.sqrt(1 - SCHEDULE.alpha_bar(t)) * x + 0.1 * jnp.sin(3 * x + t / 100)


def predicting(target):
    """The same network, asked for another quantity."""
    convert = getattr(dj, f"epsilon_to_{target}")
    return lambda x, t: convert(eps_fn(x, t), x, SCHEDULE.alpha_bar(t))


by_wrapper = pytest.mark.parametrize(
    "wrap, target", [("from_v", "v"), ("from_x0", "x0"), ("from_score", "score")]
)


@functools.partial(jax.jit, static_argnums=0)
def draw(network, eta):
    return dj.sample_trajectory(KEY, network, SCHEDULE, X, TIMESTEPS, dj.ddim(eta))


@by_wrapper
def test_every_parametrisation_draws_the_same_trajectory(wrap, target):
    wrapped = getattr(dj, wrap)(predicting(target), SCHEDULE)
    for eta in (0.0, 1.0):
        states, x0s = draw(wrapped, eta)
        want_states, want_x0s = draw(eps_fn, eta)
        np.testing.assert_allclose(states, want_states, atol=2e-4)
        np.testing.assert_allclose(x0s, want_x0s, atol=1e-3)  # at first, x0 is 60 times eps


MEAN, VAR = 0.3, 0.25


def optimal(target):
    """The optimal network for data N(MEAN, VAR), each answer from its own formula."""

    def network(x, t):
        ab = SCHEDULE.alpha_bar(t)
        whitened = (x - jnp.sqrt(ab) * MEAN) / (ab * VAR + 1 - ab)
        x0, eps = MEAN + jnp.sqrt(ab) * VAR * whitened, jnp.sqrt(1 - ab) * whitened
        v = jnp.sqrt(ab) * eps - jnp.sqrt(1 - ab) * x0
        return {"eps": eps, "v": v, "x0": x0, "score": -whitened}[target]

    return network


PREDICTING = {
    "eps": optimal("eps"),
    "v": dj.from_v(optimal("v"), SCHEDULE),
    "x0": dj.from_x0(optimal("x0"), SCHEDULE),
    "score": dj.from_score(optimal("score"), SCHEDULE),
}


@pytest.mark.parametrize("name", dj.SAMPLERS)
def test_every_sampler_draws_the_same_whatever_the_network_predicts(name):
    timesteps = dj.ddim_timesteps(1000, 12, "trailing")

    @functools.partial(jax.jit, static_argnums=0)
    def run(denoiser):
        return dj.sample_trajectory(KEY, denoiser, SCHEDULE, X, timesteps, dj.SAMPLERS[name]())

    want_states, want_x0s = run(PREDICTING["v"])
    for target, denoiser in PREDICTING.items():
        states, x0s = run(denoiser)
        np.testing.assert_allclose(states, want_states, atol=1e-5, err_msg=target)
        # Of x0 by way of the noise, the first digits at t = 999 are divided by 0.006.
        atol = 1e-5 if target in ("v", "x0") else 2e-4
        np.testing.assert_allclose(x0s, want_x0s, atol=atol, err_msg=target)


@by_wrapper
def test_wrappers_against_the_linear_solve(wrap, target):
    value = jax.random.normal(jax.random.key(2), X.shape)
    wrapped = jax.jit(getattr(dj, wrap)(lambda x, t: value, SCHEDULE))
    for t in (0, 500, 999):
        ab = float(SCHEDULE.alpha_bar(t))
        got = wrapped(X, t)
        want = reference.convert(target, "epsilon", value, X, ab)
        np.testing.assert_allclose(got.eps, want, rtol=1e-4, atol=3e-2 if t == 0 else 1e-5)
        want = reference.convert(target, "x0", value, X, ab)
        np.testing.assert_allclose(got.x0, want, rtol=1e-5, atol=1e-6)
    t = jnp.array([3, 700])  # as in training
    got = wrapped(X, t)
    for field, name, rtol in [("eps", "epsilon", 1e-3), ("x0", "x0", 1e-5)]:
        want = [
            reference.convert(target, name, value[i], X[i], float(SCHEDULE.alpha_bar(t[i])))
            for i in range(2)
        ]
        np.testing.assert_allclose(getattr(got, field), want, rtol=rtol, atol=1e-4)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def test_the_data_of_a_v_keeps_its_digits_where_there_is_hardly_any_signal():
    """Not by way of eps, whose last digit is divided by sqrt(alpha_bar) = 0.006 at t = 999."""
    x, v = jax.random.normal(jax.random.key(3), (2, 50_000))
    for t in (999, 500, 0):
        ab = float(SCHEDULE.alpha_bar(t))
        pair = jax.jit(dj.from_v(lambda x, t: v, SCHEDULE))(x, jnp.int32(t))
        signal, noise = np.sqrt(ab), np.sqrt(1 - ab)
        x64, v64 = np.float64(x), np.float64(v)
        assert rms(pair.x0 - (signal * x64 - noise * v64)) < 1e-6
        # Near clean data sqrt(1 - ab) = 0.01 itself, from a float32 level, is right to 3e-6.
        assert rms(pair.eps - (noise * x64 + signal * v64)) < (5e-6 if t == 0 else 1e-6)
    by_eps = dj.epsilon_to_x0(dj.v_to_epsilon(v, x, SCHEDULE.alpha_bar(999)), x, 4.0358e-5)
    ab = np.float64(np.float32(4.0358e-5))
    assert rms(by_eps - (np.sqrt(ab) * np.float64(x) - np.sqrt(1 - ab) * np.float64(v))) > 5e-6


@by_wrapper
@pytest.mark.parametrize("t", [1, 500, 999])
def test_the_two_halves_of_a_pair_belong_to_x(wrap, target, t):
    ab = float(SCHEDULE.alpha_bar(t))
    x0, eps = jax.jit(getattr(dj, wrap)(predicting(target), SCHEDULE))(X, jnp.int32(t))
    np.testing.assert_allclose(reference.add_noise(x0, eps, ab), X, atol=2e-6)


ZERO = dj.zero_terminal_snr(SCHEDULE)


def test_pairs_at_pure_noise():
    """At alpha_bar = 0: x is the noise, and v is minus the data. A score has no data to tell."""
    value, t = jax.random.normal(jax.random.key(2), X.shape), jnp.int32(999)
    x0, eps = jax.jit(dj.from_v(lambda x, t: value, ZERO))(X, t)
    np.testing.assert_array_equal(x0, -value)
    np.testing.assert_array_equal(eps, X)
    x0, eps = jax.jit(dj.from_x0(lambda x, t: value, ZERO))(X, t)
    np.testing.assert_array_equal(x0, value)
    np.testing.assert_array_equal(eps, X)
    assert not np.isfinite(dj.from_score(lambda x, t: value, ZERO)(X, t).x0).any()
    for wrap in (dj.from_v, dj.from_x0):
        clipped = dj.clip_x0(wrap(lambda x, t: 3 * value, ZERO), ZERO)(X, t)
        assert np.abs(clipped.x0).max() == 1
        np.testing.assert_array_equal(clipped.eps, X)


@pytest.mark.parametrize(
    "wrap", [dj.from_v, dj.from_x0, dj.from_score, dj.clip_x0, dj.clip_x0_keep_eps]
)
def test_wrapped_networks_keep_float32_digits_and_train(wrap):
    """In bfloat16 one half of the pair could not say where the other ends."""
    x = X.astype(jnp.bfloat16)
    got = wrap(lambda x, t: 0.5 * x, SCHEDULE)(x, jnp.array([3, 700]))
    for half in got:
        assert half.dtype == jnp.float32 and half.shape == x.shape
        assert np.isfinite(half).all()
    loss = jax.grad(
        lambda w: dj.eps_loss(KEY, wrap(lambda x, t: w * x, SCHEDULE), SCHEDULE, X).sum()
    )
    assert np.isfinite(loss(0.5)) and loss(0.5) != 0


# ------------------------------------------------------------------------------ parametrizations


@pytest.mark.parametrize("name", dj.PARAMETRIZATIONS)
def test_a_network_that_says_the_target_has_the_noised_example_as_its_pair(name):
    """What a network is trained to say, and how it is then read, are one table's row."""
    kind = dj.PARAMETRIZATIONS[name]
    x0, eps = jax.random.normal(jax.random.key(4), (2, 100))
    for t in (1, 400, 999):
        ab = SCHEDULE.alpha_bar(t)
        x_t = jnp.float32(reference.add_noise(x0, eps, float(ab)))
        denoiser = kind.denoiser(lambda x, t, ab=ab: kind.target(x0, eps, ab), SCHEDULE)
        answer = denoiser(x_t, jnp.int32(t))
        if name == "eps":
            answer = dj.Prediction(dj.epsilon_to_x0(answer, x_t, ab), answer)
        # Both halves, to the rounding of x_t over the smaller of signal and noise.
        np.testing.assert_allclose(answer.x0, x0, atol=1e-4 if name == "eps" else 1e-6)
        np.testing.assert_allclose(answer.eps, eps, atol=5e-5 if t == 1 else 1e-6)


def test_the_targets_are_what_their_names_say():
    x0, eps = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    ab = np.float32([0.1, 0.5, 0.9])
    want = {
        "eps": eps,
        "x0": x0,
        "v": np.sqrt(ab)[:, None] * eps - np.sqrt(1 - ab)[:, None] * x0,
    }
    assert want.keys() == dj.PARAMETRIZATIONS.keys()
    for name, value in want.items():
        got = dj.PARAMETRIZATIONS[name].target(jnp.asarray(x0), jnp.asarray(eps), jnp.asarray(ab))
        np.testing.assert_allclose(got, value, atol=1e-6)


# ---------------------------------------------------------------------------------- clipping


def test_clip_x0_keeps_every_data_prediction_inside():
    clipped = dj.clip_x0(lambda x, t: -3 * x, SCHEDULE, low=-0.5, high=0.25)
    states, x0s = draw(clipped, 1.0)
    assert x0s.min() >= -0.5 - 1e-3 and x0s.max() <= 0.25 + 1e-3
    assert x0s.min() < -0.49 and x0s.max() > 0.24
    assert states[-1].min() >= -0.5 - 1e-5 and states[-1].max() <= 0.25 + 1e-5


def test_clip_x0_holds_for_bfloat16_states():
    """eps rounded to bfloat16 would let x0_hat out by 24 % at t = 999."""
    x, clipped = X.astype(jnp.bfloat16), dj.clip_x0(lambda x, t: -x, SCHEDULE)
    for t in jnp.array([700, 999]):
        pair = clipped(x, t)
        assert np.abs(pair.x0).max() <= 1
        x0 = dj.epsilon_to_x0(pair.eps, x.astype(jnp.float32), SCHEDULE.alpha_bar(t))
        assert np.abs(x0).max() < 1 + 1e-4


def test_clip_x0_re_derives_eps():
    t = jnp.int32(800)
    clipped = dj.clip_x0(eps_fn, SCHEDULE)(X, t)
    x0 = dj.epsilon_to_x0(eps_fn(X, t), X, SCHEDULE.alpha_bar(t))
    want = dj.x0_to_epsilon(jnp.clip(x0, -1, 1), X, SCHEDULE.alpha_bar(t))
    np.testing.assert_allclose(clipped.eps, want, atol=1e-6)
    np.testing.assert_allclose(clipped.x0, jnp.clip(x0, -1, 1), atol=1e-6)


@pytest.mark.parametrize("clip", [dj.clip_x0, dj.clip_x0_keep_eps])
def test_clipping_changes_nothing_when_nothing_is_cut(clip):
    image = jnp.full(X.shape, 0.3)
    knows = dj.from_x0(lambda x, t: image, SCHEDULE)
    clipped = clip(knows, SCHEDULE)
    for t in jnp.array([1, 500, 999]):
        for got, want in zip(clipped(X, t), knows(X, t), strict=True):
            np.testing.assert_array_equal(got, want)


def test_clip_x0_keep_eps_clips_one_half_alone():
    clipped = jax.jit(dj.clip_x0_keep_eps(eps_fn, SCHEDULE, low=-0.5, high=0.25))
    for t in (0, 400, 999):
        pair = clipped(X, jnp.int32(t))
        eps = np.float64(eps_fn(X, t))
        x0 = reference.convert("epsilon", "x0", eps, X, float(SCHEDULE.alpha_bar(t)))
        np.testing.assert_allclose(pair.eps, eps, atol=1e-6)
        np.testing.assert_allclose(pair.x0, np.clip(x0, -0.5, 0.25), atol=1e-4)
        assert pair.x0.min() == -0.5 and pair.x0.max() == 0.25  # both were cut


def test_clipping_a_pair_is_clipping_its_eps():
    for clip in (dj.clip_x0, dj.clip_x0_keep_eps):
        by_eps = clip(eps_fn, SCHEDULE)
        by_pair = clip(dj.from_v(predicting("v"), SCHEDULE), SCHEDULE)
        for t in jnp.array([300, 999]):
            for a, b in zip(by_eps(X, t), by_pair(X, t), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


def test_crossed_bounds_are_refused():
    for clip in (dj.clip_x0, dj.clip_x0_keep_eps):
        with refused(r"low must be below high; got low=1.0, high=1.0"):
            clip(eps_fn, SCHEDULE, 1.0, 1.0)
        with refused(r"low must be below high; got low=1.0, high=-1.0"):
            clip(eps_fn, SCHEDULE, low=1.0, high=-1.0)


# ---------------------------------------------------------------------------------- guidance


def cond_fn(x, t):
    return x + 1.0


def uncond_fn(x, t):
    return 0.5 * x


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0, jnp.float32(2.5)])
def test_guidance_is_the_line_through_both_networks(scale):
    got = jax.jit(dj.guided(cond_fn, uncond_fn, scale))(X, T)
    want = (1 - scale) * uncond_fn(X, T) + scale * cond_fn(X, T)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_guidance_scale_may_be_traced_mapped_and_per_image():
    one_compile = jax.jit(lambda scale: dj.guided(cond_fn, uncond_fn, scale)(X, T))
    scales = jnp.array([0.0, 3.0])
    mapped = jax.vmap(one_compile)(scales)
    for scale, got in zip(scales, mapped, strict=True):
        np.testing.assert_allclose(got, one_compile(scale), atol=1e-6)
    per_image = one_compile(scales)
    np.testing.assert_allclose(per_image[0], uncond_fn(X[0], T), atol=1e-6)
    np.testing.assert_allclose(per_image[1], mapped[1, 1], atol=1e-6)


def test_guidance_keeps_the_dtype():
    assert dj.guided(cond_fn, uncond_fn, 2.0)(X.astype(jnp.bfloat16), T).dtype == jnp.bfloat16


def pair_fn(x, t):
    return dj.Prediction(x - 0.5, 2 * x)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_guidance_of_pairs_is_the_line_through_both_halves(scale):
    other = dj.Prediction(jnp.sin(X), jnp.cos(X))
    got = jax.jit(dj.guided(pair_fn, lambda x, t: other, scale))(X, T)
    for half, cond, uncond in zip(got, pair_fn(X, T), other, strict=True):
        np.testing.assert_allclose(half, (1 - scale) * uncond + scale * cond, atol=1e-6)


@pytest.mark.parametrize("t", [1, 500, 999])
@pytest.mark.parametrize("scale", [2.5, -1.0, jnp.array([0.0, 7.0])])
def test_a_guided_pair_still_belongs_to_x(scale, t):
    """A line between two pairs of one x stays among its pairs."""
    cond = dj.from_v(predicting("v"), SCHEDULE)
    uncond = dj.from_x0(lambda x, t: jnp.tanh(x), SCHEDULE)
    ab = float(SCHEDULE.alpha_bar(t))
    got = jax.jit(dj.guided(cond, uncond, scale))(X, jnp.int32(t))
    assert isinstance(got, dj.Prediction)
    size = np.abs(np.asarray(got)).max()
    np.testing.assert_allclose(reference.add_noise(*got, ab), X, atol=2e-6 * max(size, 1))


def test_guidance_of_pairs_is_guidance_of_the_networks_eps():
    by_eps = dj.guided(eps_fn, uncond_fn, 3.0)
    wrapped_uncond = dj.from_x0(
        lambda x, t: dj.epsilon_to_x0(uncond_fn(x, t), x, SCHEDULE.alpha_bar(t)), SCHEDULE
    )
    by_pair = dj.guided(dj.from_v(predicting("v"), SCHEDULE), wrapped_uncond, 3.0)
    for t in jnp.array([300, 999]):
        np.testing.assert_allclose(by_pair(X, t).eps, by_eps(X, t), atol=1e-5)


def test_guidance_of_an_eps_and_a_pair_is_refused():
    for networks in [(cond_fn, pair_fn), (pair_fn, uncond_fn)]:
        with refused(
            "cond_fn and uncond_fn must both return eps, or both a Prediction; got one of each. "
            "Wrap both in the same wrapper"
        ):
            dj.guided(*networks, 2.0)(X, T)


def test_wrappers_compose():
    from_v = dj.from_v(predicting("v"), SCHEDULE)
    from_x0 = dj.from_x0(predicting("x0"), SCHEDULE)
    composed = dj.clip_x0(dj.guided(from_v, from_x0, 3.0), SCHEDULE, -1.0, 1.0)
    # Guidance between a network and itself is that network, whatever the scale.
    for t in jnp.array([5, 500]):
        want = dj.clip_x0(eps_fn, SCHEDULE)(X, t)
        for a, b in zip(jax.jit(composed)(X, t), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda bad: dj.guided(bad, uncond_fn, 2.0),
        lambda bad: dj.guided(cond_fn, bad, 2.0),
        lambda bad: dj.from_v(bad, SCHEDULE),
        lambda bad: dj.from_x0(bad, SCHEDULE),
        lambda bad: dj.from_score(bad, SCHEDULE),
        lambda bad: dj.clip_x0(bad, SCHEDULE),
        lambda bad: dj.clip_x0_keep_eps(bad, SCHEDULE),
    ],
)
def test_a_network_that_changes_shapes_is_refused_under_any_wrapper(wrap):
    for bad in (lambda x, t: x[:1], lambda x, t: x[..., :1], lambda x, t: jnp.float32(0.0)):
        with refused(r"must (return an array of x's|have the data's) shape \(2, 4, 4, 3\)"):
            wrap(bad)(X, T)


def test_a_guidance_scale_of_another_shape_is_refused():
    with refused(r"must be a scalar or have the data's leading axes; got level shape \(3,\)"):
        dj.guided(cond_fn, uncond_fn, jnp.ones(3))(X, T)
