"""Concatenate and chunk: the corpus as one stream of tokens, cut into rows of equal length."""

from typing import NamedTuple

import numpy as np

from data.batch import Batch, abstract
from data.documents import Documents


class Layout(NamedTuple):
    """Where an epoch's documents lie in its stream of T + 1 tokens.

    starts: int64 [n + 1], where each document begins, in stream order; T last.
    shift: int64 [n + 1], what to add to a place in the stream to find its token in the corpus.
    """

    starts: np.ndarray
    shift: np.ndarray


class Packer:
    """Rows of L + 1 tokens, one every L tokens, so that each token is a target exactly once.

    The stream is `<eos> document <eos> document .. <eos>`. A document begins with its `<eos>`; the
    one that follows is its last target (the end of the text is predicted), with weight 1. Segments
    are the documents in the row; positions restart at each segment and at the row's start. The last
    row of an epoch is filled up with padding of weight 0 rather than dropped, so that an epoch is
    the corpus, and every held-out byte is scored.

    documents: ids where each document begins with its `<eos>` and one more `<eos>` follows the last
        (`tokens` has T + 1 elements, `offsets[-1]` is T).
    length: L.
    """

    def __init__(self, documents: Documents, length: int):
        self.documents = documents
        self.length = length
        self.total = int(documents.offsets[-1])
        self.rows = -(-self.total // length)

    def layout(self, order: np.ndarray) -> Layout:
        """The stream whose k-th document is `order[k]`, int64 [n]."""
        offsets = self.documents.offsets
        base = np.append(offsets[order], self.total)
        starts = np.zeros_like(base)
        np.cumsum(np.diff(offsets)[order], out=starts[1:])
        return Layout(starts, base - starts)

    def build(self, layout: Layout, chunks: np.ndarray) -> Batch:
        """Rows `chunks` of the stream, int64 [R], each in 0 .. rows - 1.

        Returns a Batch [R L] whose `sample` and `domain` are 0: the caller knows the rows' numbers.
        """
        begin = chunks.astype(np.int64)[:, None] * self.length
        place = begin + np.arange(self.length + 1)
        np.minimum(place, self.total, out=place)  # What lies beyond the end is never looked at.
        document = np.searchsorted(layout.starts, place, side="right") - 1
        tokens = self.documents.tokens[place + layout.shift[document]].astype(np.int32)
        place, document = place[:, :-1], document[:, :-1]
        valid = place < self.total
        positions = place - np.maximum(layout.starts[document], begin)
        return abstract(chunks.shape, self.length, np.zeros)._replace(
            inputs=np.ascontiguousarray(tokens[:, :-1]),
            targets=np.ascontiguousarray(tokens[:, 1:]),
            weights=valid.astype(np.float32),
            segment_ids=np.where(valid, document - document[:, :1] + 1, 0).astype(np.int32),
            positions=np.where(valid, positions, 0).astype(np.int32),
        )

    def names(self, layout: Layout, order: np.ndarray, chunks: np.ndarray) -> list[str]:
        """Documents that rows `chunks` hold tokens of, in the order they are met."""
        begin = chunks.astype(np.int64) * self.length
        end = np.minimum(begin + self.length, self.total)
        spans = (np.searchsorted(layout.starts, at, side="right") - 1 for at in (begin, end - 1))
        met = [
            self.documents.names[order[k]]
            for a, b in zip(*spans, strict=True)
            for k in range(a, b + 1)
        ]
        return list(dict.fromkeys(met))
