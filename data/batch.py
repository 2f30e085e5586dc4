"""The contract between data and training: what a batch of rows holds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens, as numpy or jax arrays. Training batches are `[A b L]`, evaluation `[b L]`.

    `..` below stands for the leading dimensions. A counts micro-batches and B = A * b rows make the
    global batch; micro-batch a holds rows a*b .. a*b + b - 1 of it. A single row has no leading
    dimension.

    inputs: int32 [.. L], what the model reads.
    targets: int32 [.. L], what it predicts at the same index (the next token, unless a transform
        says otherwise).
    weights: float32 [.. L], the target's weight in the loss; 0 where there is no target.
    segment_ids: int32 [.. L], 0 for padding, 1.. for the documents within the row. A token sees
        tokens of its own segment only.
    positions: int32 [.. L], distance from the segment's beginning in this row (0 in padding).
    sample: uint32 [.. 2], the row's number as (high, low) words: it keys dropout.
    domain: int32 [..], which of the corpus's domains the row was drawn from.
    """

    inputs: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    sample: Any
    domain: Any


# The fields that have a dimension L, and those that a row has once.
TOKEN_FIELDS = ("inputs", "targets", "weights", "segment_ids", "positions")
ROW_FIELDS = ("sample", "domain")


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """A shape and a dtype without an array."""

    shape: tuple[int, ...]
    dtype: Any


def abstract(lead: Sequence[int], length: int, struct: Callable = ArraySpec) -> Batch:
    """Shapes and dtypes of a batch with leading dimensions `lead`, (A, b) or (b,), and L = length.

    Each field is `struct(shape, dtype)`: pass `jax.ShapeDtypeStruct` to lower a program,
    `np.zeros` for a batch of padding.
    """
    lead = tuple(lead)
    tokens = (*lead, length)
    return Batch(
        inputs=struct(tokens, np.dtype(np.int32)),
        targets=struct(tokens, np.dtype(np.int32)),
        weights=struct(tokens, np.dtype(np.float32)),
        segment_ids=struct(tokens, np.dtype(np.int32)),
        positions=struct(tokens, np.dtype(np.int32)),
        sample=struct((*lead, 2), np.dtype(np.uint32)),
        domain=struct(lead, np.dtype(np.int32)),
    )


def to_words(numbers) -> np.ndarray:
    """Numbers below 2**64, shape [..], to uint32 [.. 2]: (high, low)."""
    numbers = np.asarray(numbers, dtype=np.uint64)
    high, low = numbers >> np.uint64(32), numbers & np.uint64(0xFFFFFFFF)
    return np.stack([high, low], axis=-1).astype(np.uint32)


def from_words(words) -> np.ndarray:
    """The inverse of `to_words`: uint32 [.. 2] to uint64 [..]; `int()` of it is exact."""
    words = np.asarray(words).astype(np.uint64)
    return (words[..., 0] << np.uint64(32)) | words[..., 1]
