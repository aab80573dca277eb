import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.data.pixels import to_model_range, to_uint8

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("jit", [False, True])
def test_every_grey_level_survives_the_round_trip_and_the_ends_are_exact(jit):
    levels = np.arange(256, dtype=np.uint8)
    there = (jax.jit if jit else lambda f: f)(to_model_range)(levels)
    assert there.dtype == jnp.float32 and (there[0], there[-1]) == (-1, 1)
    np.testing.assert_allclose(there, 2 * levels.astype(np.float64) / 255 - 1, atol=2e-7)
    np.testing.assert_array_equal(there, to_model_range(levels))
    np.testing.assert_array_equal(to_uint8(there), levels)


def test_to_uint8_rounds_to_nearest_and_clips():
    level = np.random.default_rng(0).uniform(0, 255, 1000)
    level = level[np.abs(level % 1 - 0.5) > 1e-3]  # float32 may put a tie on either side
    got = to_uint8(jnp.asarray(level / 127.5 - 1, jnp.float32))
    np.testing.assert_array_equal(got, np.floor(level + 0.5))
    outside = jnp.array([-9, -1.01, 1.01, 9, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(to_uint8(outside), [0, 0, 255, 255, 0, 255])
    assert to_uint8(jnp.zeros((3, 2), jnp.bfloat16)).shape == (3, 2)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_a_nan_is_no_black_pixel(kind):
    x = kind(np.float32([0.5, np.nan, np.nan]))
    with pytest.raises(FloatingPointError, match="2 of its 3 values are NaN, and would be black"):
        to_uint8(x)
    assert jax.jit(to_uint8)(x)[0] == 191  # where it cannot be seen


def test_pixels_need_no_pil():
    program = "import sys, ddim_jax.data.pixels; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
