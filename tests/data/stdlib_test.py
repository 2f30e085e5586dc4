import shutil
import time

import pytest

from data.sources.stdlib import Source


def write(root, count=60):
    for k in range(count):
        path = root / f"package{k % 7}" / f"module{k}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# {k}\n".encode() * (k + 1))
    for skipped in ("test/x.py", "package1/tests/y.py", "site-packages/z.py", "config-3.12/w.py"):
        (root / skipped).parent.mkdir(parents=True, exist_ok=True)
        (root / skipped).write_text("skipped")
    (root / "empty.py").touch()
    (root / "other.txt").write_text("other")
    (root / "_sysconfigdata_linux.py").write_text("generated")
    return str(root)


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "lib")


def test_every_file_is_in_one_split(root):
    source = Source(root=root, holdout=0.3)
    train, held_out = source.documents("train"), source.documents("validation")
    assert not set(train.names) & set(held_out.names)
    names = sorted([*train.names, *held_out.names])
    assert names == sorted(f"package{k % 7}/module{k}.py" for k in range(60))
    assert list(train.names) == sorted(train.names)
    assert 6 <= len(held_out) <= 30  # 18 expected; four standard deviations are 14.
    k = int(train.names[3].split("module")[1].removesuffix(".py"))
    assert train[3].tobytes() == f"# {k}\n".encode() * (k + 1)


def test_splits_stay_when_the_root_moves_or_files_come(root, tmp_path):
    before = Source(root=root, holdout=0.3)
    moved = shutil.move(root, tmp_path / "elsewhere" / "deeper")
    after = Source(root=str(moved), holdout=0.3)
    assert after.documents("validation").names == before.documents("validation").names
    assert after.fingerprint() == before.fingerprint()
    (moved / "new.py").write_text("new")
    more = Source(root=str(moved), holdout=0.3)
    gone = {"new.py"}
    assert set(more.documents("train").names) - gone == set(before.documents("train").names)
    assert more.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("change", ["byte", "name", "holdout"])
def test_fingerprint_notices(root, tmp_path, change):
    before = Source(root=root, holdout=0.3).fingerprint()
    path = tmp_path / "lib" / "package3" / "module3.py"
    if change == "byte":
        path.write_bytes(b"#!" + path.read_bytes()[2:])
    elif change == "name":
        path.rename(path.with_name("module3b.py"))
    assert Source(root=root, holdout=0.9 if change == "holdout" else 0.3).fingerprint() != before


def test_budgets_are_nested_and_leave_validation_whole(root):
    whole = Source(root=root, holdout=0.3)
    small, large = (Source(root=root, holdout=0.3, max_bytes=n) for n in (1000, 3000))
    assert len(small.documents("train").tokens) == 1000
    assert len(large.documents("train").tokens) == 3000
    assert set(small.documents("train").names) <= set(large.documents("train").names)
    assert small.documents("validation").names == whole.documents("validation").names


def test_errors_are_sentences(tmp_path, root):
    with pytest.raises(ValueError, match=r"no non-empty \*\.py file in .*nowhere"):
        Source(root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holdout .* got 1"):
        Source(root=root, holdout=1.0)
    with pytest.raises(ValueError, match=r"max_bytes .* got 0"):
        Source(root=root, max_bytes=0)
    with pytest.raises(ValueError, match=r"'validation' .* raise holdout"):
        Source(root=root, holdout=0.0).documents("validation")
    with pytest.raises(ValueError, match="no split 'test'"):
        Source(root=root).documents("test")


def test_the_embedded_corpus():
    start = time.perf_counter()
    source = Source()
    # Measured 0.1 s; a loaded machine is given ten times that and more.
    assert time.perf_counter() - start < 5
    train, held_out = source.documents("train"), source.documents("validation")
    assert 5e6 < len(train.tokens) < 3e7
    assert 0.01 < len(held_out.tokens) / len(train.tokens) < 0.2
    folders = {folder for name in train.names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert source.fingerprint() == Source().fingerprint()
