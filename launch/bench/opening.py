"""Seconds until any row of a large corpus is there, in processes of their own.

The corpus is of sparse files, which take no disk: opening and looking up are measured, not reading
from a disk. Lengths of documents are log-normal with sigma 1.5.

As a script, `python -m launch.bench.opening FOLDER PACKING POSITION`, it opens and reads a batch.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from data import shards
from launch.bench.measure import Row
from launch.provenance import ROOT
from launch.schema import UsageError

PACKINGS = ("pack", "best_fit", "decompose")
SHARDS = 10
B, L = 8, 1024
EPOCHS = 3  # the position is a place in one of the first


def rows(
    tokens: int, documents: int, repetitions: int, progress: Callable[[str], None]
) -> list[Row]:
    """Seconds to open and to read a batch, where an index is still to be made and where it is kept.

    Raises UsageError for documents of less than 2 tokens.
    """
    if documents < SHARDS or tokens < 2 * documents:
        raise UsageError(
            f"--tokens={tokens} and --documents={documents} are no corpus: there must be at least "
            f"{SHARDS} documents, and twice as many tokens"
        )
    taken: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, rng = pathlib.Path(name), np.random.default_rng(0)
        progress("writing")
        write(folder / "corpus", tokens, documents)
        for turn in range(repetitions):
            position = str(rng.integers(0, EPOCHS * tokens // L))
            for packing in PACKINGS if turn % 2 == 0 else reversed(PACKINGS):
                env = os.environ | {"MESHWORK_CACHE": str(folder / f"{packing} {turn}")}
                for state in ("first time", "again"):
                    progress(f"{packing}, {state}, {turn + 1} of {repetitions}")
                    said = _process(str(folder / "corpus"), packing, position, env=env)
                    taken.setdefault((packing, state), []).append(said)
    found = []
    for packing in PACKINGS:
        for state in ("first time", "again"):
            said = taken[packing, state]
            found.append(Row(f"opening, {packing}, {state}", "s", [s["open"] for s in said]))
            what = f"    and a batch of {B} x {L} anywhere"
            found.append(Row(what, "s", [s["batch"] for s in said]))
    return found


def write(folder: pathlib.Path, tokens: int, documents: int) -> None:
    """Token shards without content, with `documents` of at least 1 token and of about `tokens`."""
    folder.mkdir()
    about = {"format": "meshwork tokens", "version": 1, "dtype": "uint16", "request": {}}
    about |= {"tokenizer": {"fingerprint": "bytes"}, "source": {}, "shards": []}
    rng, many, size = np.random.default_rng(0), documents // SHARDS, tokens // SHARDS
    for k in range(SHARDS):
        ends = np.cumsum(rng.lognormal(0, 1.5, many))
        ends = np.arange(1, many + 1) + np.floor(ends / ends[-1] * (size - many)).astype(np.int64)
        offsets, name = np.append(0, ends), f"train-{k:05d}"
        (folder / f"{name}.bin").touch()
        os.truncate(folder / f"{name}.bin", 2 * int(offsets[-1]))
        np.save(folder / f"{name}.offsets.npy", offsets)
        files = {
            file: {"size": (folder / file).stat().st_size, "sha256": ""}
            for file in (f"{name}.bin", f"{name}.offsets.npy")
        }
        shard = {"split": "train", "name": name, "volume": k, "files": files, "bytes": 0}
        about["shards"].append(shard | {"documents": many, "tokens": int(offsets[-1])})
    about["ends"] = [[k + 1, 0] for k in range(SHARDS)]
    (folder / shards.INDEX).write_bytes(shards.content(about))


def _process(*arguments: str, env: dict) -> dict:
    command = [sys.executable, "-m", "launch.bench.opening", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a process that was to be timed said: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main() -> None:
    import data.pipeline

    folder, packing, position = sys.argv[1:]
    began = time.perf_counter()
    corpus = data.pipeline.build(
        seed=0,
        batch_size=B,
        length=L,
        source="tokens",
        sources={"tokens": {"path": folder}},
        packing=packing,
    )
    opened = time.perf_counter()
    corpus.batch(int(position))
    print(json.dumps({"open": opened - began, "batch": time.perf_counter() - opened}))


if __name__ == "__main__":
    main()
