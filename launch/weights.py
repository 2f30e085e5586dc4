"""How sharp and how monotone attention's weights are: `uv run weights runs/conversion`."""

import collections
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence

from analysis.records import read as read_record
from analysis.report import finite
from analysis.weights import measured
from analysis.weights_report import draw, markdown
from launch import flags, platform
from launch.schema import Key, UsageError
from launch.study import matching
from launch.usage import plain_usage

ABOUT = """\
Compares the weights of linear attention with those of softmax attention for the same queries and
keys, in every run of a study (or in one run): their entropy, how far they are from softmax's, and
whether they grow with the score. Writes weights.{md,json,png}. Runs without linear attention are
passed over."""
OPTIONS = {
    "workdir": Key(str, None, True, (), "folder of a study or of a run, which may stand alone"),
    "only": Key(str, None, True, (), "runs whose names match, such as '*_taught*,elu*'"),
    "rows": Key(int, 8, False, (), "held-out rows to read"),
    "tokens": Key(int, 128, False, (), "of each row, at most"),
    "out": Key(str, "experiments/results", False, (), "folder of the report"),
    **flags.OPENING,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 2 and one sentence for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"--help", "-h"} & set(argv):
        print(plain_usage("weights", ABOUT, OPTIONS), end="")
        raise SystemExit(0 if argv else 2)
    own = argv if argv[0].startswith("-") else [f"--workdir={argv[0]}", *argv[1:]]
    given = flags.parse(own, prog="weights", flags=OPTIONS, needs_config=False).flags
    try:
        runs = found(given)
    except UsageError as error:
        print(f"weights: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    platform.choose()
    # Only now may jax be imported: its platforms are chosen.
    from launch import setup

    with setup.one_sentence("weights"):
        held = measure(runs, given, shlex.join(["uv", "run", "weights", *argv]))
        print(write(held, pathlib.Path(given.out)))


def found(given) -> dict[str, tuple[str, int, pathlib.Path]]:
    """{run: its arm, its seed and its folder}. Raises UsageError, one sentence."""
    if given.workdir is None:
        raise UsageError("name the folder of a study or of a run first, as in weights runs/study")
    for name in ("rows", "tokens"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name} is {getattr(given, name)} and must be at least 1")
    folder = pathlib.Path(given.workdir)
    study = folder / "study.json"
    if not study.is_file():
        if not (folder / "metrics.jsonl").is_file():
            raise UsageError(f"{folder} holds neither a study nor a run")
        return {folder.name: (folder.name, 0, folder)}
    try:
        told = json.loads(study.read_text(encoding="utf-8"))["runs"]
        runs = {name: (_point(run), run["seed"], folder / name) for name, run in told.items()}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{study} is damaged; `uv run sweep` writes it anew") from None
    patterns = given.only.split(",") if given.only else []
    chosen = {name: runs[name] for name in matching(runs, patterns)}
    if unfinished := [name for name, (_, _, path) in chosen.items() if not _ended(path)]:
        raise UsageError(
            f"{len(unfinished)} of {len(chosen)} runs have not ended, {unfinished[0]} for one; "
            "`uv run sweep` goes on with them, or leave them out by --only"
        )
    return chosen


def _point(run: Mapping) -> str:
    """The arm, with what was tried in it."""
    values = (f"{key.rpartition('.')[2]}={text}" for key, text in run.get("point", {}).items())
    return " ".join([run["arm"], *values])


def _ended(folder: pathlib.Path) -> bool:
    record = read_record(folder)
    return record is not None and record.ended


def measure(runs: Mapping, given, command: str) -> dict:
    """The report: facts, and per arm and seed what analysis.weights.measured gives."""
    from launch import provenance
    from training.progress import bar

    arms: dict[str, dict] = collections.defaultdict(dict)
    commits, devices = {}, {}
    for arm, seed, folder in bar(runs.values(), desc="weights", unit="run"):
        layers, commit, device = _weights(folder, given)
        if layers:
            arms[arm][str(seed)] = measured(layers)
            commits[commit] = devices[device] = None
    if not arms:
        raise ValueError(
            f"no run in {given.workdir} has linear attention whose weights could be compared"
        )
    facts = {
        "command": f"`{command}`",
        "commit": provenance.commit(),
        "commit of the runs": list(commits),
        "device": list(devices),
        "versions": provenance.versions(),
        "seeds": sorted({seed for by_seed in arms.values() for seed in by_seed}),
        "rows": given.rows,
        "tokens": given.tokens,
    }
    return {"facts": facts, "arms": arms}


def _weights(folder: pathlib.Path, given):
    """Weights by layer, the commit that trained the run, and the device here."""
    from launch import setup
    from launch.attention import reporter

    built, params, _ = setup.reopen(str(folder), trust=given.trust)
    header = read_record(folder).headers[-1]
    device = built.mesh.devices.flat[0].device_kind
    sizes = dict(rows=given.rows, tokens=given.tokens)
    report = reporter(built.program, built.data, built.mesh, built.config["model"], **sizes)
    return report(params), header.get("commit"), device


def write(held: dict, out: pathlib.Path) -> str:
    """The three files; returns what to say of them."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "weights.json"
    path.write_text(render(held), encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(held), encoding="utf-8")
    draw(held, path.with_suffix(".png"))
    return f"report: {path.with_suffix('.md')}"


def render(held: Mapping) -> str:
    """JSON with a line for each arm and seed."""
    line = lambda x: json.dumps(finite(x), allow_nan=False)
    arms = [
        f" {line(arm)}: {{\n"
        + ",\n".join(f"  {line(seed)}: {line(x)}" for seed, x in by_seed.items())
        + "\n }"
        for arm, by_seed in held["arms"].items()
    ]
    return f'{{"facts": {line(held["facts"])},\n"arms": {{\n' + ",\n".join(arms) + "\n}}\n"


if __name__ == "__main__":
    main()
