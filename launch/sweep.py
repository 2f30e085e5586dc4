"""All runs of a study, and its report: `uv run sweep experiments/optimizers.py`.

The same command goes on: finished runs are skipped, interrupted ones resume, failed ones are tried
again.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from analysis import report
from analysis.records import read as read_record
from launch import flags, platform, provenance
from launch.failure import sentence
from launch.pool import Pool
from launch.schema import Key, UsageError
from launch.study import Study, finished, matching, read

USAGE = "usage: uv run sweep experiments/NAME.py [--config.KEY=VALUE ...] [--FLAG=VALUE ...]"
ABOUT = """\
Runs every arm of a study with every seed, each in a folder of its own, and writes the report when
all have ended: experiments/results/NAME.{md,json,png}. The same command goes on where it stopped.
Keys given here hold for all runs."""
OPTIONS = {
    "workdir": Key(str, None, True, (), "folder of the runs (default runs/NAME)"),
    "parallel": Key(int, None, True, (), "runs at a time; none is one a core, or one accelerator"),
    "only": Key(str, None, True, (), "runs whose names match, such as 'lamb*seed=0'"),
    "print": Key(bool, False, False, (), "print the commands still to run, one a line, and stop"),
    "report": Key(bool, False, False, (), "write the report of runs that have ended, and stop"),
    "out": Key(
        str, None, True, (), "folder of the report (default experiments/results, or --workdir where"
        " keys are given here)"
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 1 if a run failed, with 2 and one sentence before any run, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"--help", "-h"} & set(argv):
        print(usage(), end="")
        raise SystemExit(0 if argv else 2)
    try:
        status = sweep(argv)
    except (UsageError, ValueError, OSError, ImportError) as error:
        print(sentence("sweep", error), file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if status:
        raise SystemExit(status) from None


def usage() -> str:
    """What --help prints."""
    lines = [USAGE, "", ABOUT, "", "flags:"]
    for name, key in OPTIONS.items():
        value = "" if key.kind is bool else f"={key.kind.__name__.upper()}"
        lines.append(f"  {f'--{name}{value}':<16} {key.comment}")
    return "\n".join(lines) + "\n"


def sweep(argv: Sequence[str]) -> int:
    """The exit status. Raises UsageError and its like before any run has begun."""
    argv = argv if argv[0].startswith("-") else ["--config", *argv]
    known = OPTIONS | {"config": Key(str, None, True)}
    parsed = flags.parse(argv, prog="sweep", flags=known, needs_config=False)
    given = parsed.flags
    if given.config is None:
        raise UsageError("name a study first, for example sweep experiments/optimizers.py")
    study = read(given.config, parsed.overrides)
    workdir = pathlib.Path(given.workdir or f"runs/{study.name}")
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir {workdir} is a file; give a folder")
    out = pathlib.Path(given.out or (workdir if parsed.overrides else report.RESULTS))
    names = matching((run.name for run in study.runs), [] if given.only is None else [given.only])
    chosen = [run for run in study.runs if run.name in names]
    at_once = parallel(given.parallel, len(study.runs))
    done = {run.name for run in study.runs if finished(study, run, workdir)}
    if given.report:
        if not workdir.is_dir():
            raise UsageError(f"there is no {workdir}, where the runs would be; run them first")
        keep(study, workdir)
        print(report.closing(report.write(workdir, out), out))
        return 0
    waiting = [run for run in chosen if run.name not in done]
    if given.print:
        for run in waiting:
            print(shlex.join(["uv", "run", "train", *study.arguments(run, workdir)]))
        return 0
    with lock(workdir) as held:
        keep(study, workdir)
        pool = Pool(study, workdir, at_once, held)
        pool.work(waiting, len(chosen))
    again = shlex.join(["uv", "run", "sweep", *argv])
    return conclude(study, workdir, out, pool, again.replace("sweep --config ", "sweep ", 1))


def conclude(study: Study, workdir: pathlib.Path, out: pathlib.Path, pool: Pool, again: str) -> int:
    """What is said at the end, the report where all runs have ended, and the exit status."""
    records = [read_record(workdir / run.name) for run in study.runs]
    over = [r is not None and (r.ended or r.diverged is not None) for r in records]
    ended, runs = sum(r is not None and r.ended for r in records), len(records)
    print(f"{ended} of {runs} runs are finished in {workdir}")
    if pool.failed:
        them = "it" if len(pool.failed) == 1 else "them"
        print(f"{len(pool.failed)} failed; the same command tries {them} again")
    if pool.interrupted:
        print(f"stopped; to go on: {again}")
        return 130
    if all(over):
        print(report.closing(report.write(workdir, out), out))
    return 1 if pool.failed else 0


def parallel(asked: int | None, runs: int) -> int:
    """Runs at a time: as asked, else one a core; one alone where it would use accelerators.

    runs: of the whole study, whatever remains, because a run's sums depend in their last digits on
    how many cores share them.
    """
    if asked is not None:
        if asked < 1:
            raise UsageError(f"--parallel {asked} runs nothing; give 1 or more")
        return max(1, min(asked, runs))
    devices = platform.pick(platform.present(), platform.installed(), os.environ)
    pinned = hasattr(os, "sched_setaffinity")
    return max(1, min(provenance.cores(), runs)) if devices == "cpu" and pinned else 1


def keep(study: Study, workdir: pathlib.Path) -> None:
    """Writes study.json; a rule that it held when runs had begun already is kept beside the new."""
    path, earlier = workdir / "study.json", []
    workdir.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        before = _before(path)
        earlier = before["earlier_rules"]
        begun = any((workdir / name / "metrics.jsonl").is_file() for name in before["runs"])
        if begun and before["rule"] != str(study.rule):
            earlier = [*earlier, before["rule"]]
    text = json.dumps(study.record() | {"earlier_rules": earlier}, indent=1)
    half = path.with_suffix(".tmp")
    half.write_text(text + "\n", encoding="utf-8")
    half.replace(path)


def _before(path: pathlib.Path) -> dict:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if {"earlier_rules", "rule", "runs"} <= before.keys():
            return before
    except (ValueError, AttributeError):
        pass
    raise UsageError(f"{path} is damaged; move it away, and the runs beside it stay as they are")


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[int]:
    """Keeps a second sweep out; the descriptor is handed on to runs, which may outlive this one."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another sweep is at work in {workdir}, or runs that it left are still saving; "
                "wait for them, or choose another --workdir"
            ) from None
        yield file.fileno()


if __name__ == "__main__":
    main()
