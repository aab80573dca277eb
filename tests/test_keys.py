"""What is random about image i depends on (key, i) alone, whatever the batch or kind of key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

import ddim_jax as dj
from ddim_jax.keys import check_keys, draw_each, draw_noise, fold_in, seed_key, typed_key

KEY = jax.random.key(0)
IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_image_keys_are_fold_in_of_the_index():
    keys = dj.image_keys(KEY, np.array([5, 0, 123456]))
    for key, i in zip(keys, [5, 0, 123456], strict=True):
        np.testing.assert_array_equal(data(key), data(jax.random.fold_in(KEY, i)))


def test_image_keys_do_not_repeat():
    assert len(np.unique(data(dj.image_keys(KEY, np.arange(10_000))), axis=0)) == 10_000


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_initial_noise_of_an_image_does_not_depend_on_its_batch(impl):
    key = jax.random.key(3, impl=impl)
    x, keys = dj.initial_noise(key, np.arange(4), (8, 8, 3))
    again, keys_again = dj.initial_noise(key, jnp.array([9, 2]), (8, 8, 3))
    np.testing.assert_array_equal(again[1], x[2])
    np.testing.assert_array_equal(data(keys_again[1]), data(keys[2]))
    assert x.shape == (4, 8, 8, 3) and x.dtype == jnp.float32
    assert len(np.unique(x.reshape(4, -1), axis=0)) == 4


def test_initial_noise_is_standard_normal_and_independent_of_the_later_keys():
    x, keys = dj.initial_noise(KEY, np.arange(64), (32, 32))
    z = jax.vmap(lambda k: jax.random.normal(k, (32, 32)))(keys)
    n = x.size
    assert abs(x.mean()) < 4 / np.sqrt(n)
    assert abs((x**2).mean() - 1) < 4 * np.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96 / n)
    assert abs((x * z).mean()) < 4 / np.sqrt(n)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_old_style_keys_draw_the_same(make):
    x, keys = dj.initial_noise(make(7), np.arange(3), (4,))
    want, want_keys = dj.initial_noise(jax.random.key(7), np.arange(3), (4,))
    np.testing.assert_array_equal(x, want)
    np.testing.assert_array_equal(data(keys), data(want_keys))
    np.testing.assert_array_equal(
        draw_noise(make(7), jnp.zeros(5)), jax.random.normal(jax.random.key(7), (5,))
    )


def test_a_batch_of_old_style_keys_is_a_batch_of_keys():
    old = jax.random.split(jax.random.PRNGKey(1), 3)
    assert old.dtype == jnp.uint32
    new = jax.random.split(jax.random.key(1), 3)
    np.testing.assert_array_equal(
        draw_noise(old, jnp.zeros((3, 4))), draw_noise(new, jnp.zeros((3, 4)))
    )


# ----------------------------------------------------------------------------------- draw_noise


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_draw_noise_gives_each_image_its_own_key(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 5)
    noise = jax.jit(draw_noise)(keys, jnp.zeros((5, 2, 3)))
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(noise[i], jax.random.normal(key, (2, 3)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_draw_each_maps_any_draw(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 4)
    got = draw_each(lambda k: jax.random.randint(k, (), 0, 1000), keys)
    assert got.tolist() == [int(jax.random.randint(k, (), 0, 1000)) for k in keys]


@pytest.mark.parametrize(
    "x_dtype, noise_dtype",
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32)],
)
def test_noise_is_at_least_float32(x_dtype, noise_dtype):
    x = jnp.zeros((2, 3), x_dtype)
    assert draw_noise(KEY, x).dtype == noise_dtype
    assert draw_noise(jax.random.split(KEY), x).dtype == noise_dtype


def test_noise_for_scalar_data():
    assert draw_noise(KEY, jnp.zeros(())).shape == ()
    assert draw_noise(jax.random.split(KEY, 3), jnp.zeros(3)).shape == (3,)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fold_in_of_one_key_and_of_each(impl):
    key = jax.random.key(0, impl=impl)
    np.testing.assert_array_equal(data(fold_in(key, 7)), data(jax.random.fold_in(key, 7)))
    keys = jax.random.split(key, 3)
    want = [data(jax.random.fold_in(k, 7)) for k in keys]
    np.testing.assert_array_equal(data(jax.jit(fold_in)(keys, 7)), want)


def test_fold_in_of_a_real_time_is_that_of_its_bits():
    """Times of a continuous schedule: different ones, however near, are different numbers."""
    times = np.float32([0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1e-3, 1.0, 0.0])
    for t in times:
        want = data(jax.random.fold_in(KEY, int(t.view(np.int32))))
        for given in (t, jnp.asarray(t), float(t)):
            np.testing.assert_array_equal(data(jax.jit(fold_in)(KEY, given)), want)
    each = jnp.stack([jax.random.key_data(fold_in(KEY, t)) for t in times])
    assert len(np.unique(each, axis=0)) == len(times)
    keys = jax.random.split(KEY, 5)
    want = [data(fold_in(key, t)) for key, t in zip(keys, times, strict=True)]
    np.testing.assert_array_equal(data(fold_in(keys, jnp.asarray(times))), want)
    with jax.enable_x64(True):  # float64 is rounded to the same float32
        np.testing.assert_array_equal(data(fold_in(KEY, np.float64(0.5))), data(fold_in(KEY, 0.5)))


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        jax.jit(lambda k: dj.initial_noise(k, jnp.arange(3), (4,)))(jax.random.key(0))


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("key", [None, 0, 1.5, np.arange(2), jnp.zeros(2)])
def test_what_is_no_key_is_refused(key):
    with refused(r"key must be a PRNG key, such as jax.random.key\(0\); got"):
        draw_noise(key, jnp.zeros(3))
    with refused(r"key must be a PRNG key"):
        typed_key(key)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (4,)])
def test_a_wrong_number_of_keys_is_refused(shape):
    keys = jax.random.split(KEY, shape)
    with refused(r"key must be one key, or one for each of the \(3,\) images; got"):
        check_keys(keys, jnp.zeros((3, 5)))
    with refused(r"key must be one key, or one for each of the \(\) images; got"):
        draw_noise(keys, jnp.zeros(()))


def test_a_seed_names_one_key_whatever_the_default_generator():
    want = jax.random.key_data(jax.random.key(7, impl="threefry2x32"))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.key_data(seed_key(7)), want)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 4294967296\)"):
            seed_key(seed)
