"""objectives.py: the loss against its expectation, and what an example's own key decides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from ddim_jax import Schedule, linear_schedule
from ddim_jax.codec import Codec
from ddim_jax.objectives import OBJECTIVES, Denoising, Frozen, LossInputs, Objective, Setup

SCHEDULE = linear_schedule()
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
PLAIN = Denoising(flip=False)


def zero_network(variables, x, t, *labels, train, rngs):
    del variables, t, labels, train, rngs
    return jnp.zeros_like(x)


def program(
    apply_fn=zero_network,
    images=IMAGES,
    labels=None,
    objective=PLAIN,
    frozen=Frozen(),  # noqa: B008
    **options,
):
    """(seed, schedule, shard) -> the losses of those rows of the batch."""
    places = np.arange(len(images))
    batch = {"image": images} if labels is None else {"image": images, "label": labels}

    @jax.jit
    def run(seed, schedule, places, batch):
        setup = Setup(apply_fn, schedule, **{"batch_size": 8, **options})
        inputs = LossInputs({}, frozen, (), jax.random.key(seed), places, batch)
        got, state = objective.loss_fn(setup)({}, inputs)
        assert state == ()
        return got

    def call(seed=0, schedule=SCHEDULE, shard=slice(None)):
        return run(seed, schedule, places[shard], {k: array[shard] for k, array in batch.items()})

    return call


def losses(*arguments, **options):
    return program(*arguments, **options)()


def test_a_network_that_predicts_nothing_loses_the_variance_of_the_noise():
    keys = range(60)
    got = np.concatenate([*map(program(), keys)])
    assert got.shape == (480,)
    # The mean of 480 * 16 squared normals: 1 with standard error sqrt(2 / 7680) = 0.016.
    assert abs(got.mean() - 1) < 0.07
    summed = dataclasses.replace(PLAIN, reduction="sum")
    np.testing.assert_allclose(losses(objective=summed), 16 * losses(), rtol=1e-6)
    l1 = dataclasses.replace(PLAIN, loss="l1")
    absolute = np.concatenate([*map(program(objective=l1), keys)])
    assert abs(absolute.mean() - np.sqrt(2 / np.pi)) < 0.04


def level(alpha_bar):
    """A schedule of one level alone, so that the loss shows no other."""
    return Schedule(jnp.float32([alpha_bar]))


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_a_network_that_predicts_nothing_loses_what_it_should_have_said(predicts):
    """v = sqrt(ab) eps - sqrt(1 - ab) x0, so E |v|^2 = ab E eps^2 + (1 - ab) x0^2."""
    images = np.full((512, 8, 8, 1), 230, np.uint8)
    x0 = 230 / 127.5 - 1
    run = program(images=images, predicts=predicts, batch_size=512)
    for ab in (0.0, 0.3, 0.95):
        want, variance = {
            "eps": (1.0, 2.0),
            # Of v ~ N(m, s^2), with s^2 = ab and m^2 = (1 - ab) x0^2, Var v^2 = 2 s^4 + 4 m^2 s^2.
            "v": (ab + (1 - ab) * x0**2, 2 * ab**2 + 4 * (1 - ab) * x0**2 * ab),
            "x0": (x0**2, 0.0),
        }[predicts]
        got = run(schedule=level(ab)).mean()
        assert abs(got - want) < 4 * np.sqrt(variance / images.size) + 1e-5, ab


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_min_snr_weighs_the_error_of_the_data(predicts):
    """Hang et al. 2023: min(SNR, 5) of x0's error; that of eps is SNR times it, of v SNR + 1."""
    plain = program(predicts=predicts)
    weighted = program(predicts=predicts, objective=dataclasses.replace(PLAIN, weighting="min_snr"))
    for ab in (0.2, 0.9):
        snr = ab / (1 - ab)
        weight = min(snr, 5) / {"eps": snr, "v": snr + 1, "x0": 1}[predicts]
        got, before = weighted(schedule=level(ab)), plain(schedule=level(ab))
        np.testing.assert_allclose(got, weight * before, rtol=1e-5)


def test_an_example_depends_on_its_place_and_not_on_its_shard():
    def noisy_network(variables, x, t, *labels, train, rngs):
        return x * jax.random.normal(rngs["dropout"], x.shape) + t

    for timesteps in ("independent", "antithetic"):
        objective = Denoising(timesteps=timesteps, flip=True)
        run = program(noisy_network, objective=objective)
        whole = run()
        for i in range(0, 8, 2):
            part = run(shard=slice(i, i + 2))
            np.testing.assert_allclose(part, whole[i : i + 2], rtol=1e-5)


def test_antithetic_indices_come_in_pairs():
    def shows_t(variables, x, t, *labels, train, rngs):
        return jnp.full_like(x, t * 1000.0)  # far above the noise, so that the loss shows t

    objective = dataclasses.replace(PLAIN, timesteps="antithetic")
    t = np.round(np.sqrt(losses(shows_t, objective=objective)) / 1000)
    # 8 // 2 + 1 = 5 are drawn, the last three mirror the first three.
    np.testing.assert_array_equal(t[5:], 999 - t[:3])


def test_flips_mirror_half_of_the_images_left_to_right():
    ramp = np.tile(np.array([0, 85, 170, 255], np.uint8), (8, 4, 1))[..., None]

    def shows_orientation(variables, x, t, *labels, train, rngs):
        return x  # eps - x_t is small only if x_t's signal is; orientation shows in the gradient

    plain = losses(shows_orientation, ramp)
    flipped = losses(shows_orientation, ramp, objective=Denoising(flip=True))
    # The keys are the same, so examples that were not flipped lose exactly the same.
    same = np.isclose(plain, flipped, rtol=1e-6)
    assert 0 < same.sum() < 8


def shows_label(variables, x, t, label, *, train, rngs):
    return jnp.full_like(x, label * 1000.0)


def test_labels_reach_the_network_only_if_it_wants_them():
    kept = dataclasses.replace(PLAIN, label_dropout=0.0)
    got = losses(shows_label, labels=np.arange(8), num_classes=10, objective=kept)
    np.testing.assert_allclose(np.sqrt(got), np.arange(8) * 1000, atol=2)
    # Without classes the batch's labels, and their dropout, are nobody's business.
    np.testing.assert_array_equal(losses(labels=np.arange(8)), losses(objective=kept))


def test_a_share_of_the_labels_becomes_no_class():
    """Each example's own coin: 10 in place of its label, in about a quarter of 4000."""
    objective = dataclasses.replace(PLAIN, label_dropout=0.25)
    labels = np.arange(4000) % 10
    images = np.zeros((4000, 2, 2, 1), np.uint8)
    run = program(shows_label, images, labels, objective=objective, batch_size=4000, num_classes=10)
    seen = np.sqrt(run()) / 1000
    dropped = np.isclose(seen, 10, atol=0.01)
    np.testing.assert_allclose(seen[~dropped], labels[~dropped], atol=0.01)
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    again = np.sqrt(run(shard=slice(3000, 4000))) / 1000  # as another device holds them
    np.testing.assert_array_equal(np.isclose(again, 10, atol=0.01), dropped[3000:])


def test_the_codec_makes_what_the_network_is_trained_on():
    """The loss sees the codec's x0, made with its frozen weights, and of its shape."""

    class Constant(Codec):
        def encode(self, params, images, key=None):
            assert images.dtype == jnp.uint8
            return jnp.broadcast_to(params["value"], (len(images), 3, 5))

    got = losses(
        predicts="x0",
        codec=Constant(),
        frozen=Frozen(codec={"value": jnp.float32(0.7)}),
        objective=dataclasses.replace(PLAIN, reduction="sum"),
    )
    np.testing.assert_allclose(got, np.full(8, 15 * 0.49), rtol=1e-5)


@pytest.mark.parametrize("label_dropout", [-0.1, 1.0, float("nan")])
def test_a_label_dropout_that_cannot_be_is_refused(label_dropout):
    with refused(r"label_dropout must be in \[0, 1\)"):
        Denoising(label_dropout=label_dropout).check("eps")


@pytest.mark.parametrize("name", ["loss", "reduction", "timesteps", "weighting"])
def test_an_unknown_name_is_refused_with_those_there_are(name):
    known = getattr(Denoising(), name)
    with refused(f"{name} must be one of .*{known}.*; got 'other'"):
        dataclasses.replace(Denoising(), **{name: "other"}).check("eps")


def test_min_snr_has_no_meaning_for_another_prediction():
    with refused("predicts must be one of eps, v, x0; got 'score'"):
        Denoising(weighting="min_snr").check("score")


def test_an_objective_needs_no_more_than_a_loss():
    class Nothing(Objective):
        def loss_fn(self, setup):
            return lambda params, inputs: (jnp.zeros(len(inputs.places)), inputs.state)

    Nothing().check("eps")
    assert Nothing().frozen() == ()
    assert Nothing().init_state(Setup(zero_network, SCHEDULE, 8)) == ()
    np.testing.assert_array_equal(losses(objective=Nothing()), np.zeros(8))
    assert OBJECTIVES["denoising"] is Denoising


def test_hardware_generators_are_refused():
    loss_fn = PLAIN.loss_fn(Setup(zero_network, SCHEDULE, batch_size=8))
    key = jax.random.key(0, impl="rbg")
    with pytest.raises(ValueError, match=r"threefry2x32.*got rbg"):
        loss_fn({}, LossInputs({}, Frozen(), (), key, jnp.arange(8), {"image": IMAGES}))
