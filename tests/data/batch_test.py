import numpy as np
import pytest

from data.batch import ROW_FIELDS, TOKEN_FIELDS, Batch, abstract, from_words, to_words


@pytest.mark.parametrize("number", [0, 1, 2**32 - 1, 2**32, 2**53 + 1, 2**64 - 1])
def test_words_are_exact(number):
    words = to_words(number)
    assert words.dtype == np.uint32
    assert words.tolist() == [number >> 32, number & 0xFFFFFFFF]
    assert int(from_words(words)) == number


def test_words_keep_leading_dimensions():
    numbers = np.arange(6, dtype=np.uint64).reshape(2, 3) + np.uint64(2**40)
    assert to_words(numbers).shape == (2, 3, 2)
    assert np.array_equal(from_words(to_words(numbers)), numbers)


def test_abstract_is_the_contract():
    spec = abstract((2, 3), 5)
    assert set(TOKEN_FIELDS) | set(ROW_FIELDS) == set(Batch._fields)
    assert {spec.inputs.shape, spec.positions.shape} == {(2, 3, 5)}
    assert (spec.sample.shape, spec.domain.shape) == ((2, 3, 2), (2, 3))
    zeros = abstract((2,), 4, np.zeros)
    assert zeros.weights.dtype == np.float32
    assert zeros.sample.dtype == np.uint32
