"""What every file in data/sources, data/tokenizers and data/transforms must do, without asking."""

import dataclasses
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest

from data import keyed, methods
from data.batch import Batch, abstract
from data.documents import gather

HOME = Path(__file__).parents[2] / "data"
KINDS = {"Source": "sources", "Tokenizer": "tokenizers", "Packer": "transforms"}
KINDS |= {"Transform": "transforms"}


def named(kind):
    folder = KINDS[kind]
    modules = sorted(path.stem for path in (HOME / folder).glob("*.py") if path.stem != "__init__")
    return [m for m in modules if hasattr(importlib.import_module(f"data.{folder}.{m}"), kind)]


def every(kind):
    return pytest.mark.parametrize("name", named(kind))


def test_every_file_is_a_method():
    for folder in sorted(set(KINDS.values())):
        kinds = [kind for kind, home in KINDS.items() if home == folder]
        files = {path.stem for path in (HOME / folder).glob("*.py")} - {"__init__"}
        assert files == {name for kind in kinds for name in named(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_own_arguments_have_annotations_and_defaults(kind):
    plain = (int, float, bool, str)
    for name in named(kind):
        method = getattr(importlib.import_module(f"data.{KINDS[kind]}.{name}"), kind)
        for p in inspect.signature(method).parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                assert p.default is None or isinstance(p.default, plain)
                annotated = set(getattr(p.annotation, "__args__", (p.annotation,)))
                assert annotated <= {*plain, type(None)}


@pytest.fixture
def corpus(tmp_path):
    """Sources that read files take `root`."""
    for k in range(30):
        (tmp_path / f"f{k}.py").write_text(f"x = {k}\n" * (k + 1))
    return {"root": str(tmp_path)}


@every("Source")
def test_source(name, corpus):
    method = importlib.import_module(f"data.sources.{name}").Source
    own = corpus if "root" in inspect.signature(method).parameters else {}
    source, again = (methods.make("sources", "Source", name, own) for _ in range(2))
    assert isinstance(source.domain, str)
    assert source.fingerprint() == again.fingerprint()
    names = {split: set(source.documents(split).names) for split in ("train", "validation")}
    assert not names["train"] & names["validation"]
    for split in names:
        documents = source.documents(split)
        assert source.count(split) == len(documents)
        assert documents.tokens.dtype == np.uint8
        assert documents.offsets.dtype == np.int64
        assert (documents.offsets[0], documents.offsets[-1]) == (0, len(documents.tokens))
        assert len(documents.offsets) == len(documents) + 1
        assert (np.diff(documents.offsets) > 0).all()
        assert np.array_equal(documents.tokens, again.documents(split).tokens)
    with pytest.raises(ValueError, match="split"):
        source.documents("elsewhere")


@every("Tokenizer")
def test_tokenizer(name):
    tokenizer = methods.make("tokenizers", "Tokenizer", name, {})
    text = "def f(x):\n\treturn 'é✓'"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 <= ids.min() <= ids.max() < tokenizer.regular <= tokenizer.vocab_size
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    special = {tokenizer.eos, tokenizer.mask}
    assert len(special) == 2
    assert all(tokenizer.regular <= i < tokenizer.vocab_size for i in special)
    assert not tokenizer.byte_lengths[list(special)].any()
    documents = gather([np.frombuffer(t, np.uint8) for t in (b"one", b"two!")], "ab", np.uint8)
    encoded = tokenizer.encode_documents(documents)
    assert [tokenizer.decode(encoded[k]) for k in range(2)] == ["one", "two!"]


@every("Packer")
@pytest.mark.parametrize("length", [3, 8, 64])
def test_packer(name, length):
    eos, sizes = 256, [5, 1, 12, 30, 2]
    texts = [np.r_[eos, np.full(n, k)] for k, n in enumerate(sizes)]
    documents = gather(texts, "abcde", np.uint16)
    documents = dataclasses.replace(documents, tokens=np.append(documents.tokens, np.uint16(eos)))
    packer = methods.make("transforms", "Packer", name, {}, documents, length)
    layout = packer.layout(np.array([3, 0, 4, 1, 2]))
    chunks = np.arange(packer.rows)
    rows = packer.build(layout, chunks)
    spec = abstract((packer.rows,), length)
    assert [(f.shape, f.dtype) for f in rows] == [(s.shape, s.dtype) for s in spec]
    for k in chunks[::-1]:  # Any row alone.
        alone = packer.build(layout, chunks[k : k + 1])
        assert all(np.array_equal(a[0], b[k]) for a, b in zip(alone, rows, strict=True))
    targets = sorted(rows.targets[rows.weights > 0].tolist())
    assert targets == sorted([*np.repeat(np.arange(5), sizes).tolist(), *[eos] * 5])
    assert not rows.weights[rows.segment_ids == 0].any()
    for inputs, segments in zip(rows.inputs, rows.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):  # A segment is one document's.
            assert len(set(inputs[segments == segment].tolist()) - {eos}) <= 1


@every("Transform")
def test_transform(name):
    tokenizer = methods.make("tokenizers", "Tokenizer", "bytes", {})
    transform = methods.make("transforms", "Transform", name, {})
    count, length = 12, 64
    rng = np.random.default_rng(0)
    segments = np.ones((count, length), np.int32)
    segments[::3, 40:] = 0
    before = abstract((count,), length, np.zeros)._replace(
        inputs=np.where(segments, rng.integers(0, 256, segments.shape), tokenizer.eos).astype("i4"),
        targets=np.full((count, length), 7, np.int32),
        weights=(segments > 0).astype(np.float32),
        segment_ids=segments,
    )
    copies = [field.copy() for field in before]
    keys = keyed.row_keys(keyed.key(name), np.arange(count))
    after = transform(before, keys, tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(copies, before, strict=True))  # Not in place.
    assert [(f.shape, f.dtype) for f in after] == [(f.shape, f.dtype) for f in before]
    for k in range(count):  # A row depends on itself and its key alone.
        alone = transform(Batch(*(f[k : k + 1] for f in before)), keys[k : k + 1], tokenizer)
        assert all(np.array_equal(a[0], b[k]) for a, b in zip(alone, after, strict=True))
    assert not after.weights[after.segment_ids == 0].any()
    for ids in (after.inputs, after.targets):
        assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
