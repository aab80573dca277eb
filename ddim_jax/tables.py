"""Looking up a table by indices that JAX traces, splits over a mesh, and cannot check."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def take_or_nan(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index], split over a mesh as the index is; NaN where the table has no such entry.

    Plain indexing would clamp a wrong index, or wrap it, and say nothing.
    """
    # On explicit axes JAX asks how the result is to be split, under vmap too, where no axis shows.
    index_on = jax.typeof(index).sharding
    spec = PartitionSpec(*index_on.spec, *(None,) * (table.ndim - 1))
    explicit = AxisType.Explicit in index_on.mesh.axis_types
    return table.at[index].get(
        mode="fill",
        fill_value=jnp.nan,
        wrap_negative_indices=False,
        out_sharding=NamedSharding(index_on.mesh, spec) if explicit else None,
    )
