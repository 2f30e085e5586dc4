"""The command line of every entry point: parsed and judged before jax is imported.

`parse` is the only way in. Whatever is wrong becomes one sentence on stderr and exit status 2.
absl's flags are not used: they cannot say these sentences, and ml_collections adds tracebacks.
"""

import dataclasses
import difflib
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence

from launch.config import resolve
from launch.files import ROOT, render
from launch.schema import Key, UsageError
from launch.usage import plain_usage, usage

PREFIX = "config."
COMMON = {
    "workdir": Key(str, None, True, (), "folder of the run: checkpoints, metrics, events"),
    "help": Key(bool, False, False, (), "this text"),
}
# Of commands that begin a run; the others read the configuration that a run has kept.
BEGINNING = {
    "config": Key(
        str, None, True, (), "experiments/NAME.py, a printed configuration, or NAME alone"
    ),
    "print_config": Key(bool, False, False, (), "print the configuration that would run, and stop"),
    "print_params": Key(bool, False, False, (), "print the table of parameters, and stop"),
}

# Of commands that open a checkpoint.
OPENING = {
    "trust": Key(
        bool, False, False, (), "open the newest checkpoint without verifying its checksums"
    ),
}


@dataclasses.dataclass(frozen=True)
class Parsed:
    """config: plain nested dict, exactly what runs; None for a command that takes none.

    overrides: {config key: text} as the command line gave them.
    flags: a namespace of all other flags, with `workdir` and `config` (the path as given).
    """

    config: dict | None
    flags: types.SimpleNamespace
    overrides: Mapping[str, str]


def parse(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "launch.train",
    about: str = "",
    flags: Mapping[str, Key] | None = None,
    needs_config: bool = True,
    root: pathlib.Path = ROOT,
) -> Parsed:
    """What the command line asks for.

    argv: without the program's name; sys.argv[1:] when None.  prog: the command, for messages.
    about: a paragraph for --help.  flags: the command's own flags, {name: Key}.
    needs_config: whether the command takes a configuration, and needs one.  root: the repository.

    Exits with status 2 and one sentence on stderr for anything wrong; with 0 after --help and
    --print_config.
    """
    known = (BEGINNING if needs_config else {}) | COMMON | dict(flags or {})
    try:
        given, overrides = _split(sys.argv[1:] if argv is None else argv, known)
        values = {name: _value(known[name], name, text) for name, text in given.items()}
        values = {name: key.default for name, key in known.items()} | values
        if values.pop("help"):
            text = usage if needs_config else plain_usage
            print(text(prog, about, known, values.get("config"), overrides, root), end="")
            raise SystemExit(0)
        config = _config(values["config"], overrides, root) if needs_config else None
        if values.pop("print_config", False):
            print(render(config), end="")
            raise SystemExit(0)
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return Parsed(config, types.SimpleNamespace(**values), overrides)


def _config(path: str | None, overrides: Mapping[str, str], root) -> dict:
    if path is not None:
        return resolve(path, overrides, root)
    if overrides:
        raise UsageError(
            f"--config.{next(iter(overrides))} changes a configuration; give --config FILE"
        )
    raise UsageError("give --config FILE, for example --config experiments/quickstart.py")


def _value(key: Key, name: str, text: str) -> object:
    try:
        return key.parse(text)
    except TypeError as error:
        raise UsageError(f"--{name} {error}") from None


def _split(argv: Sequence[str], known: Mapping[str, Key]) -> tuple[dict, dict]:
    """({flag: text}, {config key: text}). Raises UsageError: unknown, repeated or without value."""
    given, overrides = {}, {}
    rest = ["--help" if argument == "-h" else argument for argument in argv]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UsageError(f"unexpected argument {argument!r}; flags look like --name=value")
        name, sign, text = argument.removeprefix("--").partition("=")
        is_key = name.startswith(PREFIX)
        if not (is_key and "config" in known) and name not in known:
            raise UsageError(f"there is no flag --{name}{_guess(name, known)}")
        if not sign:
            text = _next(rest, name, not is_key and known[name].kind is bool)
        into, name = (overrides, name.removeprefix(PREFIX)) if is_key else (given, name)
        if name in into:
            flag = f"--{PREFIX if is_key else ''}{name}"
            raise UsageError(f"{flag} is given twice, as {into[name]!r} and {text!r}; keep one")
        into[name] = text
    return given, overrides


def _next(rest: list[str], name: str, is_switch: bool) -> str:
    """The value that follows a flag; a switch may do without."""
    if is_switch and (not rest or rest[0].lower() not in ("true", "false")):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"--{name} needs a value: --{name}=VALUE")
    return rest.pop(0)


def _guess(name: str, known: Mapping[str, Key]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean --{near[0]}?"
    if "config" not in known:
        return "; --help lists all flags"
    return "; --help lists all flags, and keys of the configuration are --config.KEY=VALUE"
