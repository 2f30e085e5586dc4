"""`uv run tokenize`: the same files however it is run, and one sentence for what cannot be."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data import methods, shard_writer, shards
from data.sources.stdlib import Source as Stdlib
from data.sources.tokens import Source
from launch import encoders, tokenize
from launch.config import resolve
from launch.files import ROOT

LINE = "def function_{0}(x):\n    return x * {0} + {1}  # ✓\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of Python files, records and a file without text."""
    folder = tmp_path_factory.mktemp("corpus")
    for k in range(60):
        text = "".join(LINE.format(k, j) for j in range(1 + k % 9))
        (folder / f"file_{k}.py").write_text(text)
    lines = (json.dumps({"text": LINE.format(k, k)}) for k in range(50))
    (folder / "records.jsonl").write_text("\n".join(lines))
    (folder / "empty.py").touch()
    return folder


@pytest.fixture
def call(capsys, monkeypatch):
    """call(*argv): (exit status, stdout, stderr) of main() in this process."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))

    def run(*argv):
        status = 0
        try:
            tokenize.main([*map(str, argv)])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


def contents(folder):
    return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


def sentence(result, *parts):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    for part in ("tokenize: ", *map(str, parts)):
        assert part in err, err


def test_what_is_written_is_the_corpus(call, root, tmp_path):
    out = tmp_path / "a"
    argv = ("--out", out, "--source=stdlib", f"--stdlib.root={root}", "--stdlib.holdout=0.2")
    status, told, err = call(*argv, "--workers=1")
    assert (status, err) == (0, "")
    source, text = Source(path=str(out), verify=True), Stdlib(root=str(root), holdout=0.2)
    for split in ("train", "validation"):
        ours, theirs = source.documents(split), text.documents(split)
        assert np.array_equal(ours.tokens[:], theirs.tokens)
        assert np.array_equal(ours.offsets, theirs.offsets)
        assert list(ours.names) == list(theirs.names)
    assert source.encoded == "bytes"
    tokens = sum(len(source.documents(split).tokens) for split in ("train", "validation"))
    share = len(source.documents("validation").tokens) / tokens
    for part in (f"60 documents, {tokens:,} tokens (uint16), 1.000 bytes", f"{share:.2%} of the"):
        assert part in told
    assert f"{tokens:,} tokens written in " in told
    status, again, _ = call(*argv)
    assert (status, "finished already" in again) == (0, True)


def test_files_do_not_depend_on_the_number_of_processes(call, root, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "TASK_BYTES", 4000)
    argv = ("--source=text", f"--text.path={root}", "--train=300", "--shard_tokens=1500")
    for workers in (1, 2):
        status, _, err = call("--out", tmp_path / f"{workers}", *argv, f"--workers={workers}")
        assert (status, err) == (0, "learning a BPE of 300 ids\n")
    one, two = (contents(tmp_path / name) for name in "12")
    assert one == two
    assert sum(name.endswith("bin") for name in one) > 5


def test_the_printed_keys_train_on_it(call, root, tmp_path):
    out = tmp_path / "a folder"
    argv = ("--source=text", f"--text.path={root}/*.py", "--train=290", "--train_bytes=5000")
    _, told, _ = call("--out", out, *argv, "--hf.eos=<eos>", "--workers=1")
    command = told.splitlines()[-1]
    assert command.startswith("train on it: uv run train --config base --config.data.source=tokens")
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {command}"], text=True)
    keys = [w.split("=", 1) for w in words.splitlines() if w.startswith("--config.")]
    data = resolve("base", {key.removeprefix("--config."): value for key, value in keys})["data"]
    own = data["tokenizers"][data["tokenizer"]]
    tokenizer = methods.make("tokenizers", "Tokenizer", data["tokenizer"], own)
    source = methods.make("sources", "Source", data["source"], data["sources"]["tokens"])
    assert source.encoded == tokenizer.fingerprint()
    documents = source.documents("train")
    text = (root / documents.names[3]).read_text()
    assert tokenizer.decode(documents[3]) == text
    about = source.index.about["tokenizer"]
    assert (about["vocab_size"], about["eos"]) == (tokenizer.vocab_size, tokenizer.eos)


def test_a_budget_of_text(call, root, tmp_path):
    argv = ("--source=text", f"--text.path={root}", "--text.max_bytes=3000", "--workers=1")
    call("--out", tmp_path / "a", *argv)
    source = Source(path=str(tmp_path / "a"))
    own = {"path": str(root), "max_bytes": 3000}
    text = methods.make("sources", "Source", "text", own)
    for split in ("train", "validation"):
        assert list(source.documents(split).names) == list(text.documents(split).names)
        assert np.array_equal(source.documents(split).tokens[:], text.documents(split).tokens)


class Listed:
    """A source of parts and nothing else, one of them without a token, one without a document."""

    domain, encoded = "listed", None

    def parts(self):
        return ["a", "b", "c"]

    def read(self, part):
        read = [("validation", f"{part}0", b"held"), ("train", f"{part}1", b"text " * 3)]
        return {"a": read, "b": [], "c": [("train", "c0", b""), *read]}[part]


def test_a_source_of_parts_alone(call, tmp_path, monkeypatch):
    make = methods.make
    fake = lambda folder, *rest: Listed() if folder == "sources" else make(folder, *rest)
    monkeypatch.setattr(methods, "make", fake)
    for workers in (1, 2):
        out = tmp_path / f"{workers}"
        assert call("--out", out, "--source=stdlib", f"--workers={workers}")[0] == 0
        index = shards.load(out)
        assert list(index.documents("train").names) == ["a1", "c1"]
        assert index.documents("validation")[1].tobytes() == b"h\0e\0l\0d\0"


@pytest.fixture
def large(call, root, tmp_path):
    """(arguments, folder written without interruption) of a corpus of 60 parts."""
    argv = ["--source=text", f"--text.path={root}/*.py", "--text.holdout=0.2", "--shard_tokens=300"]
    call("--out", tmp_path / "learned", *argv, "--train=400", "--workers=1")
    argv += ["--tokenizer=hf", f"--hf.path={tmp_path / 'learned'}"]
    call("--out", tmp_path / "whole", *argv, "--workers=1")
    return argv, tmp_path / "whole"


# A shell starts what runs in its background with SIGINT ignored.
SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from launch import encoders, tokenize
encode, encoders.TASK_BYTES = encoders.encode, 1

def slowly(*args):
    time.sleep(0.3)
    return encode(*args)

encoders.encode = slowly
if __name__ == "__main__":
    tokenize.main()
"""


def children(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def ended(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_command_goes_on_to_the_same_bytes(call, large, tmp_path, signum):
    argv, whole = large
    out, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text(SLOW)
    command = [sys.executable, str(program), "--out", str(out), *argv, "--workers=2"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        while len(list(out.glob("train-*.bin"))) < 3:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        workers = children(run.pid)
        run.send_signal(signum)
        _, err = run.communicate(timeout=60)
    while not all(map(ended, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (out / shards.INDEX).exists()
    about = shards.read(out / shards.UNFINISHED)
    assert 1 <= len(about["ends"]) < len(shards.load(whole).about["ends"])
    if signum == signal.SIGINT:
        assert run.returncode == 130
        assert f"to go on: uv run tokenize --out {out}" in err
        assert "Traceback" not in err
    kept = {
        file: (out / file).stat().st_mtime_ns
        for shard in about["shards"]
        for file in shard["files"]
    }
    status, told, _ = call("--out", out, *argv, "--workers=1")
    assert (status, "tokens written" in told) == (0, True)
    found = {name: file for name, file in contents(out).items() if not name.startswith(".")}
    assert found == contents(whole)
    assert {file: (out / file).stat().st_mtime_ns for file in kept} == kept


def test_a_folder_of_other_settings_or_of_another_corpus(call, root, tmp_path):
    corpus = shutil.copytree(root, tmp_path / "corpus")
    argv = ("--out", tmp_path / "a", "--source=text", f"--text.path={corpus}", "--workers=1")
    assert call(*argv)[0] == 0
    before = contents(tmp_path / "a")
    for other, part in {
        "--shard_tokens=7": "was begun with shard_tokens 100000000 and this command has 7",
        "--text.holdout=0.5": "source arguments",
        "--tokenizers.bytes.fim": "tokenizer arguments {} and this command has {'fim': True}",
        "--train=300": "tokenizer 'bytes' and this command has 'hf'",
    }.items():
        sentence(call(*argv, other), tmp_path / "a", part)
    (corpus / "file_3.py").write_text("changed")
    sentence(call(*argv), "was begun with corpus ")
    assert contents(tmp_path / "a") == before


def test_another_tokenizer_in_the_same_file(call, root, tmp_path):
    for name, count in (("a", 300), ("b", 310)):
        corpus = ("--source=text", f"--text.path={root}", "--workers=1")
        call("--out", tmp_path / name, *corpus, f"--train={count}")
    argv = ("--out", tmp_path / "c", *corpus, "--tokenizer=hf", f"--hf.path={tmp_path / 'a'}")
    assert call(*argv)[0] == 0
    shutil.copy(tmp_path / "b" / "tokenizer.json", tmp_path / "a")
    sentence(call(*argv), "was begun with a tokenizer of fingerprint", "give it back its tokenizer")


def test_nothing_is_held_out(call, root, tmp_path):
    argv = ("--out", tmp_path / "a", f"--text.path={root}", "--text.holdout=0", "--workers=1")
    _, told, _ = call(*argv)
    assert told.splitlines()[-1].endswith(
        "--config.data.tokenizer=bytes --config.train.eval_every=none"
    )
    assert call(*argv)[1].splitlines()[1] == "it was finished already"


def test_a_lost_file_is_written_again(call, root, tmp_path):
    argv = ("--out", tmp_path / "a", "--source=text", f"--text.path={root}", "--train=300")
    argv += ("--workers=1", "--shard_tokens=2000")
    call(*argv)
    before = contents(tmp_path / "a")
    (tmp_path / "a" / "train-00002.bin").unlink()
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert call(*argv)[0] == 0
    assert contents(tmp_path / "a") == before


def test_verify(call, root, tmp_path):
    out = tmp_path / "a"
    call("--out", out, "--source=text", f"--text.path={root}", "--workers=1")
    status, told, err = call("--verify", out)
    assert (status, err) == (0, "")
    assert "6 files of " in told
    with (out / "train-00000.bin").open("r+b") as file:
        file.write(b"\xff")
    sentence(call("--verify", out), out / "train-00000.bin", "has the checksum")
    sentence(call("--verify", tmp_path), tmp_path, "has no index.json")
    sentence(call("--verify", out, "--workers=2"), "--workers has no effect beside it")


def test_ids_are_not_tokenized_again(call, root, tmp_path):
    call("--out", tmp_path / "a", "--source=text", f"--text.path={root}", "--workers=1")
    argv = ("--out", tmp_path / "b", "--source=tokens", f"--tokens.path={tmp_path / 'a'}")
    sentence(call(*argv), "holds ids already")


def test_two_writers(call, tmp_path):
    with shard_writer.lock(tmp_path / "a"):
        sentence(call("--out", tmp_path / "a", "--source=stdlib"), "Another process is writing to")


class Many(Listed):
    """Its parts have no known size, so each is encoded on its own."""

    def parts(self):
        return ["a", "b", "c", "d"]

    def read(self, part):
        return [("train", part, b"text")]


class Dying:
    def encode_documents(self, documents):
        os._exit(9)


def test_a_worker_that_is_killed_is_a_sentence():
    with pytest.raises(ValueError, match="A worker process was killed, perhaps for want of memory"):
        list(encoders.encoded(Many(), Dying(), 0, workers=2))


def test_what_is_asked_of_the_folder_is_kept(call, root, tmp_path):
    argv = ("--source=text", f"--text.path={root}", "--workers=1", "--names=false")
    call("--out", tmp_path / "a", *argv, "--dtype=uint32")
    index = shards.load(tmp_path / "a")
    assert index.about["dtype"] == "uint32"
    assert index.documents("train").names[5] == "train-00000#5"
