import jax.numpy as jnp
import numpy as np

from ddim_jax.hashing import content_hash


def test_content_hash_sees_every_bit_name_dtype_and_shape():
    x = np.arange(6.0)
    trees = [{"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": np.float32(x)}, {"a": -x}]
    assert len({content_hash(tree) for tree in trees}) == 5


def test_content_hash_does_not_see_order_or_device():
    x, y = np.float32([[1, 2], [3, 4]])
    assert content_hash({"a": x, "b": y}) == content_hash({"b": jnp.array(y), "a": jnp.array(x)})
