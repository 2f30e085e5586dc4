"""Real processes of one run: waiting for them, and what they leave behind."""

import dataclasses
import re
import socket
import subprocess
import time

from training.metrics import read

PATIENCE = 240.0  # seconds that a loaded machine may take to start and compile


@dataclasses.dataclass
class Processes:
    """Of one run; `workdir` holds what they write."""

    each: list[subprocess.Popen]
    workdir: object

    def __getitem__(self, index):
        return self.each[index]

    def wait_for_step(self, step):
        """Until the log has it."""
        self.wait_for(lambda: self.steps() and self.steps()[-1] >= step)

    def wait_for(self, what):
        """Until it is true; none of the processes may end before."""
        until = time.monotonic() + PATIENCE
        while not what():
            for process in self.each:
                assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)

    def steps(self):
        path = self.workdir / "metrics.jsonl"
        return [row["step"] for row in read(path)[1]] if path.exists() else []

    def ends(self, *without):
        """[(status, stdout, last line of stderr)] of all but those, and the seconds it took."""
        begun, found = time.monotonic(), []
        for index, process in enumerate(self.each):
            if index not in without:
                out, err = process.communicate(timeout=PATIENCE)
                assert "Traceback" not in err, err
                lines = re.split(r"[\r\n]+", err.strip())
                found.append((process.returncode, out, lines[-1]))
        return found, time.monotonic() - begun


def free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def computed(workdir):
    """{step: row} without what is measured."""
    rows = read(workdir / "metrics.jsonl")[1]
    kept = [row for row in rows if "loss" in row]
    measured = re.compile(r"time|mfu|.*second.*")
    return {
        row["step"]: {k: v for k, v in row.items() if not measured.fullmatch(k)} for row in kept
    }
