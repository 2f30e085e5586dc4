"""A manifest notices every change of a step and of its own bits, and reads no more than it must."""

import hashlib
import json
import os
import time

import numpy as np
import pytest

from training import manifest

FILES = {"a": b"first", "params/d/b": b"second" * 99, "params/c": b"", "opt/d/e": b"\0" * 4096}


@pytest.fixture
def step(tmp_path):
    folder = tmp_path / "7"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest.write(folder, step=7, run="abc")
    return folder


def test_what_is_written(step):
    first, second, end = (step / manifest.NAME).read_text().split("\n")
    digest = lambda data: hashlib.sha256(data).hexdigest()
    files = {name: [len(data), digest(data)] for name, data in FILES.items()}
    assert json.loads(first) == {"format": 1, "step": 7, "run": "abc", "files": files}
    assert (second, end) == (digest(first.encode()), "")
    assert manifest.read(step) == manifest.Manifest(7, "abc", files, second)
    assert manifest.verify(step, step=7, run="abc") == []
    assert sorted(manifest.listing(step)) == sorted(FILES)
    assert sorted(os.listdir(step)) == ["a", manifest.NAME, "opt", "params"]


def test_every_byte_of_it_counts(step):
    path, rng = step / manifest.NAME, np.random.default_rng(0)
    data = path.read_bytes()
    for position, bit in enumerate(rng.integers(8, size=len(data))):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(bit)
        path.write_bytes(flipped)
        assert manifest.verify(step) == ["manifest.jsonl is damaged"]
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        assert manifest.verify(step) == ["manifest.jsonl is damaged"]
    path.write_bytes(data + b"\n")
    assert manifest.verify(step) == ["manifest.jsonl is damaged"]


def sealed(step, body):
    line = json.dumps(body).encode()
    seal = hashlib.sha256(line).hexdigest().encode()
    (step / manifest.NAME).write_bytes(line + b"\n" + seal + b"\n")


def test_a_manifest_that_is_not_of_this_step(step):
    assert manifest.verify(step, step=8, run="abc") == ["it was saved as step 7"]
    assert manifest.verify(step, step=7, run="x") == ["it is of another run (abc and not x)"]
    sealed(step, {"format": 2, "anything": "else"})
    assert manifest.verify(step) == ["its format is 2 and this version knows 1"]
    for body in ([], {"format": 1}, {"format": 1, "step": 7, "run": "abc", "files": []}):
        sealed(step, body)
        assert manifest.verify(step) == ["manifest.jsonl is not a manifest of Meshwork"]
    (step / manifest.NAME).unlink()
    (phrase,) = manifest.verify(step)
    assert phrase.startswith("it has no manifest, ")
    assert phrase.endswith("; --trust opens it unverified")
    (phrase,) = manifest.verify(step / "a")
    assert phrase.startswith("it has no manifest, ")


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [
        (lambda path: path.unlink(), "params/d/b is missing"),
        (lambda path: os.truncate(path, 7), "params/d/b has 7 bytes and not 594"),
        (lambda path: path.write_bytes(b"Second" * 99), "params/d/b is damaged (its sha256 is "),
        (lambda path: (path.parent / "x").write_bytes(b""), "params/d/x does not belong to it"),
        (lambda path: (path.unlink(), path.mkdir()), "params/d/b is missing"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "params/d/b is missing"),
    ],
)
def test_every_damage_is_named(step, damage, phrase):
    damage(step / "params/d/b")
    (found,) = manifest.verify(step)
    assert found.startswith(phrase)
    assert manifest.verify(step, items=("opt",)) == []
    assert manifest.verify(step, items=("params",)) == [found]
    assert manifest.verify(step, contents=False) == ([] if "sha256" in phrase else [found])


def test_a_long_list_is_cut(step):
    for name in FILES:
        (step / name).unlink()
    wrong = manifest.verify(step)
    assert wrong == sorted(f"{name} is missing" for name in FILES)
    assert manifest.told(wrong) == "; ".join(wrong[:3]) + "; and 1 more"
    assert manifest.told(wrong[:3]) == "; ".join(wrong[:3])


def test_what_was_right_is_read_again_only_when_the_system_says_it_changed(step, monkeypatch):
    monkeypatch.setattr(manifest, "TICK", 0)
    seen, read, real = {}, [], manifest._hash
    spy = lambda path, **own: (read.append(path.relative_to(step).as_posix()), real(path, **own))[1]
    monkeypatch.setattr(manifest, "_hash", spy)
    assert manifest.verify(step, seen=seen, items=("params",)) == []
    assert sorted(read) == ["params/c", "params/d/b"]
    assert manifest.verify(step, seen=seen) == []
    assert sorted(read) == sorted(FILES)
    assert manifest.verify(step, seen=seen) == []
    assert len(read) == len(FILES)

    # The same size, and even the same time of change as far as a program can set it.
    stat = (step / "a").stat()
    (step / "a").write_bytes(b"tsrif")
    os.utime(step / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):
        (phrase,) = manifest.verify(step, seen=seen)
        assert phrase.startswith("a is damaged")
    assert read[len(FILES) :] == ["a", "a"]
    (step / "a").write_bytes(FILES["a"])
    assert manifest.verify(step, seen=seen) == []
    # Of another manifest, nothing has been seen.
    manifest.write(step, step=8, run="abc", files=manifest.read(step).files)
    before = len(read)
    assert manifest.verify(step, seen=seen) == []
    assert len(read) == before + len(FILES)
    seen.clear()
    manifest.remember(step, manifest.read(step), seen)
    assert manifest.verify(step, seen=seen) == []
    assert len(read) == before + len(FILES)


def test_what_has_just_changed_is_not_taken_as_seen(step):
    """A second change within one tick of the file system's clock would not show."""
    seen = {}
    (step / "a").write_bytes(FILES["a"])
    assert manifest.verify(step, seen=seen) == []
    manifest.remember(step, manifest.read(step), seen)
    assert "a" not in {path for _, path in seen}
    time.sleep(2 * manifest.TICK / 1e9)
    assert manifest.verify(step, seen=seen) == []
    assert {path for _, path in seen} == set(FILES)


def test_many_large_files_are_hashed_as_one_by_one(tmp_path):
    rng, wanted = np.random.default_rng(0), {}
    for number in range(20):
        data = rng.bytes(int(rng.integers(1 << 20)))
        (tmp_path / str(number)).write_bytes(data)
        wanted[str(number)] = [len(data), hashlib.sha256(data).hexdigest()]
    assert manifest.digests(tmp_path, manifest.listing(tmp_path), flush=True) == wanted


def test_a_write_that_is_cut_off_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifest.replace(path, b"after")
    assert path.read_bytes() == b"before"


def test_what_file_systems_leave_behind_is_no_damage(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "data").write_bytes(b"weights")
    manifest.write(tmp_path, step=1, run="r")
    (tmp_path / "params" / ".nfs000000012345").write_bytes(b"")
    assert manifest.verify(tmp_path, step=1, run="r") == []
    (tmp_path / "params" / "more").write_bytes(b"")
    assert manifest.verify(tmp_path) == ["params/more does not belong to it"]
