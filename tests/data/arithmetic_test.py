import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from data import keyed
from data.composed import Dice
from data.sources.arithmetic import Source
from data.tokenizers.bytes import Tokenizer as Bytes

LINE = re.compile(r"\d+(?: (?:[-+*<>]|==) \d+)+ = (?:-?\d+|True|False)")


def documents(count, **own):
    source = Source(**own)
    keys = keyed.row_keys(keyed.key("arithmetic"), np.arange(count))
    return [source.text(Dice(keys[k : k + 1])) for k in range(count)]


def lines(count, **own):
    return [line for text in documents(count, **own) for line in text.splitlines()]


@given(key=st.integers(0, 2**64 - 1), digits=st.integers(1, 18), count=st.integers(1, 20))
def test_every_line_is_right(key, digits, count):
    text = Source(digits=digits, lines=count).text(Dice(np.array([key], np.uint64)))
    assert text.endswith("\n")
    assert len(text.splitlines()) == count
    for line in text.splitlines():
        assert LINE.fullmatch(line)
        expression, value = line.split(" = ")
        assert str(eval(expression)) == value
        numbers = re.findall(r"\d+", expression)
        assert max(map(len, numbers)) <= digits
        assert all(number == str(int(number)) for number in numbers)


def kind(line):
    signs = re.findall(r"[-+*<>]|==", line.split(" = ")[0])
    if len(signs) > 1:
        return f"chain of {len(signs) + 1}"
    return signs[0]


def test_kinds_are_as_frequent_as_said():
    met = [kind(line) for line in lines(300)]
    shares = {sign: 1 / 5 for sign in "+-*"} | {sign: 1 / 15 for sign in ("<", ">", "==")}
    shares |= {"chain of 3": 1 / 10, "chain of 4": 1 / 10}
    counts = [met.count(name) for name in shares]
    assert sum(counts) == len(met)
    expected = [share * len(met) for share in shares.values()]
    assert stats.chisquare(counts, expected).pvalue > 0.01


def test_every_number_of_digits_is_as_likely():
    sums = [line for line in lines(600, digits=4) if kind(line) == "+"]
    sizes = [len(number) for line in sums for number in line.split(" = ")[0].split(" + ")]
    assert stats.chisquare(np.bincount(sizes, minlength=5)[1:]).pvalue > 0.01
    single = [int(n) for n in re.findall(r"\b\d\b", "\n".join(sums))]
    assert set(single) == set(range(10))


def test_chains_have_every_sign_at_every_place():
    chains = [line for line in lines(300) if kind(line) == "chain of 4"]
    signs = [tuple(re.findall(r" ([-+*]) ", line)) for line in chains]
    assert len(set(signs)) == 27


def test_comparisons_are_of_equals_now_and_then():
    compared = [line for line in lines(600) if re.search("[<>]|==", line)]
    one, other = zip(*(re.findall(r"\d+", line) for line in compared), strict=True)
    equal = sum(a == b for a, b in zip(one, other, strict=True))
    # A quarter, and chance: of one digit each, a ninth of the others, one in ten is. 4 deviations.
    assert abs(equal / len(compared) - (0.25 + 0.75 / 90)) < 4 * (0.19 / len(compared)) ** 0.5
    assert {line.split(" = ")[1] for line in compared} == {"True", "False"}


def test_documents_differ_and_are_the_same_again():
    texts = documents(500)
    assert len(set(texts)) == 500
    assert texts == documents(500)


def test_rows_read_as_the_lines():
    keys, tokenizer = keyed.row_keys(keyed.key("rows"), np.arange(20)), Bytes()
    for inputs in Source(lines=4).draw(keys, 400, tokenizer).inputs:
        whole = tokenizer.decode(inputs).split("<eos>")[1:-1]
        assert len(whole) > 2
        for line in "".join(whole).splitlines():
            expression, value = line.split(" = ")
            assert str(eval(expression)) == value


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"digits": 0}, r"data\.sources\.arithmetic\.digits must be from 1 to 18, got 0\."),
        ({"digits": 19}, r"data\.sources\.arithmetic\.digits must be from 1 to 18, got 19\."),
        ({"lines": 0}, r"data\.sources\.arithmetic\.lines must be at least 1, got 0\."),
        ({"holdout_rows": -1}, r"arithmetic\.holdout_rows must be at least 0, got -1\."),
    ],
)
def test_arguments_are_checked(own, message):
    with pytest.raises(ValueError, match=message):
        Source(**own)
