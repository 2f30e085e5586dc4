"""Fully sharded parameters: a weight is whole only while the block that uses it runs.

ZeRO-3 (arXiv 1910.02054) as a reshard inside the scan body: forward gathers the block's weights,
the transpose scatters their gradients, and nothing else in the model knows of it.
"""

import jax
from jax.sharding import PartitionSpec

from parallel.rules import explicit_axes


def gather(x: jax.Array) -> jax.Array:
    """x with `fsdp` taken out of its sharding; x itself where that axis is not Explicit."""
    if "fsdp" not in explicit_axes():
        return x
    return jax.reshard(x, PartitionSpec(*map(_without_fsdp, jax.typeof(x).sharding.spec)))


def _without_fsdp(entry):
    names = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(name for name in names if name not in ("fsdp", None))
    return kept[0] if len(kept) == 1 else (kept or None)
