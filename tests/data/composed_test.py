"""What sources that make up their texts promise; each has its own test of what it writes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data import domain, keyed
from data.composed import Composed, Dice
from data.tokenizers.bytes import Tokenizer as Bytes
from data.tokenizers.symbols import Tokenizer as Symbols

BYTES = Bytes()


class Words(Composed):
    """Documents of 1 to `longest` letters."""

    domain = "words"

    def __init__(self, longest=9):
        super().__init__(holdout_rows=4)
        self.longest = longest

    def text(self, dice):
        return "".join(dice.pick("abcdefgh") for _ in range(dice.between(1, self.longest)))


class Pairs(Bytes):
    """Reads some letters as one token less, as a learnt vocabulary does."""

    def encode(self, text):
        return super().encode(text.replace("ab", "\x01").replace("c", "\x02\x03"))


def keys(count, root="composed"):
    return keyed.row_keys(keyed.key(root), np.arange(count))


def window(source, key, length, tokenizer):
    """Tokens, segments and positions of L + 1 places, one document after another."""
    tokens, segments, positions = [], [], []
    for k in range(1, length + 3):
        ids = [tokenizer.eos, *tokenizer.encode(source.text(Dice(key, k))).tolist()]
        start = Dice(key).below(len(ids)) if k == 1 else 0
        tokens += ids[start:]
        segments += [k] * (len(ids) - start)
        positions += range(len(ids) - start)
    return tokens[: length + 1], segments[:length], positions[:length]


@settings(max_examples=60, deadline=None)
@given(
    root=st.integers(0, 2**64 - 1),
    count=st.integers(0, 5),
    length=st.integers(1, 60),
    longest=st.sampled_from([1, 2, 9, 200]),
    tokenizer=st.sampled_from([BYTES, Pairs()]),
)
def test_a_row_is_a_window_on_documents(root, count, length, longest, tokenizer):
    source, row_keys = Words(longest), keyed.row_keys(root, np.arange(count))
    rows = source.draw(row_keys, length, tokenizer)
    assert rows.inputs.shape == (count, length)
    assert (rows.weights == 1).all()
    for r in range(count):
        tokens, segments, positions = window(source, row_keys[r : r + 1], length, tokenizer)
        assert rows.inputs[r].tolist() == tokens[:-1]
        assert rows.targets[r].tolist() == tokens[1:]
        assert rows.segment_ids[r].tolist() == segments
        assert rows.positions[r].tolist() == positions
        alone = source.draw(row_keys[r : r + 1], length, tokenizer)
        assert all(np.array_equal(a[0], b[r]) for a, b in zip(alone, rows, strict=True))


def test_rows_begin_anywhere_in_a_document():
    class Same(Words):
        def text(self, dice):
            return "abcdefg"

    rows = Same().draw(keys(4000), 8, BYTES)
    first = np.where(rows.inputs[:, 0] == BYTES.eos, 0, rows.inputs[:, 0] - ord("a") + 1)
    assert stats.chisquare(np.bincount(first, minlength=8)).pvalue > 0.01


def test_held_out_rows_are_others_and_the_same_for_all_seeds():
    make = lambda seed: domain.make("words", Words(), BYTES, None, (), seed, 64)
    one, other = make(0), make(1)
    numbers = np.arange(4, dtype=np.uint64)
    assert (one.rows, one.held_rows) == (2**40, 4)
    assert np.array_equal(one.held(numbers).inputs, other.held(numbers).inputs)
    drawn = [one.held(numbers), one.build(numbers), other.build(numbers)]
    assert len({row.tobytes() for rows in drawn for row in rows.inputs}) == 12


def test_ids_without_text_are_refused():
    with pytest.raises(ValueError, match=r"reads numbers .* for text choose another data.tokeni"):
        Words().draw(keys(1), 8, Symbols())


def test_dice_depend_on_key_and_draw():
    drawn = lambda key, draw: [Dice(key, draw).below(2**64) for _ in range(1)]
    first, second = keys(2)[:1], keys(2)[1:]
    assert drawn(first, 3) == drawn(first, 3)
    assert len({drawn(key, draw)[0] for key in (first, second) for draw in (0, 3)}) == 4
    dice = Dice(first, 3)
    many = [dice.below(2**64) for _ in range(100)]
    assert many == keyed.words(first, 100, draw=3)[0].tolist()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_dice_are_uniform(n):
    dice = Dice(keys(1))
    counts = np.bincount([dice.below(n) for _ in range(3000)], minlength=n)
    assert len(counts) == n
    assert n == 1 or stats.chisquare(counts).pvalue > 0.01


def test_samples_are_different_and_in_any_order():
    dice = Dice(keys(1))
    samples = [tuple(dice.sample("abcd", 3)) for _ in range(4800)]
    assert {len(set(sample)) for sample in samples} == {3}
    counts = np.unique(samples, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.01
    assert {dice.between(-1, 1) for _ in range(100)} == {-1, 0, 1}
