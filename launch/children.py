"""Runs as processes, each on cores of its own. They end with the process that started them."""

import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

STEP = re.compile(
    rb'^\{"step": (\d+)', re.MULTILINE
)  # of a row; a header may name steps of other runs
# PR_SET_PDEATHSIG is 1: a run whose parent dies is told to save and end, even after a kill -9. It
# is asked for by the run itself, because Python code between fork and exec is not safe.
BOUND = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


class Child:
    """`python -m launch.train` with these arguments; what it says is appended to <folder>/log.txt.

    cores: that it may use; none for all.  inherited: a descriptor that stays open as long as it
    lives.  It has a process group of its own, so that a terminal's Ctrl-C does not reach it.
    """

    MODULE = "launch.train"

    def __init__(
        self,
        arguments: Sequence[str],
        folder: pathlib.Path,
        cores: Sequence[int] = (),
        inherited: Sequence[int] = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.cores, self._log = folder, cores, folder / "log.txt"
        command = [sys.executable, "-m", self.MODULE, *arguments]
        if sys.platform == "linux":
            command = [sys.executable, "-c", BOUND, *command]
        with self._log.open("ab") as log, _on(cores):
            self._from = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                process_group=0,
            )

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Tells it to save and end."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends it at once, without a checkpoint."""
        self._process.kill()
        self._process.wait()

    @property
    def step(self) -> int:
        """The last step that it has logged."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            found = STEP.findall(file.read())
        return int(found[-1]) if found else 0

    def complaint(self) -> str:
        """Why it failed: its sentence, or the last line that it wrote."""
        with self._log.open("rb") as log:
            log.seek(self._from)
            text = log.read().decode("utf-8", errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
        told = [line for line in lines if line.startswith("train: ")]
        status = self._process.returncode
        ended = f"status {status}" if status >= 0 else signal.Signals(-status).name
        return [f"train: ended by {ended} without a word", *lines, *told][-1]


class _on:
    """Processes begun inside may use these cores only; threads that they start inherit that."""

    def __init__(self, cores: Sequence[int]):
        self._cores = set(cores) if hasattr(os, "sched_setaffinity") else set()

    def __enter__(self) -> None:
        if self._cores:
            self._before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._cores)

    def __exit__(self, *exc) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._before)


def shares(parallel: int) -> list[list[int]]:
    """This process's cores for each of so many runs: neighbours, in equal parts.

    More runs than cores share them, one core each. Empty where a system has no such choice.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(parallel)]
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        return [[cores[i % len(cores)]] for i in range(parallel)]
    ends = [i * len(cores) // parallel for i in range(parallel + 1)]
    return [cores[a:b] for a, b in itertools.pairwise(ends)]
