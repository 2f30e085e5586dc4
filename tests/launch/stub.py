"""Stands for `python -m launch.train`: the same command line, folders and signals, no training.

A step takes two milliseconds. The metric reached is the learning rate; at 1e30 the run diverges, at
7 it complains as one does whose folder cannot be written.
"""

import json
import os
import pathlib
import signal
import sys
import time

from launch import flags, train
from tests.analysis import written


def main() -> None:
    parsed = flags.parse(prog="train", flags=train.FLAGS)
    config, folder, stopped = parsed.config, pathlib.Path(parsed.flags.workdir), []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    saved = folder / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    head = written.header() | {"config": config, "cores": sorted(os.sched_getaffinity(0))}
    with (folder / "metrics.jsonl").open("a" if first else "w", buffering=1) as log:
        line = lambda row: log.write(json.dumps(row) + "\n")
        line({"resumed": first, "header": head} if first else {"header": head})
        for step in range(first + 1, config["steps"] + 1):
            time.sleep(0.002)
            take(line, step, config["optim"]["lr"])
            while stopped and (folder / "hold").exists():  # as one whose disk is slow
                time.sleep(0.01)
            if stopped:
                saved.write_text(str(step))
                return print(f"stopped at step {step}")
        line(
            {"step": step, "tokens": step * 32, "time": 1.0, written.METRIC: config["optim"]["lr"]}
        )
    (folder / "final.json").write_text(json.dumps({"step": step}))


def take(line, step: int, lr: float) -> None:
    bad = {1e30: (1, "NaN"), 7.0: (2, lr)}
    status, loss = bad.get(lr, (0, lr))
    line({"step": step, "tokens": step * 32, "time": time.time(), "loss": loss})
    if status:
        print("a notice\ntrain: this run is at its end\nanother notice", file=sys.stderr)
        raise SystemExit(status)


if __name__ == "__main__":
    main()
