"""The run that is killed: its configuration, and one life of it as real processes."""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from launch.chaos.verdict import Violation
from launch.config import resolve
from launch.files import ROOT, render

# Small, and with every sort of state that a restart has to bring back: parameters, moments, their
# moving average, dropout drawn anew each step, packed rows, and a mixture that follows its losses.
SETTING = {
    "steps": "2000",
    "ema": "0.99",
    "data.batch_size": "8",
    "data.length": "64",
    "data.micro_batches": "2",
    "data.mixture": "code,pairs",
    "data.mixing": "online",
    "data.domains.code.source": "stdlib",
    "data.domains.code.max_bytes": "300000",
    "data.domains.code.holdout": "0.005",
    "data.domains.pairs.source": "recall",
    "data.domains.pairs.vocab": "256",
    "model.dropout": "0.1",
    "train.eval_every": "25",
    "train.save_every": "40",
    "train.keep": "1",
    "train.keep_every": "400",
    "train.sample_tokens": "4",
}
FORCED = {"train.log_every": "1"}  # What is not logged cannot be compared.
TRAIN = (sys.executable, "-m", "launch.train")
ALONE = 60.0  # seconds that a process may outlive another of its run


def configuration(path: str | None, overrides: Mapping[str, str]) -> dict:
    """What runs: the setting above or an experiment, with overrides. Raises UsageError."""
    own = SETTING if path is None else {}
    return resolve(path or "base", {**own, **overrides, **FORCED})


def compiled(workdir: pathlib.Path) -> pathlib.Path:
    """Where a run keeps its compiled programs: every run compiles anew, and is killed at that."""
    return workdir.with_name(f"{workdir.name}-compiled")


class Victim:
    """Starts lives of one configuration.

    folder: for the configuration's file and what the processes print.  count: processes a life.
    command: that trains.
    """

    def __init__(
        self,
        config: Mapping,
        folder: pathlib.Path,
        count: int = 1,
        environ: Mapping[str, str] = os.environ,
        command: Sequence[str] = TRAIN,
    ):
        self.config, self.count = config, count
        self._folder, self._environ, self._command = folder, environ, command
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.txt").write_text(render(config), encoding="utf-8")

    def start(self, workdir: pathlib.Path, name: str) -> "Life":
        """A life that goes on in `workdir`; what it prints is kept under `name`."""
        # The user's own cache wins, and then there is nothing to compile after the first run.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled(workdir))}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        given = ["--config", str(self._folder / "config.txt"), "--workdir", str(workdir)]
        command = [*self._command, *given]
        said = [self._folder / f"{name}.{rank}.txt" for rank in range(self.count)]
        began, processes = time.monotonic(), []
        for path, more in zip(said, self._ranks(), strict=True):
            with open(path, "w", encoding="utf-8") as out:
                options = dict(cwd=ROOT, env=cache | self._environ, start_new_session=True)
                streams = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
                processes.append(subprocess.Popen([*command, *more], **options, **streams))
        return Life(processes, said, began)

    def _ranks(self) -> list[list[str]]:
        if self.count == 1:
            return [[]]
        together = [f"--coordinator=127.0.0.1:{_free_port()}", f"--processes={self.count}"]
        together.append(f"--roll_call_seconds={ALONE / 2:g}")
        return [[*together, f"--process={rank}"] for rank in range(self.count)]


class Life:
    """The processes of one start, until they end or one is killed.

    began, killed_at, ended_at: seconds of the monotonic clock; the last of when all had ended.
    """

    def __init__(self, processes: list[subprocess.Popen], said: list[pathlib.Path], began: float):
        self.began, self.killed_at, self.ended_at = began, None, None
        self._processes, self._said = processes, said

    def running(self) -> bool:
        """Whether all processes do."""
        return all([process.poll() is None for process in self._processes])

    def kill(self, random: random.Random) -> int | None:
        """SIGKILL for one of the processes; which, or None where that one had ended by itself."""
        rank = random.randrange(len(self._processes))
        self.killed_at = time.monotonic()
        self._processes[rank].kill()
        return rank if self._processes[rank].wait() == -signal.SIGKILL else None

    def wait(self, seconds: float) -> bool:
        """Whether all have ended, at most so many seconds from now."""
        until = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        self.ended_at = time.monotonic()
        return True

    def check(self) -> None:
        """Raises Violation where a process has ended with an error."""
        for rank, process in enumerate(self._processes):
            if process.returncode:
                raise Violation(f"it ended with status {process.returncode}: {self.words(rank)}")

    def others(self, rank: int) -> dict[int, int]:
        """{rank: exit status} of all processes but one."""
        statuses = {r: process.returncode for r, process in enumerate(self._processes)}
        return {r: status for r, status in statuses.items() if r != rank}

    def words(self, rank: int = 0) -> str:
        """The last line that a process printed, and where the others are."""
        lines = self._said[rank].read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return f"{last} (all of it in {self._said[rank]})"

    def stop(self) -> None:
        """Ends whatever still runs, with processes that these have started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
