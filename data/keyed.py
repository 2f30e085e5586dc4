"""Randomness as a pure function of a key: no state, any element alone, the same on every machine.

numpy does not promise that its generators keep their streams between versions (NEP 19), so the few
draws the data needs are made here from a fixed 64-bit mix.
"""

import hashlib

import numpy as np

_ODD = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8


def key(*words: int | str) -> int:
    """A 64-bit key of some words, such as `key('documents', seed, epoch)`."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that looks random; x is a uint64 array (not a scalar).

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; Stafford's variant 13).
    """
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def row_keys(root: int, numbers: np.ndarray) -> np.ndarray:
    """One key a row: uint64 [R] from a root key and row numbers uint64 [R]."""
    return mix(numbers.astype(np.uint64) + np.uint64(root))


def words(keys: np.ndarray, length: int, draw: int = 0) -> np.ndarray:
    """Random uint64 [R L] from keys [R]; another `draw` (below 2**20) gives independent words.

    Row r is the output of SplitMix64 that starts at keys[r].
    """
    index = np.arange(1, length + 1, dtype=np.uint64) + (np.uint64(draw) << np.uint64(40))
    return mix(keys[:, None] + index * _ODD)


def uniform(keys: np.ndarray, length: int, draw: int = 0) -> np.ndarray:
    """Random float64 [R L] in [0, 1), multiples of 2**-53."""
    return (words(keys, length, draw) >> np.uint64(11)) * 2.0**-53


def shuffled(n: int, root: int) -> np.ndarray:
    """A random order of 0 .. n-1 as int64 [n], for lists small enough to hold."""
    start = np.full(1, root, dtype=np.uint64)
    return np.argsort(words(start, n)[0], kind="stable")


def permute(numbers: np.ndarray, n: int, root: int) -> np.ndarray:
    """Where a keyed bijection of 0 .. n-1 sends each of `numbers`, without listing it.

    A Feistel network over the bits that n needs, with halves of unequal width where their number is
    odd; a value that leaves the range is sent through again until it falls inside (cycle walking,
    Black and Rogaway 2002), fewer than two passes on average.

    numbers: uint64 [R], each below n; n at most 2**62. Returns uint64 [R].
    Raises ValueError where n is outside 1 .. 2**62 or a number is not below n.
    """
    if not 1 <= n <= 2**62:
        raise ValueError(f"A permutation needs between 1 and 2**62 elements, got {n}.")
    numbers = np.array(numbers, dtype=np.uint64, ndmin=1)
    if numbers.size and int(numbers.max()) >= n:
        raise ValueError(f"A permutation of {n} elements was asked for element {numbers.max()}.")
    bits = (n - 1).bit_length()
    round_keys = words(np.full(1, root, dtype=np.uint64), _ROUNDS)[0]
    out = _feistel(numbers, bits, round_keys)
    while (outside := out >= np.uint64(n)).any():
        out[outside] = _feistel(out[outside], bits, round_keys)
    return out


def _feistel(x: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    # After an even number of rounds the two widths are back where they were.
    wide, narrow = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    left, right = x >> wide, x & _mask(wide)
    for round_key in round_keys:
        left, right = right, left ^ (mix(right + round_key) & _mask(narrow))
        wide, narrow = narrow, wide
    return (left << wide) | right


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)
