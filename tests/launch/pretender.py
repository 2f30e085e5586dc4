"""A process that looks like `train` from outside, starts at once, and can be told to misbehave.

Run as a script: python pretender.py FAULT --config FILE --workdir FOLDER [--process=RANK ...]
"""

import ast
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time

FAULT, _, CONFIG, _, WORKDIR, *TOGETHER = sys.argv[1:]
PORT, RANK = TOGETHER[0].rpartition(":")[2] if TOGETHER else 0, 0
for flag in TOGETHER:
    RANK = int(flag.rpartition("=")[2]) if flag.startswith("--process=") else RANK
LINES = [line.split(" = ") for line in pathlib.Path(CONFIG).read_text().splitlines()]
KEYS = {key: ast.literal_eval(value) for key, value in LINES}
LOST = 1 if FAULT == "crash" else 3
BEGAN = time.monotonic()
FOLDER = pathlib.Path(WORKDIR)
STEPS = FOLDER / "checkpoints"
LOG = FOLDER / "metrics.jsonl"


def saved():
    names = [path.name for path in STEPS.iterdir()] if STEPS.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def save(step):
    half = STEPS / f"{step}.saving"
    shutil.rmtree(half, ignore_errors=True)
    (half / "meta").mkdir(parents=True)
    meta = json.dumps({"shapes": {}, "data": {"heard": step}})
    (half / "meta" / "metadata").write_text(meta)
    (half / "commit_success.txt").touch()
    time.sleep(0.004)
    if FAULT == "half":  # The name comes before the manifest.
        half.rename(STEPS / str(step))
        half = STEPS / str(step)
        time.sleep(0.02)
    files = {
        path.relative_to(half).as_posix(): [
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        ]
        for path in half.rglob("*")
        if path.is_file()
    }
    line = json.dumps({"files": files})
    digest = hashlib.sha256(line.encode()).hexdigest()
    (half / "manifest.jsonl").write_text(f"{line}\n{digest}\n")
    if FAULT == "damage":
        (half / "meta" / "metadata").write_text(meta.replace("heard", "HEARD"))
    if FAULT != "half":
        half.rename(STEPS / str(step))
    for old in saved()[: -KEYS["train.keep"]]:
        gone = STEPS / f"{old}.removed-0"
        (STEPS / str(old)).rename(gone)
        shutil.rmtree(gone)
    if FAULT == "gone":
        shutil.rmtree(STEPS / str(step))


def row(step, **values):
    return json.dumps({"step": step, "time": time.time(), **values}) + "\n"


def begin():
    steps = saved()
    if FAULT == "early":
        steps = steps[:-1]
    first = steps[-1] if steps else 0
    kept = []
    if first and LOG.exists():
        at = lambda found: found.get("step", found.get("resumed", 0))
        lines = LOG.read_text().split("\n")[:-1]
        kept = [line for line in lines if at(json.loads(line)) <= first]
    header = {"resumed": first, "header": {}} if kept else {"header": {}}
    half = LOG.with_suffix(".tmp")
    half.write_text("".join(line + "\n" for line in [*kept, json.dumps(header)]))
    os.replace(half, LOG)
    return first


def gone(rank):
    """Whether the process of this rank has ended, or never came so far as to write its id."""
    try:
        os.kill(int((FOLDER / f"{PORT}-{rank}").read_text()), 0)
    except ProcessLookupError:
        return True
    except (FileNotFoundError, ValueError):
        return time.monotonic() > BEGAN + 1
    return False


def follow():
    """What a process that is not the first one does: it ends with that one."""
    while FAULT == "deaf" or not gone(0):
        time.sleep(0.002)
    raise SystemExit(0 if (FOLDER / "final.json").exists() else LOST)


def main():
    if FAULT == "broken":
        print("it is broken")
        raise SystemExit(3)
    if (FOLDER / "final.json").exists():
        return
    STEPS.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{PORT}-{RANK}").write_text(str(os.getpid()))
    if RANK:
        follow()
    time.sleep(0.02)
    first = begin()
    with LOG.open("a") as log:
        for step in range(first + 1, KEYS["steps"] + 1):
            time.sleep(0.001)
            if TOGETHER and gone(1):
                raise SystemExit(LOST)
            loss = 1 / step
            if first and FAULT == "loss":
                loss *= 1 + 2**-52
            if not (first and FAULT == "lost" and step == first + 2):
                log.write(row(step, loss=loss))
            if first and FAULT == "torn" and step == first + 3:
                log.write('{"step": 1, "lo\n')
            log.flush()
            if step % KEYS["train.save_every"] == 0 or step == KEYS["steps"]:
                save(step)
        time.sleep(0.02)
        off = bool(first) and FAULT == "score"
        if '"validation' not in LOG.read_text():
            log.write(row(KEYS["steps"], **{"validation/loss": 0.5 + off}))
    half = FOLDER / "final.tmp"
    half.write_text(json.dumps({"nll": 0.5 + off}))
    half.rename(FOLDER / "final.json")


main()
