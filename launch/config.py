"""From an experiment's file and overrides to the configuration that runs.

Three layers, the later ones win: defaults (experiments/base.py for shared keys, signatures for own
keys), the experiment's file, `--config.KEY=VALUE`. What no named method uses is then left out.
"""

import dataclasses
import difflib
import inspect
import pathlib
import re
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from experiments import base
from launch.checks import check
from launch.files import ROOT, find, load, place
from launch.schema import FFNS, MIXERS, SECTIONS, Key, Section, UsageError, documented, methods

BLOCKS = "model.blocks"
# The keys that name layers: an entry of model.blocks or a mixer may stand in each.
LAYERS = ("model.prefix", "model.pattern", "model.suffix")
# A key that nothing reads while the other one has a value.
OVERRULED = {"optim.warmup_fraction": "optim.warmup_tokens"}


@dataclasses.dataclass
class Draft:
    """What is known before unused methods are left out.

    keys: every key that exists, by dotted name.  found: {section: {method: its own keys}}.
    entries: {entry of model.blocks: its mixer}.  values: those that somebody chose.
    overridden: names that the command line chose.
    """

    keys: dict[str, Key]
    found: dict[str, dict[str, dict[str, Key]]]
    entries: dict[str, str]
    values: dict[str, object]
    overridden: tuple[str, ...]

    def __getitem__(self, name: str) -> object:
        """The value of a key: the one chosen, or its default.

        An entry of model.blocks takes what it does not set from its mixer's own section.
        """
        if name in self.values:
            return self.values[name]
        if not name.startswith(f"{BLOCKS}."):
            return self.keys[name].default
        _, _, entry, argument = name.split(".")
        if argument == "ffn":
            return self[FFNS.chosen_by]
        return self[f"{MIXERS.key}.{self.entries[entry]}.{argument}"]


def resolve(
    path: str, overrides: Mapping[str, str] | None = None, root: pathlib.Path = ROOT
) -> dict:
    """The configuration of an experiment as a plain nested dict: exactly what runs.

    path: a .py file with `get_config`, a text that --print_config wrote, or the bare name of a file
    in experiments/.  overrides: {dotted key: text as on a command line}.  root: the repository
    whose methods are read. Raises UsageError, whose text is one sentence.
    """
    draft = compose(path, overrides or {}, root)
    used = used_methods(draft)
    _refuse_unused(draft, used)
    config = _assemble(draft, used)
    check(config)
    return config


def compose(path: str, overrides: Mapping[str, str], root: pathlib.Path = ROOT) -> Draft:
    """All keys with the values chosen for them. Raises UsageError."""
    chosen = load(find(path, root))
    mentioned = set(re.findall(r"\w+", str(chosen | overrides)))
    found = {section.key: methods(root, section, mentioned) for section in SECTIONS}
    keys = shared_keys()
    for section, by_method in found.items():
        for method, own in by_method.items():
            keys |= {f"{section}.{method}.{argument}": key for argument, key in own.items()}
    entries = _entries(chosen | overrides, found[MIXERS.key])
    for entry, mixer in entries.items():
        own = {"mixer": Key(str), "ffn": Key(str)} | found[MIXERS.key][mixer]
        keys |= {f"{BLOCKS}.{entry}.{argument}": key for argument, key in own.items()}
    values = {name: _from_file(keys, name, value, path) for name, value in chosen.items()}
    values |= {name: _from_text(keys, name, text) for name, text in overrides.items()}
    return Draft(keys, found, entries, values, tuple(overrides))


def shared_keys() -> dict[str, Key]:
    """The keys of experiments/base.py, in its order; a placeholder is an optional key."""
    config, keys = base.get_config(), {}
    for name, comment in documented(inspect.getsource(base)).items():
        *above, last = name.split(".")
        section = config
        for part in above:
            section = section[part]
        value = section[last]
        if not isinstance(value, ConfigDict):
            optional = value is None or name in base.OPTIONAL
            choices = base.CHOICES.get(name, ())
            keys[name] = Key(section.get_type(last), value, optional, choices, comment)
    return keys


def _entries(chosen: Mapping[str, object], mixers: Mapping) -> dict[str, str]:
    """{entry: mixer} of model.blocks. Raises UsageError: no mixer, an unknown one, a name taken."""
    inside = [name.removeprefix(f"{BLOCKS}.") for name in chosen if name.startswith(f"{BLOCKS}.")]
    entries = {}
    for entry in dict.fromkeys(name.partition(".")[0] for name in inside):
        key = f"{BLOCKS}.{entry}.mixer"
        if key not in chosen:
            raise UsageError(f"{BLOCKS} has no entry {entry!r} with a mixer; set {key} to name one")
        if entry in mixers:
            raise UsageError(f"{key}: models/mixers has a {entry}.py too; rename the entry")
        if str(chosen[key]) not in mixers:
            raise UsageError(_absent(key, MIXERS, str(chosen[key]), mixers))
        entries[entry] = chosen[key]
    return entries


def _from_file(keys: Mapping[str, Key], name: str, value: object, path: str) -> object:
    if name not in keys:
        raise UsageError(f"{path} sets {name}, which {_unknown(keys, name)}")
    try:
        return keys[name].conform(value)
    except TypeError as error:
        raise UsageError(f"{path}: {name} {error}") from None


def _from_text(keys: Mapping[str, Key], name: str, text: str) -> object:
    if name not in keys:
        raise UsageError(f"--config.{name} {_unknown(keys, name)}")
    try:
        return keys[name].parse(text)
    except TypeError as error:
        raise UsageError(f"--config.{name} {error}") from None


def _unknown(keys: Mapping[str, Key], name: str) -> str:
    inside = [key for key in keys if key.startswith(f"{name}.")]
    if inside:
        return f"is a section, not a key; it holds for example {inside[0]}"
    near = nearest(name, keys)
    return "is not a key; " + (f"did you mean {near}?" if near else "--help lists all keys")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The dotted name that was probably meant: one with the same last part, else one alike."""
    last = name.rpartition(".")[2]
    alike = lambda known: difflib.SequenceMatcher(None, name, known).ratio()
    same = [known for known in names if known.rpartition(".")[2] == last]
    near = same or [known for known in names if alike(known) > 0.6]
    return max(near, key=alike, default=None)


def _absent(key: str, section: Section, name: str, known: Iterable[str]) -> str:
    lacks = "has no such function" if section.home.endswith(".py") else f"has no {name}.py"
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key} names {name!r}, and {section.home} {lacks}{guess}"


def _named(draft: Draft, section: Section) -> list[tuple[str, str]]:
    """(key, method) for every place that names a method of this section."""
    layers = [(key, name) for key in LAYERS for name in draft[key]]
    direct = [(key, name) for key, name in layers if name not in draft.entries]
    if section is MIXERS:
        return direct
    value = draft[section.chosen_by]
    if section is FFNS:
        keys = [f"{BLOCKS}.{entry}.ffn" for _, entry in layers if entry in draft.entries]
        return [(key, draft[key]) for key in keys] + [(FFNS.chosen_by, value) for _ in direct]
    return [(section.chosen_by, name) for name in ((value,) if isinstance(value, str) else value)]


def used_methods(draft: Draft) -> dict[str, list[str]]:
    """{section or 'model.blocks': the methods or entries that the configuration names}."""
    layers = {name for key in LAYERS for name in draft[key]}
    used = {BLOCKS: [entry for entry in draft.entries if entry in layers]}
    for section in SECTIONS:
        known = draft.found[section.key]
        named = dict.fromkeys(_named(draft, section))
        for key, name in named:
            if name not in known:
                others = [*known, *draft.entries] if section is MIXERS else known
                raise UsageError(_absent(key, section, name, others))
        used[section.key] = list(dict.fromkeys(name for _, name in named))
    return used


def _refuse_unused(draft: Draft, used: Mapping[str, list[str]]) -> None:
    """Raises UsageError for a key set on the command line that nothing reads.

    A file may hold arguments for several methods between which the command line chooses.
    """
    read = {f"{section}.{name}" for section, names in used.items() for name in names}
    read |= {f"{MIXERS.key}.{draft.entries[entry]}" for entry in used[BLOCKS]}
    for name in draft.overridden:
        owner = name.rpartition(".")[0]
        section, _, method = owner.rpartition(".")
        if section in used and owner not in read:
            names = ", ".join(used[section]) or "nothing"
            raise UsageError(
                f"--config.{name} has no effect, because the configuration does not use "
                f"{method}; of {section} it uses {names}"
            )
        other = OVERRULED.get(name)
        if other and draft[other] is not None:
            raise UsageError(
                f"--config.{name} has no effect, because {other} is {draft[other]}; "
                f"add --config.{other}=none"
            )


def _assemble(draft: Draft, used: Mapping[str, list[str]]) -> dict:
    config = {}
    for name in shared_keys():
        *above, last = name.split(".")
        place(config, above)[last] = draft[name]
    for section, names in used.items():
        methods = place(config, section.split("."))
        for name in names:
            if section == BLOCKS:
                own = ("mixer", "ffn", *draft.found[MIXERS.key][draft.entries[name]])
            else:
                own = draft.found[section][name]
            methods[name] = {argument: draft[f"{section}.{name}.{argument}"] for argument in own}
    return config
