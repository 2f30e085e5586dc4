"""Batches from the data's threads onto the devices: each host builds the rows its devices hold."""

import contextlib
from collections.abc import Iterator

import jax

from data.batch import Batch


@contextlib.contextmanager
def feed(data, abstract: Batch, position: int) -> Iterator[Iterator[Batch]]:
    """An endless iterator of sharded Batches `[A b L]` from row `position` on; ends its threads.

    abstract: the Batch of ShapeDtypeStructs with shardings that the step takes.
    """
    homes = abstract.inputs.sharding.addressable_devices_indices_map(abstract.inputs.shape)
    source = data.iterate(position, list(homes.values()))
    try:
        yield (_assemble(pieces, list(homes), abstract) for pieces in source)
    finally:
        source.close()


def _assemble(pieces: list[Batch], devices: list, abstract: Batch) -> Batch:
    # One call for all fields of a device: a call costs more than the few kilobytes it moves.
    placed = [jax.device_put(piece, device) for piece, device in zip(pieces, devices, strict=True)]
    whole = lambda like, *parts: jax.make_array_from_single_device_arrays(
        like.shape, like.sharding, list(parts)
    )
    return jax.tree.map(whole, abstract, *placed)
