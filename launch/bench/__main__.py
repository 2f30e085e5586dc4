"""Benchmarks: `uv run bench spine`. A file here with a function `bench` is one, under its name.

The function's keyword-only arguments are its flags, with the rule of every signature in this
repository: annotated, with a literal default and a comment that --help prints. It returns a
`measure.Report`. Only jax, numpy, flax, jaxtyping and optax may be needed to import it.
"""

import ast
import difflib
import importlib
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence

from launch import platform, provenance
from launch.bench import measure
from launch.schema import Key, Section, UsageError, methods

BENCHMARKS = Section("bench", "launch/bench", "bench", "")
COMMON = {"out": Key(str, None, True, (), "a JSON file for every sample, commit, device, versions")}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark named first. Exits with 2 and one sentence for what is not understood."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or {"--help", "-h"} & set(argv):
            print(usage(), end="")
            raise SystemExit(0 if argv else 2)
        name, own, out = parse(argv)
        platform.choose()  # Before anything imports jax.
        load = os.getloadavg()
        report = importlib.import_module(f"launch.bench.{name}").bench(**own)
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(measure.table(report))
    if out is not None:
        command = f"uv run bench {shlex.join(argv)}"
        text = json.dumps(measure.record(report, name, command, load), indent=1)
        pathlib.Path(out).write_text(text + "\n", encoding="utf-8")


def benchmarks(mentioned: Collection[str] = ()) -> dict[str, dict[str, Key]]:
    """{name: {flag: Key}} of the files in this folder that are benchmarks."""
    return methods(provenance.ROOT, BENCHMARKS, mentioned)


def parse(argv: Sequence[str]) -> tuple[str, dict, str | None]:
    """(benchmark, its arguments, the file for JSON). Raises UsageError."""
    name, *rest = argv
    found = benchmarks([name])
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.0)
        raise UsageError(f"there is no benchmark {name!r}; did you mean {near[0]!r}?")
    keys = found[name] | COMMON
    given = {flag: key.default for flag, key in keys.items()}
    while rest:
        flag, text, rest = _take(rest, keys)
        try:
            given[flag] = keys[flag].parse(text)
        except TypeError as error:
            raise UsageError(f"--{flag} {error}") from None
    out = given.pop("out")
    if out is not None and not pathlib.Path(out).resolve().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {pathlib.Path(out).parent}")
    return name, given, out


def _take(rest: Sequence[str], keys: Mapping[str, Key]) -> tuple[str, str, Sequence[str]]:
    """(flag, its text, what follows) of `--flag=text` or `--flag text`."""
    argument, *rest = rest
    flag, sign, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or flag not in keys:
        near = difflib.get_close_matches(flag, keys, n=1, cutoff=0.0)
        raise UsageError(f"{argument!r} is not a flag; did you mean --{near[0]}?")
    if not sign:
        if not rest:
            raise UsageError(f"--{flag} needs a value: --{flag}=VALUE")
        text, *rest = rest
    return flag, text, rest


def usage() -> str:
    """What --help prints: every benchmark with its flags."""
    lines = ["usage: uv run bench NAME [--FLAG=VALUE ...]", ""]
    for name, own in benchmarks().items():
        source = (provenance.ROOT / BENCHMARKS.source(name)).read_text(encoding="utf-8")
        lines += [f"{name}: {ast.get_docstring(ast.parse(source)).splitlines()[0]}"]
        lines += [_flag(flag, key) for flag, key in own.items()] + [""]
    lines += ["all:", *(_flag(flag, key) for flag, key in COMMON.items())]
    return "\n".join(lines) + "\n"


def _flag(flag: str, key: Key) -> str:
    default = "" if key.default is None else f" (default {key.default})"
    return f"  {f'--{flag}={key.kind.__name__.upper()}':<22} {key.comment}{default}"


if __name__ == "__main__":
    main()
