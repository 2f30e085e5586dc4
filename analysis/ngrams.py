"""Bits per byte of n-gram models: what a language model must beat before it has learnt anything."""

from collections.abc import Iterable

import numpy as np

_BYTES = 256
ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}


def bits_per_byte(
    train_documents: Iterable[np.ndarray], held_out_documents: Iterable[np.ndarray]
) -> dict[str, float]:
    """Add-one smoothed n-gram models of bytes: {'unigram': .., 'bigram': .., 'trigram': ..}.

    p(c | h) = (count(h c) + 1) / (count(h) + 256), where h are the n - 1 bytes before c, and
    count(h) counts h with a byte after it. A context never crosses a document's beginning: there,
    as many bytes as the document has are used (its first byte is scored by the unigram model, its
    second by the bigram model), so every held-out byte is scored by every model. Ends of documents
    are not scored, unlike a language model's `<eos>`.

    train_documents, held_out_documents: arrays of uint8. Returns the mean of -log2 p over all
    held-out bytes, in float64.
    Raises ValueError where the held-out documents have no byte.
    """
    train, held_out = _joined(train_documents), _joined(held_out_documents)
    if not len(held_out[0]):
        raise ValueError("The held-out documents have no byte to score.")
    bits = np.zeros(len(held_out[0]))
    means = {}
    for name, order in ORDERS.items():
        # Where the document has too few bytes before it, the lower order's bits stay.
        bits[held_out[1] >= order - 1] = _bits(train, held_out, order)
        means[name] = float(bits.mean())
    return means


def _joined(documents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All bytes, uint8 [T], and each one's distance from its document's beginning, at most 2."""
    documents = [np.asarray(document, np.uint8) for document in documents]
    text = np.concatenate([np.empty(0, np.uint8), *documents])
    before = np.full(len(text), 2, np.uint8)
    lengths = np.array([len(document) for document in documents if len(document)], np.int64)
    starts = np.cumsum(lengths) - lengths
    before[(starts + 1)[lengths > 1]] = 1
    before[starts] = 0
    return text, before


def _bits(train: tuple, held_out: tuple, order: int) -> np.ndarray:
    """-log2 p, float64, of the held-out bytes that have a context of order - 1 bytes."""
    codes, asked = _codes(*train, order), _codes(*held_out, order)
    codes.sort()
    seen = _count(codes, asked)
    context = _count(codes // _BYTES, asked // _BYTES)
    return np.log2(context + float(_BYTES)) - np.log2(seen + 1.0)


def _codes(text: np.ndarray, before: np.ndarray, order: int) -> np.ndarray:
    """The `order` bytes that end at each byte with that many as one number, int32."""
    codes = text.astype(np.int32)
    for back in range(1, order):
        codes[back:] |= text[:-back].astype(np.int32) << (8 * back)
    return codes[before >= order - 1]


def _count(codes: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """How often each of `asked` occurs among `codes`, which are sorted."""
    # Only what is asked is looked up: a table of all trigrams would be larger than the corpus.
    distinct, place = np.unique(asked, return_inverse=True)
    first = np.searchsorted(codes, distinct, side="left")
    return (np.searchsorted(codes, distinct, side="right") - first)[place]
