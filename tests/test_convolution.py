"""Our convolution is JAX's in every derivative, and its gradients are in the fast layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax import convolution
from ddim_jax.convolution import FAST, conv_general_dilated

rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(3, 8, 6, 4)), jnp.float32)
KERNEL = jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32)
CASES = [
    ((1, 1), [(1, 1), (1, 1)]), ((2, 2), [(0, 1), (0, 1)]), ((2, 2), [(1, 1), (1, 1)]),
    ((1, 1), "SAME"), ((1, 2), "VALID"),
]  # fmt: skip


def cubed(conv, strides, padding):
    """A scalar of both arguments, of which no derivative up to the third is 0."""
    return lambda x, kernel: (conv(x, kernel, strides, padding) ** 3).sum()


def jax_conv(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=FAST)


ours = functools.partial(conv_general_dilated, dimension_numbers=FAST)


@pytest.mark.parametrize("strides, padding", CASES)
def test_values_and_derivatives_are_jaxs(strides, padding):
    for of in (
        lambda f: f(X, KERNEL),
        lambda f: jax.grad(f, (0, 1))(X, KERNEL),
        lambda f: jax.jvp(f, (X, KERNEL), (X[::-1], 2 * KERNEL)),
        lambda f: jax.jvp(jax.grad(f, (0, 1)), (X, KERNEL), (X[::-1], KERNEL)),
        lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None))(X[:, None], KERNEL),
        lambda f: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(X, jnp.stack([KERNEL, -KERNEL])),
    ):
        found, want = (of(cubed(conv, strides, padding)) for conv in (ours, jax_conv))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_the_gradient_is_that_of_the_definition():
    """Entry by entry in float64: dL/dkernel[i, j, c, o] of L = sum of g * y is sum of g * x."""
    g = rng.normal(size=(3, 8, 6, 5))
    x = np.pad(np.asarray(X, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = np.stack(
        [[np.einsum("bhwc,bhwo->co", x[:, i : i + 8, j : j + 6], g) for j in range(3)]
         for i in range(3)]
    )  # fmt: skip
    found = jax.grad(lambda k: (ours(X, k, (1, 1), [(1, 1), (1, 1)]) * g).sum())(KERNEL)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a CPU's program")
def test_inside_a_loop_no_convolution_of_a_gradient_leaves_the_fast_layout():
    """By XLA's program: its fast kernel is for b01f_01io->b01f."""

    def looped(conv, kernel):
        def body(kernel, _):
            return jax.grad(lambda k: cubed(conv, (1, 1), "SAME")(X, k))(kernel), None

        return jax.lax.scan(body, kernel, None, length=3)[0]

    def layouts(conv):
        text = jax.jit(functools.partial(looped, conv)).lower(KERNEL).compile().as_text()
        return {word for word in text.split() if word.startswith("dim_labels=")}

    assert layouts(ours) == {"dim_labels=b01f_01io->b01f,"} or layouts(ours) == {
        "dim_labels=b01f_01io->b01f"
    }
    assert layouts(jax_conv) - layouts(ours), "JAX's own is fast too: this file is not needed"


def test_what_is_no_plain_convolution_of_images_is_jaxs():
    x, kernel = jnp.ones((1, 4, 2)), jnp.ones((3, 2, 2))
    numbers = ("NWC", "WIO", "NWC")
    found = conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers)
    want = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers)
    np.testing.assert_array_equal(found, want)
    grouped = conv_general_dilated(
        X, KERNEL[:, :, :1, :4], (1, 1), "SAME", dimension_numbers=FAST, feature_group_count=4
    )
    assert grouped.shape == X.shape
    assert not convolution._is_plain(X, rhs_dilation=(2, 2), dimension_numbers=FAST)
