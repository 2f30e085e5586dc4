"""Fully sharded parameters: a weight is whole only while the block that uses it runs.

ZeRO-3 (arXiv 1910.02054) as a reshard inside the scan body: forward gathers the block's weights,
the transpose scatters their gradients, and nothing else in the model knows of it.
"""

import jax

from parallel.rules import explicit_axes, layout_of, of_layout


def gather(x: jax.Array) -> jax.Array:
    """x with `fsdp` taken out of its sharding; x itself where that axis is not Explicit."""
    if "fsdp" not in explicit_axes():
        return x
    held = layout_of(jax.typeof(x).sharding.spec)
    return jax.reshard(x, of_layout(tuple(a for a in axes if a != "fsdp") for axes in held))
