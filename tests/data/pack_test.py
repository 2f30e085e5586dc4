import numpy as np
import pytest

from data.documents import Documents
from data.transforms.pack import Packer

EOS = 256


def packer(lengths, length):
    """Documents of distinct tokens, each with its `<eos>` before it, one more at the end."""
    texts = [list(range(10 * k, 10 * k + n)) for k, n in enumerate(lengths)]
    tokens = [token for text in texts for token in (EOS, *text)] + [EOS]
    offsets = np.cumsum([0, *(n + 1 for n in lengths)])
    documents = Documents(np.array(tokens, np.uint16), offsets, [str(k) for k in range(len(texts))])
    return Packer(documents, length), texts


def expected(texts, order, length, rows):
    """The definition, token by token."""
    stream, owner = [], []
    for k in order:
        stream += [EOS, *texts[k]]
        owner += [k] * (1 + len(texts[k]))
    stream.append(EOS)
    result = []
    for row in range(rows):
        fields, segment, position, last = [], 0, 0, None
        for place in range(row * length, (row + 1) * length):
            if place >= len(stream) - 1:
                fields.append((EOS, EOS, 0.0, 0, 0))
                continue
            segment, position = (
                (segment, position + 1) if owner[place] == last else (segment + 1, 0)
            )
            last = owner[place]
            fields.append((stream[place], stream[place + 1], 1.0, segment, position))
        result.append(list(zip(*fields, strict=True)))
    return result


@pytest.mark.parametrize("length", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("lengths", [(3,), (1, 1, 1), (9, 2, 7, 1, 4)])
def test_rows_equal_the_definition(lengths, length):
    packing, texts = packer(lengths, length)
    assert packing.rows == -(-packing.total // length)
    order = np.random.default_rng(0).permutation(len(lengths))
    batch = packing.build(packing.layout(order), np.arange(packing.rows))
    want = expected(texts, order, length, packing.rows)
    for row in range(packing.rows):
        for field, value in zip(batch[:5], want[row], strict=True):
            assert field[row].tolist() == list(value)


def test_every_token_is_a_target_once():
    packing, texts = packer((9, 2, 7, 1, 4), 6)
    batch = packing.build(packing.layout(np.array([4, 0, 3, 1, 2])), np.arange(packing.rows))
    targets = batch.targets[batch.weights > 0].tolist()
    assert sorted(targets) == sorted([token for text in texts for token in (*text, EOS)])
    assert batch.weights.sum() == packing.total


def test_dtypes_and_contiguity():
    packing, _ = packer((9, 2), 4)
    batch = packing.build(packing.layout(np.arange(2)), np.array([2, 0]))
    kinds = [field.dtype for field in batch]
    assert kinds == [np.int32, np.int32, np.float32, np.int32, np.int32, np.uint32, np.int32]
    assert all(field.flags.c_contiguous for field in batch)
