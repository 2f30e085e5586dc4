"""Seconds from the command to the first step, in processes of their own."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

from launch.bench.measure import Row
from launch.provenance import ROOT

IMPORTS = "import launch.flags, launch.report, launch.setup, training.loop"
SECONDS_AT_MOST = 600
POLL = 0.005  # seconds


@dataclasses.dataclass(frozen=True)
class Start:
    """Seconds: the whole, until the initial state was there, and from then through the first step.

    imports: those of the whole spent importing.
    """

    whole: float
    state: float
    step: float
    imports: float


def rows(
    path: str, config: Mapping, repetitions: int, progress: Callable[[str], None]
) -> list[Row]:
    """Meshwork's `train` against the peer's script, with an empty compilation cache and a full one.

    path: of the configuration; config: the same, resolved.
    """
    taken: dict[str, list[Start]] = {}
    for turn in range(repetitions):
        order = ("meshwork", "bare") if turn % 2 == 0 else ("bare", "meshwork")
        for who, cache, start in _turn(order, path, config, progress):
            taken.setdefault(f"{who}, {cache}", []).append(start)
    return [row for cache in ("cold", "warm") for row in _rows(taken, cache)]


def _turn(order, path, config, progress) -> Iterator[tuple[str, str, Start]]:
    for who in order:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder)
            for cache in ("cold", "warm"):
                progress(f"{who}, {cache} cache")
                env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
                run = place / cache
                run.mkdir()
                yield (
                    who,
                    cache,
                    (_ours(path, run, env) if who == "meshwork" else _bare(config, run, env)),
                )


def _rows(taken: Mapping[str, list[Start]], cache: str) -> Iterator[Row]:
    names = {
        "whole": f"command to first step, {cache} cache",
        "imports": "    imports",
        "state": "    until the initial state is there",
        "step": "    the first step, compiled",
    }
    for field, what in names.items():
        sides = (
            [getattr(start, field) for start in taken[f"{who}, {cache}"]]
            for who in ("meshwork", "bare")
        )
        yield Row(what, "s", *sides)


def _ours(path: str, run: pathlib.Path, env: Mapping) -> Start:
    command = ("-m", "launch.train", "--config", path, "--config.steps=1", "--workdir", str(run))
    began = time.time()
    with open(run / "stderr", "w", encoding="utf-8") as stderr:
        process = _spawn(command, env, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        # What follows the first step (held-out score, checkpoint) is not waited for.
        row = _first_row(process, run)
    finally:
        process.kill()
        process.wait()
    whole, step = row["time"] - began, row["seconds_to_first_step"]
    return Start(whole, whole - step, step, _imports(env))


def _first_row(process: subprocess.Popen, run: pathlib.Path) -> dict:
    path, until = run / "metrics.jsonl", time.monotonic() + SECONDS_AT_MOST
    while time.monotonic() < until:
        ended = process.poll() is not None
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        if len(lines) > 2:  # The header, the first step, and what follows its end of line.
            return json.loads(lines[1])
        if ended:
            break
        time.sleep(POLL)
    said = (run / "stderr").read_text(encoding="utf-8")[-2000:]
    raise RuntimeError(
        f"train took no step in {SECONDS_AT_MOST} s or ended before; it said: {said}"
    )


def _imports(env: Mapping) -> float:
    began = time.time()
    command = ("-c", f"{IMPORTS}, time; print(time.time())")
    return float(_finished(_spawn(command, env, stdout=subprocess.PIPE))) - began


def _bare(config: Mapping, run: pathlib.Path, env: Mapping) -> Start:
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    began = time.time()
    command = ("-m", "launch.bench.bare", str(run / "config.json"))
    said = json.loads(_finished(_spawn(command, env, stdout=subprocess.PIPE)))
    until = {name: said[name] - began for name in ("imported", "built", "stepped")}
    whole, state = until["stepped"], until["built"]
    return Start(whole, state, whole - state, until["imported"])


def _spawn(command, env: Mapping, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, text=True, **streams)


def _finished(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=SECONDS_AT_MOST)
    if process.returncode:
        raise RuntimeError(f"a process that was to be timed ended with {process.returncode}")
    return said
