import math
import time
from collections import Counter

import numpy as np
import pytest

from analysis.ngrams import ORDERS, bits_per_byte


def brute_force(train, held_out):
    """The definition: counts in dictionaries, one byte at a time."""
    grams, contexts = Counter(), Counter()
    for document in train:
        for order in ORDERS.values():
            for end in range(order, len(document) + 1):
                grams[document[end - order : end]] += 1
                contexts[order, document[end - order : end - 1]] += 1
    result = {}
    for name, order in ORDERS.items():
        bits = []
        for document in held_out:
            for place in range(len(document)):
                n = min(order, place + 1)
                gram = document[place + 1 - n : place + 1]
                p = (grams[gram] + 1) / (contexts[n, gram[:-1]] + 256)
                bits.append(-math.log2(p))
        result[name] = math.fsum(bits) / len(bits)
    return result


def arrays(documents):
    return [np.frombuffer(document, np.uint8) for document in documents]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ([b"abracadabra", b"banana", b"a"], [b"abanana", b"b", b"\xff\x00\xff"]),
        ([b"", b"ab", b"", b"a" * 50], [b"", b"aaab", b"ba"]),
        ([b"x"], [b"x"]),
        ([], [b"hello"]),
    ],
)
def test_equals_the_definition(train, held_out):
    got, want = bits_per_byte(arrays(train), arrays(held_out)), brute_force(train, held_out)
    assert got.keys() == want.keys()
    for name in want:  # Both in float64; only the order of a short sum differs.
        assert got[name] == pytest.approx(want[name], rel=1e-12)


def test_random_documents():
    rng = np.random.default_rng(0)
    made = [bytes(rng.integers(250, 256, rng.integers(0, 40), np.uint8)) for _ in range(60)]
    got = bits_per_byte(arrays(made[:50]), arrays(made[50:]))
    assert got == pytest.approx(brute_force(made[:50], made[50:]), rel=1e-12)


def test_an_untrained_model_needs_eight_bits():
    assert bits_per_byte([], arrays([b"anything"])) == dict.fromkeys(ORDERS, 8.0)


def test_nothing_to_score():
    with pytest.raises(ValueError, match="no byte to score"):
        bits_per_byte(arrays([b"a"]), arrays([b""]))


def test_the_embedded_corpus():
    from data.sources.stdlib import Source

    source, start = Source(), time.perf_counter()
    bits = bits_per_byte(source.documents("train"), source.documents("validation"))
    # Measured 0.5 s and, on Python 3.12.1, 4.756, 3.629 and 2.771; other Pythons differ a little.
    assert time.perf_counter() - start < 10
    assert 4.4 < bits["unigram"] < 5.1
    assert 3.3 < bits["bigram"] < 3.9
    assert 2.4 < bits["trigram"] < 3.0
