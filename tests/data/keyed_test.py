import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import keyed


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), root=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, root):
    image = keyed.permute(np.arange(n), n, root)
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 2**62), root=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_of_a_large_range_is_elementwise_and_injective(n, root, data):
    picked = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    image = keyed.permute(np.array(picked, np.uint64), n, root)
    assert image.max() < n
    assert len(set(image.tolist())) == len(picked)
    assert [int(keyed.permute(np.uint64(x), n, root)[0]) for x in picked] == image.tolist()


@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_permute_sends_an_element_anywhere_equally_often(n):
    trials = 4000
    images = np.array([keyed.permute(np.arange(n), n, keyed.key(t)) for t in range(trials)])
    spread = 5 * np.sqrt(trials / n)  # Five standard deviations of a count, at most.
    for place in range(n):
        counts = np.bincount(images[:, place].astype(int), minlength=n)
        assert np.abs(counts - trials / n).max() < spread


@pytest.mark.parametrize(("n", "number"), [(0, 0), (2**62 + 1, 0), (5, 5)])
def test_permute_refuses_what_is_out_of_range(n, number):
    with pytest.raises(ValueError, match=str(max(n, number))):
        keyed.permute(np.array([number]), n, 0)


def test_draws_do_not_depend_on_other_rows():
    keys = keyed.row_keys(keyed.key("x", 3), np.arange(50))
    whole = keyed.uniform(keys, 20, draw=1)
    assert np.array_equal(whole[7:9], keyed.uniform(keys[7:9], 20, draw=1))
    assert np.array_equal(whole[:, :5], keyed.uniform(keys, 5, draw=1))


def test_uniform_is_uniform_and_draws_differ():
    keys = keyed.row_keys(keyed.key("y"), np.arange(400))
    a, b = keyed.uniform(keys, 250, draw=0), keyed.uniform(keys, 250, draw=1)
    assert 0 <= a.min() < a.max() < 1
    # 1e5 draws: five standard deviations of the mean, and of the correlation.
    assert abs(a.mean() - 0.5) < 5 * np.sqrt(1 / 12 / a.size)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
    assert abs(np.corrcoef(a[:-1].ravel(), a[1:].ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_words_are_splitmix64():
    # The published vector of SplitMix64 that starts at 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert keyed.words(np.array([1234567], np.uint64), 3).tolist() == [expected]


def test_values_are_pinned():
    # A change here changes the order of every run's data.
    assert keyed.key("rows", 0, 0) == 10836039630094355713
    assert keyed.permute(np.arange(6), 6, 1).tolist() == [4, 0, 3, 2, 1, 5]
    assert keyed.shuffled(6, 1).tolist() == [4, 3, 0, 1, 5, 2]


def test_shuffled_is_a_permutation_keyed():
    orders = [keyed.shuffled(100, keyed.key(k)) for k in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(100)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert keyed.shuffled(1, 0).tolist() == [0]
