"""Checks of arguments: silent where the rule holds, else the name, the rule, the value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from ddim_jax.checks import (
    check_bounds,
    check_finite_weights,
    check_floating,
    check_one_of,
    check_same_shape,
    look_up,
)


def test_check_floating_takes_every_float():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        check_floating("x", jnp.zeros(1, dtype))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool, jnp.complex64])
def test_check_floating_refuses_the_rest_and_says_what_to_do(dtype):
    message = r"x_T must be floating point, data in \[-1, 1\]; got dtype .*127.5 - 1"
    with refused(message):
        check_floating("x_T", jnp.zeros(1, dtype))
    with refused(message):
        jax.jit(lambda x: check_floating("x_T", x))(jnp.zeros(1, dtype))


@pytest.mark.parametrize("value, kind", [([0.0], "list"), (0.5, "float"), (None, "NoneType")])
def test_check_floating_refuses_what_is_no_array(value, kind):
    with refused(rf"x_T must be an array; got {kind}\."):
        check_floating("x_T", value)


def test_check_same_shape():
    x = jnp.zeros((2, 3))
    check_same_shape("eps", jnp.ones((2, 3)), x)
    check_same_shape("eps", jnp.float32(0), jnp.float32(1))
    for shape in [(3,), (2, 3, 1), (3, 2), ()]:
        with refused(r"eps must have the data's shape \(2, 3\); got \("):
            check_same_shape("eps", jnp.zeros(shape), x)


def test_check_bounds():
    check_bounds(-1.0, 1.0)
    for low, high in [(1.0, -1.0), (0.0, 0.0), (float("nan"), 1.0)]:
        with refused(f"low must be below high; got low={low}, high={high}"):
            check_bounds(low, high)


def test_check_one_of_lists_what_is_valid():
    check_one_of("norm", "l1", ["l1", "l2"])
    check_one_of("norm", "l2", iter(["l1", "l2"]))  # read once
    with refused(r"norm must be one of l1, l2; got 'l3'\."):
        check_one_of("norm", "l3", ["l1", "l2"])


def test_look_up_lists_the_names_of_the_table():
    table = {"red": 1, "blue": 2}
    assert look_up("colour", "blue", table) == 2
    with refused(r"colour must be one of red, blue; got 'green'\."):
        look_up("colour", "green", table)


def test_check_finite_weights_names_the_first_and_counts():
    params = {"a": {"kernel": np.ones(2)}, "b": {"bias": np.array([1, np.nan])}}
    with refused("weights must be finite; 1 of 2 arrays hold NaN or infinity, first b/bias"):
        check_finite_weights(params)
    check_finite_weights({"a": params["a"], "count": 3})
