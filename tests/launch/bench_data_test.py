"""The data's benchmark with tiny sizes, and what it measures with."""

import json

import numpy as np
import pytest

from data import shards
from data.documents import gather
from launch.bench import batches, data, opening
from launch.schema import UsageError
from tests.launch.bench_test import tiny, without

SMALL = (
    *("--batch=2", "--length=64", "--seconds=0.001", "--step_seconds=0.001", "--repetitions=2"),
    *("--tokens=50000", "--documents=200", "--processes=1"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "data.json"
    without("data", f"--config={tiny(folder)}", *SMALL, "--out", out)
    return json.loads(out.read_text())


def test_it_runs_without_the_packages_of_training(report):
    names = [row["what"] for row in report["rows"]]
    assert names[:2] == ["step, 2 batches ahead in a thread", "step, no batch ahead"]
    sizes = {"passkey": ("1 x 512", "1 x 512")}
    for path in batches.PATHS:
        for size in sizes.get(path, ("2 x 32", "2 x 64")):
            assert f"{path}, {size}" in names
    for packing in opening.PACKINGS:
        for state in ("first time", "again"):
            assert f"opening, {packing}, {state}" in names
    said = " ".join(report["notes"])
    assert "grain is not installed" in said
    assert "50,000 tokens" in said


def test_every_sample_is_kept(report):
    for row in report["rows"]:
        assert all(value > 0 for value in row["ours"])
        assert len(row["peer"]) in (0, len(row["ours"]))
    step, pack = (
        next(row for row in report["rows"] if row["what"].startswith(name))
        for name in ("step", "pack")
    )
    assert len(step["ours"]) == len(pack["peer"]) == 2
    assert step["least"] == 0.98
    assert step["ratio"]["median"] > 0


@pytest.fixture
def texts():
    documents = [np.arange(k, k + 40 + k, dtype=np.uint8) for k in range(30)]
    return gather(documents, [str(k) for k in range(30)], np.uint8)


def test_slicing_makes_inputs_and_targets(texts):
    inputs, targets = batches._slicing(texts, 4, 16)()
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.flags.c_contiguous
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_grain_joins_and_cuts_the_same_documents(texts):
    build = batches._grain(texts, 4, 16)
    rows = build()
    assert rows["ids"].shape == rows["ids_segment_ids"].shape == (4, 17)
    held = np.concatenate([build()["ids"].ravel() for _ in range(40)])
    assert set(held.tolist()) == {256, *texts.tokens.tolist()}


def test_a_core_is_paid_for_what_it_computes():
    core = batches.Core(lambda: sum(range(1000)), 2, 8, 0.002)
    assert core() > 0
    assert len(core.busy) == 1
    assert 0 < core.busy[0] < 1.5


def test_sparse_shards_are_a_corpus(tmp_path):
    opening.write(tmp_path / "corpus", 100_000, 300)
    found = shards.load(tmp_path / "corpus").documents("train")
    assert len(found) == 300
    assert len(found.tokens) == found.offsets[-1] == 100_000
    sizes = np.diff(found.offsets)
    assert sizes.min() >= 1
    assert sizes.max() > 3 * np.median(sizes)


@pytest.mark.parametrize("own", [{"tokens": 100}, {"documents": 3}])
def test_a_corpus_of_nothing_is_refused(own):
    sizes = {"tokens": 1000, "documents": 100} | own
    with pytest.raises(UsageError, match="are no corpus"):
        opening.rows(**sizes, repetitions=1, progress=lambda text: None)


@pytest.mark.parametrize("size", [(0, 64), (2, 16), (2, 96)])
def test_batches_that_not_every_path_makes_are_refused(size, tmp_path):
    with pytest.raises(UsageError, match=f"batches of {size[0]} x {size[1]} cannot be made"):
        data.bench(config=tiny(tmp_path), batch=size[0], length=size[1])
