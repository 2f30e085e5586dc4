"""Kernels without their hardware: `uv run kernels --op flash_attention --topology v5p`."""

import dataclasses
import difflib
import importlib
import importlib.util
import os
import pathlib
import signal
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from launch.files import ROOT
from launch.kernels import child, fields, rows, table, targets, tune
from launch.kernels.rows import Case
from launch.schema import Key, UsageError

RECORD = ROOT / "experiments/results/kernels.json"
USAGE = """\
usage: uv run kernels --op OP --topology NAME[,NAME..] [--FLAG=VALUE ...]
       uv run kernels --all [--fresh] [--op ..] [--spec ..] [--implementation ..] [--topology ..]

Compiles a kernel, forward and backward, for a TPU or GPU that need not be there, reads what the
compiler says of it, and prints what it will take. Exits with 1 where something does not compile.
"""
DTYPES = ("bfloat16", "float16", "float32")
FLAGS = {
    "op": Key(str, None, True, (), "a folder of pallas_kernels, as flash_attention"),
    "topology": Key(tuple, (), False, (), f"what to compile for: {', '.join(targets.TARGETS)}"),
    "spec": Key(str, None, True, (), "a shape of the op's specs.py; none is all those tagged aot"),
    "implementation": Key(str, None, True, (), "none is pallas_tpu or pallas_gpu"),
    "peer": Key(str, None, True, (), "also this one, to compare with: splash"),
    "dtype": Key(str, "bfloat16", False, DTYPES, f"of the arrays: {', '.join(DTYPES)}"),
    "picture": Key(str, None, True, (), "FILE.png of slot use along the programs (one TPU case)"),
    "pieces": Key(bool, False, False, (), "also print every piece of the programs"),
    "tune": Key(bool, False, False, (), "try the implementation's candidates by predicted time"),
    "record": Key(bool, False, False, (), "keep what --tune found in the op's tuned folder"),
    "all": Key(bool, False, False, (), "every op, aot spec and target into experiments/results"),
    "fresh": Key(bool, False, False, (), "with --all: also what the record has already"),
}
ALL = ("op", "topology", "spec", "implementation", "all", "fresh")  # what --all goes by
OWN = "--config.FIELD=VALUE sets a field of the implementation's Config, --FIELD=VALUE of the spec"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. Exits with 2 and one sentence for what is not understood, 130 if killed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or {"--help", "-h"} & set(argv):
        print(usage(), end="")
        raise SystemExit(0 if argv else 2)
    os.environ["JAX_PLATFORMS"] = "cpu"  # Compilations have processes of their own.
    # As Ctrl-C, so that a compiler's process and its folder do not outlive this one.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        flags, config, spec = parse(argv)
        failed = everything(flags) if flags["all"] else one(flags, config, spec)
    except UsageError as error:
        print(f"kernels: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    raise SystemExit(1 if failed else 0)


def usage() -> str:
    """What --help prints."""
    lines = [USAGE, "flags:"]
    for name, key in FLAGS.items():
        value = "" if key.kind is bool else f"={key.kind.__name__.upper()}"
        lines.append(f"  {f'--{name}{value}':<24} {key.comment}")
    return "\n".join([*lines, "", OWN]) + "\n"


def parse(argv: Sequence[str]) -> tuple[dict, dict[str, str], dict[str, str]]:
    """(flags, texts of --config.FIELD, texts of the spec's fields). Raises UsageError."""
    flags = {name: key.default for name, key in FLAGS.items()}
    config, spec, rest = {}, {}, list(argv)
    while rest:
        argument = rest.pop(0)
        name, sign, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UsageError(f"{argument!r} is not a flag: flags are --NAME=VALUE, see --help")
        if name in FLAGS and FLAGS[name].kind is bool and not sign:
            text = "true"
        elif not sign:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{name} needs a value: --{name}=VALUE")
            text = rest.pop(0)
        if name in FLAGS:
            flags[name] = fields.read(FLAGS[name], name, text)
        elif name.startswith("config."):
            config[name.removeprefix("config.")] = text
        else:
            spec[name] = text
    if not flags["all"] and not (flags["op"] and flags["topology"]):
        raise UsageError("name what to compile: --op=flash_attention --topology=v5p, or --all")
    _consistent(flags, config, spec)
    return flags, config, spec


def _consistent(flags: Mapping, config: Mapping[str, str], spec: Mapping[str, str]) -> None:
    """Raises UsageError for a flag that would be ignored beside another."""
    given = [name for name, key in FLAGS.items() if flags[name] != key.default]
    given += [f"config.{name}" for name in config] + list(spec)
    left = [name for name in given if name not in ALL]
    if flags["all"] and left:
        raise UsageError(f"--all compiles what the record holds and takes no --{left[0]}")
    if flags["fresh"] and not flags["all"]:
        raise UsageError("--fresh is for --all: without it everything is compiled anyway")
    if flags["record"] and not flags["tune"]:
        raise UsageError("--record keeps what --tune found: give both")
    other = next((name for name in ("config", "peer", "pieces", "picture") if name in given), None)
    if flags["tune"] and (other or config):
        raise UsageError(f"--tune chooses the config itself and takes no --{other or 'config'}")
    if flags["picture"] is not None:
        path = pathlib.Path(flags["picture"])
        if path.suffix not in (".png", ".svg", ".pdf") or not path.resolve().parent.is_dir():
            raise UsageError(f"--picture {path}: it must be a .png, .svg or .pdf in a folder")


def one(flags: Mapping, config: Mapping[str, str], texts: Mapping[str, str]) -> bool:
    """Compiles what the flags say and prints it; whether anything failed."""
    done, asked = [], cases(flags, config, texts)
    drawn = sum(case.target.platform == "tpu" for case in asked)
    if flags["picture"] is not None and drawn != 1:
        raise UsageError(
            f"--picture shows one program for a TPU and these are {drawn}: name one --spec, one "
            f"TPU in --topology and no --peer"
        )
    for case in asked:
        needs(case.target.platform)
        if flags["tune"]:
            done += tune.tune(case, flags["record"], say)
            continue
        say(case.key)
        found, result = rows.rows(case)
        done += found
        if flags["pieces"] or flags["picture"]:
            show(case, result, flags)
    print(table.markdown(done), end="")
    return any("error" in row for row in done)


def show(case: Case, result: Mapping, flags: Mapping) -> None:
    """Every piece of a compiled program, as text and as a picture."""
    from launch.kernels import picture
    from launch.kernels.program import Program, render

    programs = {
        name: Program.from_plain(facts["program"])
        for name, facts in result.get("kernels", {}).items()
        if "program" in facts
    }
    if flags["pieces"]:
        print(*map(render, programs.values()), sep="\n\n", end="\n\n")
    if flags["picture"] and programs:
        title = f"{case.spec.name}, {case.implementation}, {case.target.name}"
        picture.draw(programs, result["executions"], pathlib.Path(flags["picture"]), title)


def cases(flags: Mapping, config: Mapping[str, str], texts: Mapping[str, str]) -> list[Case]:
    """What the flags ask for. Raises UsageError."""
    specs = home(flags["op"])
    known = {spec.name: spec for spec in specs.SPECS}
    if flags["spec"] is not None and flags["spec"] not in known:
        near = difflib.get_close_matches(flags["spec"], known, n=1, cutoff=0.0)
        raise UsageError(f"{flags['op']} has no spec {flags['spec']!r}; did you mean {near[0]!r}?")
    chosen = [known[flags["spec"]]] if flags["spec"] else specs.tagged("aot")
    chosen = [_shaped(spec, texts) for spec in chosen]
    found = []
    for target in map(targets.target, dict.fromkeys(flags["topology"])):
        own = flags["implementation"] or f"pallas_{target.platform}"
        for spec in chosen:
            case = Case(flags["op"], spec, target, own, None, flags["dtype"])
            child.fits(case.job)
            if config:
                made = fields.changed(child.chosen(case.job), config, "config.")
                case = dataclasses.replace(case, config=dataclasses.asdict(made))
            peer = dataclasses.replace(case, implementation=flags["peer"], config=None)
            if flags["peer"]:
                child.fits(peer.job)
            found += [case, peer] if flags["peer"] else [case]
    return found


def _shaped(spec: Any, texts: Mapping[str, str]) -> Any:
    if not texts:
        return spec
    own = [field.name for field in dataclasses.fields(spec) if field.name not in ("name", "tag")]
    for field in texts:
        if field.partition(".")[0] not in own:
            near = difflib.get_close_matches(field, [*own, *FLAGS], n=1, cutoff=0.0)
            raise UsageError(f"--{field} is no field; did you mean --{near[0]}?")
    name = " ".join([spec.name, *(f"{field}={text}" for field, text in texts.items())])
    spec = fields.changed(spec, {"name": name, **texts})
    for array, (shape, _) in spec.abstract("float32").items():
        if any(size < 1 for size in shape):
            raise UsageError(f"{name}: {array} would be {shape}, and every size must be 1 or more")
    return spec


def home(op: str) -> types.ModuleType:
    """The op's specs. Raises UsageError."""
    ops = operations()
    if op not in ops:
        raise UsageError(f"there is no op {op!r} in pallas_kernels; there are: {', '.join(ops)}")
    return importlib.import_module(f"pallas_kernels.{op}.specs")


def operations() -> list[str]:
    """The folders of pallas_kernels that are ops."""
    return sorted(path.parent.name for path in (ROOT / "pallas_kernels").glob("*/specs.py"))


def needs(platform: str) -> None:
    """Raises UsageError where the platform's compiler is not installed."""
    package = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}[platform]
    try:
        there = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise UsageError(
            f"compiling for a {platform.upper()} needs its compiler: uv sync --extra aot"
        )


def everything(flags: Mapping) -> bool:
    """Brings the record up to date: each op's aot specs on each target; whether anything failed.

    --op, --spec, --implementation and --topology leave out the others, which stay as they are.
    """
    record, cases = table.load(RECORD), recorded()
    kept = {case.key: record[case.key] for case in cases if case.key in record}
    todo = [case for case in cases if _asked(case, flags)]
    if not todo:
        raise UsageError(f"none of the {len(cases)} cases of --all is what the other flags ask for")
    for i, case in enumerate(todo, 1):
        old = kept.get(case.key, [{}])[0]
        if not flags["fresh"] and "error" not in old and old.get("source") == case.source():
            continue
        needs(case.target.platform)
        say(f"{i}/{len(todo)} {case.key}")
        kept[case.key] = rows.rows(case)[0]
        table.save(RECORD, kept)  # so that a run that is stopped goes on from here
    print(f"{RECORD.relative_to(ROOT)}: {len(kept)} of {len(cases)} cases")
    return any("error" in row for case in todo for row in kept[case.key])


def _asked(case: Case, flags: Mapping) -> bool:
    names = {"op": case.op, "spec": case.spec.name, "implementation": case.implementation}
    named = all(flags[flag] in (None, name) for flag, name in names.items())
    return named and case.target.name in (flags["topology"] or targets.TARGETS)


def recorded() -> list[Case]:
    """What the record holds: own implementations everywhere, with peers where they can."""
    found = []
    for op in operations():
        for spec in home(op).tagged("aot"):
            for target in targets.TARGETS.values():
                case = Case(op, spec, target, f"pallas_{target.platform}")
                found.append(case)
                for name in child.peers(op):
                    other = dataclasses.replace(case, implementation=name)
                    peer = child.module(other.job)
                    found += [other] if target.platform == peer.PLATFORM and peer.can(spec) else []
    return found


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
