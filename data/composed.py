"""Rows of short texts that are made up as they are read, packed as documents of a corpus are."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from data import keyed, pieces
from data.batch import Batch
from data.documents import gather
from data.drawn import Drawn
from data.stream import Stream

_BLOCK = 32  # words drawn at once


class Dice:
    """Numbers drawn one after another; which ones depends on a key and on `draw` alone.

    key: uint64 [1].  draw: as in `keyed.words`, from 0 to 2**20 - 1.
    """

    def __init__(self, key: np.ndarray, draw: int = 0):
        self._words = _words(key, draw)

    def below(self, n: int) -> int:
        """One of 0 .. n - 1; n at most 2**64, and uneven by a share of n / 2**64."""
        return next(self._words) * n >> 64

    def between(self, low: int, high: int) -> int:
        """One of low .. high."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence):
        """One of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence, k: int) -> list:
        """k different ones of the options, in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(k)]


class Composed(Drawn):
    """A source whose documents are written from a key alone, for any tokenizer of text.

    A subclass has `text(dice) -> str`, which is not empty.

    A row is a window on documents that follow each other without end: it begins at a random token
    of its first one, and from there on is what `pack` makes of a corpus. Each document begins with
    `<eos>` and is a segment of its own, the last is cut where the row ends, and every target has
    weight 1.
    """

    def text(self, dice: Dice) -> str:
        """One document."""
        raise NotImplementedError

    def draw(self, keys: np.ndarray, length: int, tokenizer) -> Batch:
        """Rows `[R L]` from keys uint64 [R]; raises ValueError for a tokenizer without text."""
        texts, found = [], []
        for row in range(len(keys)):
            for ids, start, size in self._window(keys[row : row + 1], length, tokenizer):
                found.append((row, len(texts), start, size))
                texts.append(ids)
        documents = gather(texts, [self.domain] * len(texts), np.int32)
        columns = np.array(found, np.int64).reshape(-1, 4).T
        stream = Stream(documents, tokenizer.eos)
        return pieces.build(stream, *columns, rows=len(keys), length=length, epoch=0)

    def _window(self, key: np.ndarray, length: int, tokenizer) -> Iterator[tuple]:
        """(ids, first input, inputs) of each document that a row of this key holds some of."""
        left, where = length, Dice(key)
        for draw in itertools.count(1):
            ids = tokenizer.encode(self.text(Dice(key, draw)))
            inputs = len(ids) + 1  # <eos> and the text
            start = where.below(inputs) if draw == 1 else 0
            size = min(inputs - start, left)
            yield ids, start, size
            left -= size
            if not left:
                return


def _words(key: np.ndarray, draw: int) -> Iterator[int]:
    for first in itertools.count(0, _BLOCK):
        yield from keyed.words_at(key, np.arange(first, first + _BLOCK), draw).tolist()
