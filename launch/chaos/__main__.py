"""Kill a run again and again: `uv run chaos --kills 100`. It must lose and change nothing."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from launch import flags
from launch.schema import Key, UsageError

ABOUT = """\
Trains a reference that is left alone, then the same configuration, killed (SIGKILL) at random
moments and started again until it ends, as often as it takes. After every kill all metrics logged
must be those of the reference to the last bit, no finished checkpoint may be lost, and the next
start must go on from the newest; at the end parameters, optimizer and counters must be those of the
reference. Where that does not hold it exits with 1 and keeps all folders. The small configuration
that is trained changes by --config.KEY=VALUE."""
FLAGS = {
    "workdir": Key(
        *(str, None, True, ()),
        "a new folder for all runs; none is a temporary one, which stays if something is wrong",
    ),
    "config": Key(str, None, True, (), "another experiment than the small one that is built in"),
    "kills": Key(int, 100, False, (), "how many"),
    "seed": Key(int, 0, False, (), "of the moments"),
    "processes": Key(int, 1, False, (), "of one run, on this machine; one of them is killed"),
    "out": Key(str, None, True, (), "FILE.md for the report; every kill goes into FILE.json"),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parsed = flags.parse(argv, prog="chaos", about=ABOUT, flags=FLAGS, needs_config=False)
    environ = dict(os.environ)  # Lives choose their platform; this process needs no accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from launch.chaos import victim

    try:
        _check(parsed.flags)
        config = victim.configuration(parsed.flags.config, parsed.overrides)
        folder = _folder(parsed.flags.workdir)
    except UsageError as error:
        print(f"chaos: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    # As Ctrl-C does: a life left behind would train on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = victim.Victim(config, folder / "lives", parsed.flags.processes, environ)
    status = _run(started, folder, parsed.flags, shlex.join(["uv", "run", "chaos", *argv]))
    if status == 0 and parsed.flags.workdir is None:
        shutil.rmtree(folder)
    else:
        print(f"all folders are in {folder}", file=sys.stderr)
    raise SystemExit(status)


def _run(victim, folder: pathlib.Path, given, command: str) -> int:
    """The campaign with its report, also of one that was stopped; the exit status."""
    from launch.chaos import report
    from launch.chaos.campaign import Campaign
    from launch.chaos.verdict import Violation
    from training.progress import bar

    began, violation, interrupted = time.monotonic(), None, False
    with bar(total=given.kills, unit="kill", desc="reference") as shown:

        def tell(kill) -> None:
            shown.set_description(f"run {kill.run}", refresh=False)
            hits = ", ".join(f"{name} {n}" for name, n in campaign.tally.phases.items())
            shown.set_postfix_str(hits, refresh=False)
            shown.update()

        campaign = Campaign(victim, folder, given.kills, given.seed, tell)
        try:
            campaign.run()
        except Violation as error:
            violation = str(error)
        except KeyboardInterrupt:
            interrupted = True
    about = {"command": command, "wanted": given.kills, "seed": given.seed}
    about |= {"processes": given.processes, "seconds": time.monotonic() - began}
    about |= {"violation": violation, "interrupted": interrupted}
    found = report.record(campaign.tally, about, campaign.header)
    text = report.page(found)
    print(text, end="")
    if given.out is not None:
        page = pathlib.Path(given.out)
        page.write_text(text, encoding="utf-8")
        page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if violation is not None:
        print(f"chaos: {violation}", file=sys.stderr)
    return 1 if violation is not None else 130 if interrupted else 0


def _check(given) -> None:
    """Raises UsageError for what cannot be done, before anything is begun."""
    for name in ("kills", "processes"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(given, name)}")
    if given.out is not None:
        page = pathlib.Path(given.out)
        if page.suffix != ".md":
            raise UsageError(f"--out {page} must end in .md; the kills go into a .json beside it")
        if not page.resolve().parent.is_dir():
            raise UsageError(f"--out {page}: there is no folder {page.parent}")


def _folder(workdir: str | None) -> pathlib.Path:
    if workdir is None:
        return pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    folder = pathlib.Path(workdir).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--workdir {folder} must be a new or an empty folder; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
