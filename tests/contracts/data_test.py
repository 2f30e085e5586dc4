"""What every file in data/sources, data/tokenizers and data/transforms must do, without asking."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from data import bpe, keyed, methods
from data.batch import Batch, abstract
from data.documents import gather
from data.stream import Stream
from tests.data import written

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
                kinds = getattr(p.annotation, "__args__", (p.annotation,))
                literal = getattr(p.annotation, "__origin__", None) is Literal
                annotated = {type(kind) if literal else kind for kind in kinds}
                assert annotated <= {*plain, type(None)}


@pytest.fixture
def corpus(tmp_path):
    """{source: own arguments} of sources that read files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"x = {k}\n" * (k + 1) for k in range(60)]
    for k, text in enumerate(texts):
        (folder / f"f{k}.py").write_text(text)
    shards = tmp_path / "shards"
    kinds = ["validation" if k % 9 == 0 else "train" for k in range(60)]
    written.write(shards, [[(kind, [k] * (k + 1))] for k, kind in enumerate(kinds)], limit=500)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "stdlib": {"root": str(folder)},
        "text": {"path": str(folder)},
        "hf": {"path": "json", "data_files": str(lines)},
        "tokens": {"path": str(shards)},
    }


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tokenizer(request, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.train([b"def one(x):\n    return two\n"], 300))
    own = {"path": str(path)} if request.param == "hf" else {}
    return methods.make("tokenizers", "Tokenizer", request.param, own)


def drawn(name):
    return hasattr(importlib.import_module(f"data.sources.{name}").Source, "draw")


@pytest.mark.parametrize("name", [name for name in named("Source") if not drawn(name)])
def test_source_of_documents(name, corpus):
    source, again = (
        methods.make("sources", "Source", name, corpus.get(name, {})) for _ in range(2)
    )
    assert isinstance(source.domain, str)
    assert source.fingerprint() == again.fingerprint()
    names = {split: set(source.documents(split).names) for split in ("train", "validation")}
    assert not names["train"] & names["validation"]
    for split in names:
        documents = source.documents(split)
        assert source.count(split) == len(documents) == len(names[split])
        assert source.encoded is not None or documents.tokens.dtype == np.uint8
        assert documents.offsets.dtype == np.int64
        assert (documents.offsets[0], documents.offsets[-1]) == (0, len(documents.tokens))
        assert len(documents.offsets) == len(documents) + 1
        assert (np.diff(documents.offsets) > 0).all()
        everything = np.arange(len(documents.tokens))
        assert np.array_equal(documents.tokens[everything], again.documents(split).tokens[:])
    with pytest.raises(ValueError, match="split"):
        source.documents("elsewhere")


@pytest.mark.parametrize("name", [name for name in named("Source") if drawn(name)])
def test_source_of_rows(name):
    tokenizer = methods.make("tokenizers", "Tokenizer", "symbols", {})
    if name in ("passkey", "records", "arithmetic"):  # Those that write text.
        tokenizer = methods.make("tokenizers", "Tokenizer", "bytes", {})
    source, again = (methods.make("sources", "Source", name, {}) for _ in range(2))
    assert source.fingerprint() == again.fingerprint()
    assert source.encoded is None
    assert min(source.count("train"), source.count("validation")) > 0
    count, length = 12, 512
    keys = keyed.row_keys(keyed.key(name), np.arange(count))
    rows = source.draw(keys, length, tokenizer)
    spec = abstract((count,), length)
    assert [(f.shape, f.dtype) for f in rows] == [(s.shape, s.dtype) for s in spec]
    assert (rows.weights.sum(1) > 0).all()
    assert not rows.weights[rows.segment_ids == 0].any()
    assert 0 <= rows.inputs.min() <= rows.inputs.max() < tokenizer.vocab_size
    assert len({row.tobytes() for row in rows.inputs}) == count
    for k in range(count):
        alone = again.draw(keys[k : k + 1], length, tokenizer)
        assert all(np.array_equal(a[0], b[k]) for a, b in zip(alone, rows, strict=True))
    assert len(source.draw(keys[:0], length, tokenizer).inputs) == 0


@pytest.mark.parametrize("tokenizer", named("Tokenizer"), indirect=True)
def test_tokenizer(tokenizer):
    textual = tokenizer.byte_lengths.any()
    text = "def f(x):\n\treturn 'é✓'" if textual else "7 0 12"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert set(ids.tolist()) <= set(tokenizer.ordinary.tolist())
    assert 0 <= ids.min() <= ids.max() < tokenizer.regular <= tokenizer.vocab_size
    assert tokenizer.byte_lengths[ids].sum() == (len(text.encode()) if textual else 0)
    special = {tokenizer.eos, tokenizer.mask, *(tokenizer.fim or ())} - {None}
    assert all(0 <= i < tokenizer.vocab_size for i in special)
    assert not special & set(tokenizer.ordinary.tolist())
    assert not tokenizer.byte_lengths[list(special)].any()
    prompt = tokenizer.encode_prompt(text)
    assert prompt.tolist() == [tokenizer.eos, *ids.tolist()]
    assert isinstance(tokenizer.fingerprint(), str)
    texts = ["one", "two!"] if textual else ["1", "2 3"]
    documents = gather([np.frombuffer(t.encode(), np.uint8) for t in texts], "ab", np.uint8)
    encoded = tokenizer.encode_documents(documents)
    assert [tokenizer.decode(encoded[k]) for k in range(2)] == texts


@every("Packer")
@pytest.mark.parametrize("epoch", [0, 11])
@pytest.mark.parametrize("length", [4, 8, 64])
def test_packer(name, length, epoch):
    eos, sizes = 256, [5, 1, 12, 30, 2, 64, 129]
    texts = [np.full(n, k) for k, n in enumerate(sizes)]
    stream = Stream(gather(texts, [f"document {k}" for k in range(7)], np.uint16), eos)
    packer = methods.make("transforms", "Packer", name, {}, stream, length)
    order = packer.arrange(np.arange(packer.rows, dtype=np.uint64), epoch)
    assert sorted(order.tolist()) == list(range(packer.rows))
    assert packer.arrange(np.array([1], np.uint64), epoch)[0] == order[1]
    rows = packer.build(order, epoch)
    spec = abstract((packer.rows,), length)
    assert [(f.shape, f.dtype) for f in rows] == [(s.shape, s.dtype) for s in spec]
    for place, row in enumerate(order):  # Any row alone.
        alone = packer.build(order[place : place + 1], epoch)
        assert all(np.array_equal(a[0], b[place]) for a, b in zip(alone, rows, strict=True))
        met = {f"document {k}" for k in rows.inputs[place][rows.weights[place] > 0] if k != eos}
        assert met <= set(packer.names(np.array([row]), epoch))
    targets = sorted(rows.targets[rows.weights > 0].tolist())
    assert targets == sorted([*np.repeat(np.arange(7), sizes).tolist(), *[eos] * 7])
    assert (packer.total, packer.dropped) == (len(targets), 0)
    assert not rows.weights[rows.segment_ids == 0].any()
    for inputs, segments, positions in zip(
        rows.inputs, rows.segment_ids, rows.positions, strict=True
    ):
        for segment in range(1, segments.max() + 1):  # A segment is one document's.
            inside = segments == segment
            assert len(set(inputs[inside].tolist()) - {eos}) <= 1
            assert positions[inside].tolist() == list(range(inside.sum()))


def transforms(method):
    """Those of one kind, which is told by a method."""
    of = lambda name: importlib.import_module(f"data.transforms.{name}").Transform
    return [name for name in named("Transform") if method in vars(of(name))]


def test_every_transform_is_of_one_kind():
    kinds = [name for method in ("__call__", "keep", "locate") for name in transforms(method)]
    assert sorted(kinds) == named("Transform")


def made(name):
    tokenizer = methods.make("tokenizers", "Tokenizer", "bytes", {"fim": True})
    transform = methods.make("transforms", "Transform", name, {})
    if hasattr(transform, "bind"):
        transform.bind(tokenizer)
    return transform, tokenizer


@pytest.mark.parametrize("name", transforms("keep"))
def test_selection(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWORK_CACHE", str(tmp_path))
    selection, tokenizer = made(name)
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 123, n).astype(np.uint8) for n in rng.integers(1, 300, 30)]
    documents = gather([*texts, texts[3]], [str(k) for k in range(31)], np.uint8)
    held = gather([texts[5]], ["held"], np.uint8)
    copy = documents.tokens.copy()
    for whole in (documents, documents.select(np.arange(31)[::-1])):
        kept = selection.keep(whole, held, tokenizer, f"identity {whole.offsets}")
        assert kept.dtype == bool
        assert kept.shape == (31,)
        assert np.array_equal(kept, selection.keep(whole, held, tokenizer, f"{whole.offsets}"))
    assert np.array_equal(documents.tokens, copy)
    assert selection.keep(documents, None, tokenizer, "none held").shape == (31,)


@pytest.mark.parametrize("name", transforms("locate"))
def test_edit(name):
    edit, tokenizer = made(name)
    sizes = np.arange(40)
    keys = keyed.row_keys(keyed.key(name), sizes)
    after = edit.lengths(sizes, keys)
    assert after.dtype == np.int64
    for epoch in (3, 4):
        for k in range(40):
            places = np.arange(after[k])
            spread = np.full(len(places), sizes[k]), np.full(len(places), keys[k])
            before, special = edit.locate(places, *spread, epoch)
            plain = special < 0
            assert sorted(before[plain].tolist()) == list(range(sizes[k]))  # Nothing is lost.
            assert set(special[~plain].tolist()) <= set(tokenizer.fim)
            for at in places[::3]:  # Any token alone.
                own = [array[at : at + 1] for array in (places, *spread)]
                found = edit.locate(*own, epoch)
                assert found[1][0] == special[at]
                assert special[at] >= 0 or found[0][0] == before[at]


@pytest.mark.parametrize("name", transforms("__call__"))
def test_change_of_rows(name):
    transform, tokenizer = made(name)
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
