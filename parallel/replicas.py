"""Whether devices that should hold the same numbers do: bit by bit, without a collective.

XLA trusts a sharding. An array that one device updated differently from another is still called
replicated, each device goes on with its own copy, and nothing raises.
"""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two devices hold the same part of an array, and `count` of its `size` elements differ.

    path: of the leaf, as 'params/tokens'.  index: the part, as `addressable_shards` gives it.
    devices: their ids, the first one that holds the part and another.
    """

    path: str
    index: tuple[slice, ...]
    devices: tuple[int, int]
    count: int
    size: int

    def __str__(self) -> str:
        part = ", ".join(f"{s.start or 0}:{'' if s.stop is None else s.stop}" for s in self.index)
        first, second = self.devices
        return (
            f"{self.path}[{part}] differs in {self.count} of {self.size} elements between "
            f"devices {first} and {second}"
        )


def differences(tree: Any) -> list[Difference]:
    """Every pair of devices whose copies of one part of a leaf differ; empty where all agree.

    tree: a pytree of jax arrays; other leaves have no copies. Equal are equal bits, so a NaN equals
    itself and 0.0 does not equal -0.0. In several processes each sees its own devices only, so all
    of them must ask. Copies one part after the other to the host.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            found += _of_leaf(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    return found


def _of_leaf(path: str, leaf: jax.Array) -> list[Difference]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    first, found = {}, []
    for shard in sorted(leaf.addressable_shards, key=lambda shard: shard.device.id):
        part = tuple((s.start, s.stop) for s in shard.index)
        if part not in first:
            first[part] = shard.device.id, _bits(shard.data)
            continue
        device, expected = first[part]
        count = int(np.sum(np.any(_bits(shard.data) != expected, axis=1)))
        if count:
            pair = (device, shard.device.id)
            found.append(Difference(path, shard.index, pair, count, len(expected)))
    return found


def _bits(x: jax.Array) -> np.ndarray:
    """The bytes of each element, uint8 `[elements itemsize]`."""
    values = np.ascontiguousarray(x).reshape(-1)
    return values.view(np.uint8).reshape(values.size, values.dtype.itemsize)
