import numpy as np
import pytest

from data import keyed
from data.batch import abstract
from data.tokenizers.bytes import Tokenizer
from data.transforms.masked_lm import Transform

TOKENIZER = Tokenizer()


def rows(count=200, length=256):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (count, length)).astype(np.int32)
    inputs[:, ::37] = TOKENIZER.eos
    segments = np.ones((count, length), np.int32)
    segments[-1, 100:] = 0
    return abstract((count,), length, np.zeros)._replace(inputs=inputs, segment_ids=segments)


def run(transform, batch):
    keys = keyed.row_keys(keyed.key(1), np.arange(len(batch.domain)))
    return transform(batch, keys, TOKENIZER)


def test_shares():
    batch = rows()
    out = run(Transform(), batch)
    allowed = (batch.segment_ids > 0) & (batch.inputs != TOKENIZER.eos)
    chosen = out.weights > 0
    masked, same = out.inputs == TOKENIZER.mask, out.inputs == batch.inputs
    n, m = allowed.sum(), chosen.sum()

    def near(share, expected, of):
        return abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / of)

    assert near(m / n, 0.15, n)
    assert near((masked & chosen).sum() / m, 0.8, m)
    # A random byte is the original one in 256.
    assert near((same & chosen).sum() / m, 0.1 + 0.1 / 256, m)
    assert not (masked & ~chosen).any()
    assert same[~chosen].all()


def test_targets_and_places():
    batch = rows()
    out = run(Transform(rate=1.0), batch)
    allowed = (batch.segment_ids > 0) & (batch.inputs != TOKENIZER.eos)
    assert np.array_equal(out.weights > 0, allowed)  # Never padding, never <eos>.
    assert np.array_equal(out.targets, batch.inputs)
    changed = out.inputs[allowed & (out.inputs != TOKENIZER.mask)]
    assert changed.max() < TOKENIZER.regular
    assert [out.inputs.dtype, out.targets.dtype, out.weights.dtype] == [
        np.int32,
        np.int32,
        np.float32,
    ]


def test_extremes():
    batch = rows(20)
    assert not run(Transform(rate=0.0), batch).weights.any()
    kept = run(Transform(rate=1.0, mask=0.0, random=0.0), batch)
    assert np.array_equal(kept.inputs, batch.inputs)
    hidden = run(Transform(rate=1.0, mask=1.0, random=0.0), batch)
    assert (hidden.inputs[hidden.weights > 0] == TOKENIZER.mask).all()


@pytest.mark.parametrize("own", [{"rate": 1.1}, {"mask": -0.1}, {"random": float("nan")}])
def test_shares_out_of_range(own):
    (name, value), *_ = own.items()
    with pytest.raises(ValueError, match=f"masked_lm.{name} must be between 0 and 1, got {value}"):
        Transform(**own)


def test_shares_beyond_one():
    with pytest.raises(ValueError, match=r"at most 1, got 0\.8 \+ 0\.3"):
        Transform(random=0.3)
