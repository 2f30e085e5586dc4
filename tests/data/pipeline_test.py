import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from data.batch import Batch, abstract, from_words
from data.pipeline import build

EOS = 256


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for k in range(40):
        size = int(rng.integers(1, 120))
        (folder / f"f{k}.py").write_bytes(rng.integers(0, 256, size, np.uint8).tobytes())
    return str(folder)


def make(root, **keys):
    own = {"seed": 0, "batch_size": 8, "length": 16} | keys
    return build(**own, sources={"stdlib": {"root": root, "holdout": 0.3}})


def same(one: Batch, other: Batch) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def flat(batch: Batch) -> Batch:
    """[A b ..] as [B ..]."""
    return Batch(*(field.reshape(-1, *field.shape[2:]) for field in batch))


@pytest.mark.parametrize("transforms", [(), ("masked_lm",)])
def test_a_row_depends_on_its_number_alone(root, transforms):
    data = make(root, transforms=transforms)
    start, count = data.rows() - 7, 24  # Across the border of an epoch.
    alone = {k: data.row(start + k) for k in reversed(range(count))}
    fresh = make(root, transforms=transforms, batch_size=count, micro_batches=3)
    for built in (data.local(start, 0, count), flat(fresh.batch(start)), flat(fresh.batch(start))):
        assert all(same(Batch(*(f[k] for f in built)), alone[k]) for k in range(count))
    parts = [flat(data.batch(start + 8 * k)) for k in range(3)]
    assert same(flat(fresh.batch(start)), Batch(*map(np.concatenate, zip(*parts, strict=True))))
    assert same(data.batch(start, rows=count), make(root, transforms=transforms).batch(start, 24))


def test_a_batch_is_the_contract(root):
    data = make(root, micro_batches=2)
    batch = data.batch(3)
    spec = abstract((2, 4), 16)
    assert [(f.shape, f.dtype) for f in batch] == [(s.shape, s.dtype) for s in spec]
    assert from_words(batch.sample).tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert (data.vocab_size, data.domains, batch.domain.max()) == (258, ("stdlib",), 0)


@pytest.mark.parametrize("epoch", [0, 1, 2**35])
def test_an_epoch_is_the_corpus(root, epoch):
    data = make(root)
    rows = data.local(epoch * data.rows(), 0, data.rows())
    documents = data.source.documents("train")
    corpus = [*documents.tokens.tolist(), *[EOS] * len(documents)]
    assert sorted(rows.targets[rows.weights > 0].tolist()) == sorted(corpus)
    assert len(corpus) == data.tokens()


def test_epochs_and_seeds_differ(root):
    data = make(root)
    n = data.rows()
    first = data.local(0, 0, n)
    assert not same(first, data.local(n, 0, n)._replace(sample=first.sample))
    assert not same(first, make(root, seed=1).local(0, 0, n))
    assert same(first, make(root, seed=np.int64(0)).local(0, 0, n))


def test_large_numbers(root):
    data = make(root, transforms=("masked_lm",))
    for position in (2**32 - 3, 2**53 + 1, 2**63 - 4, 2**64 - 8):
        batch = flat(data.batch(position))
        assert from_words(batch.sample).tolist() == [position + k for k in range(8)]
        assert same(Batch(*(f[5] for f in batch)), data.row(position + 5))
    for first in (-1, 2**64 - 7):
        with pytest.raises(ValueError, match=r"within 0 \.\. 2\*\*64"):
            data.batch(first)


def test_documents_do_not_mix(root):
    data = make(root, length=64)
    rows = data.local(0, 0, data.rows())
    for inputs, segments, positions in zip(
        rows.inputs, rows.segment_ids, rows.positions, strict=True
    ):
        valid = segments > 0
        begins = (inputs == EOS) & valid
        begins[0] = True
        assert np.array_equal(segments[valid], np.cumsum(begins)[valid])
        assert np.array_equal(positions[valid] == 0, begins[valid])
        assert (np.diff(positions)[~begins[1:] & valid[1:]] == 1).all()


INDICES = [
    (slice(None), slice(None), slice(None)),
    (slice(0, 1), slice(2, 4), slice(None)),
    (slice(1, 2), slice(0, 2), slice(4, 12)),
    (slice(1, 2), slice(0, 2)),
    (slice(None), slice(1, 2), slice(0, 4)),
]


def cut(batch: Batch, index: tuple) -> Batch:
    return Batch(*(f[index if f.ndim == 3 and f.shape[-1] > 2 else index[:2]] for f in batch))


def test_parts_are_those_of_the_batch(root):
    data = make(root, micro_batches=2, transforms=("masked_lm",), prefetch=0)
    for position in (0, data.rows() - 3, 2**40):
        parts = next(data.iterate(position, INDICES))
        for part, index in zip(parts, INDICES, strict=True):
            assert same(part, cut(data.batch(position), index))


def test_parts_build_only_their_rows_and_once(root, monkeypatch):
    data, built = make(root, micro_batches=2, prefetch=0), []
    numbered = data._numbered
    monkeypatch.setattr(data, "_numbered", lambda n: (built.append(n.tolist()), numbered(n))[1])
    next(data.iterate(10, [INDICES[1], INDICES[2], INDICES[3], INDICES[1]]))
    assert built == [[12, 13], [14, 15]]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_batches_are_the_same(root, depth):
    data = make(root, prefetch=depth, micro_batches=2)
    batches = data.iterate(5)
    for step in range(12):
        assert same(next(batches), data.batch(5 + 8 * step))
    batches.close()
    parts = data.iterate(5, INDICES)
    for step in range(3):
        whole = data.batch(5 + 8 * step)
        got = next(parts)
        assert all(same(part, cut(whole, i)) for part, i in zip(got, INDICES, strict=True))
    parts.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]


def test_worker_processes_give_the_same(root, tmp_path):
    program = f"""
import numpy as np
from data.pipeline import build
if __name__ == "__main__":
    sources = dict(stdlib=dict(root={root!r}))
    data = build(seed=0, batch_size=8, length=16, workers=1, sources=sources)
    batches = data.iterate(2**40 + 3)
    for step in range(3):
        for got, want in zip(next(batches), data.batch(2**40 + 3 + 8 * step), strict=True):
            assert type(got) is np.ndarray and np.array_equal(got, want), step
    batches.close()
"""
    path = tmp_path / "program.py"
    path.write_text(program)
    result = run_python([str(path)])
    assert (result.returncode, result.stderr) == (0, "")


def test_imports_numpy_only():
    program = (
        "import sys, data.pipeline as p, data.transforms.masked_lm\n"
        "next(p.build(seed=0, batch_size=2, length=8).iterate(0))\n"
        "print(sorted({'jax', 'grain', 'absl', 'torch'} & set(sys.modules)))"
    )
    result = run_python(["-W", "error", "-c", program])
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def run_python(arguments):
    home = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(home), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("transforms", [(), ("masked_lm",)])
def test_evaluation_is_fixed_and_complete(root, transforms):
    data = make(root, transforms=transforms)
    batches = list(data.evaluation(5))
    again = list(make(root, transforms=transforms, seed=9, batch_size=2).evaluation(5))
    assert len(batches) == -(-data.rows("validation") // 5)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    assert {batch.inputs.shape for batch in batches} == {(5, 16)}
    joined = Batch(*map(np.concatenate, zip(*batches, strict=True)))
    assert not joined.weights[data.rows("validation") :].any()
    assert not joined.segment_ids[data.rows("validation") :].any()
    if not transforms:
        documents = data.source.documents("validation")
        targets = joined.targets[joined.weights > 0]
        corpus = [*documents.tokens.tolist(), *[EOS] * len(documents)]
        assert sorted(targets.tolist()) == sorted(corpus)
        assert data.tokenizer.count_bytes(joined.targets, joined.weights) == len(documents.tokens)


def test_evaluation_limit_is_a_beginning(root):
    data = make(root)
    whole = Batch(*map(np.concatenate, zip(*data.evaluation(4), strict=True)))
    some = Batch(*map(np.concatenate, zip(*data.evaluation(4, limit=6), strict=True)))
    assert same(Batch(*(f[:6] for f in some)), Batch(*(f[:6] for f in whole)))
    assert some.weights.shape[0] == 8
    assert not some.weights[6:].any()


def test_fingerprint_is_of_the_corpus(root, tmp_path):
    assert make(root).fingerprint == make(root, seed=3, length=8, batch_size=2).fingerprint
    (tmp_path / "f.py").write_text("x")
    other = build(seed=0, batch_size=1, length=4, sources={"stdlib": {"root": str(tmp_path)}})
    assert other.fingerprint != make(root).fingerprint
    with pytest.raises(ValueError, match=r"'validation' .* no file"):
        next(other.evaluation(2))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 6, "micro_batches": 4}, r"batch_size 6 is not divisible by .* 4"),
        ({"batch_size": 0}, r"data\.batch_size must be .* at least 1, got 0"),
        ({"length": -1}, r"data\.length .* got -1"),
        ({"length": 2.5}, r"data\.length must be an integer .* got 2\.5"),
        ({"prefetch": -1}, r"data\.prefetch .* at least 0, got -1"),
        ({"transforms": ("masked_ml",)}, r"Nearest: masked_lm"),
        ({"transforms": "masked_lm"}, "tuple of names"),
        ({"transforms": ("pack",)}, "no class Transform"),
        ({"packing": "packs"}, "Nearest: pack"),
        ({"source": "std"}, "Nearest: stdlib"),
        ({"tokenizer": "byte"}, "Nearest: bytes"),
        ({"transforms": ("masked_lm",), "transform": {"masked_lm": {"rate": 2.0}}}, "got 2.0"),
        ({"transforms": ("masked_lm",), "transform": {"masked_lm": {"rte": 0}}}, "Nearest: rate"),
    ],
)
def test_bad_arguments_are_sentences(root, keys, message):
    with pytest.raises(ValueError, match=message):
        make(root, **keys)


def test_bad_requests_are_sentences(root):
    data = make(root, micro_batches=4)
    for call, message in [
        (lambda: data.batch(0, rows=6), "6 rows do not divide into 4"),
        (lambda: data.rows("test"), "no split 'test'"),
        (lambda: next(data.evaluation(0)), "rows_per_batch .* got 0"),
        (lambda: next(data.evaluation(2, limit=0)), "limit .* got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
