"""From an experiment's file and overrides to the configuration that runs.

Three layers, the later ones win: defaults (experiments/base.py for shared keys, signatures for own
keys), the experiment's file, `--config.KEY=VALUE`. What no named method uses is then left out.
"""

import dataclasses
import difflib
import inspect
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from ml_collections import ConfigDict

from experiments import base
from launch.checks import check
from launch.entries import FAMILIES
from launch.files import ROOT, find, load, place
from launch.schema import SECTIONS, Key, UsageError, documented, methods, spell

# A key that nothing reads while the other one has a value; * is an entry.
OVERRULED = {
    "optim.warmup_fraction": "optim.warmup_tokens",
    "data.source": "data.mixture",
    "data.domains.*.weight": "data.domains.*.schedule",
}


@dataclasses.dataclass
class Draft:
    """What is known before unused methods are left out.

    keys: every key that exists, by dotted name.  found: {section: {method: its own keys}}.
    entries: {key of a family: {entry: its method}}.  values: those that somebody chose.
    overridden: names that the command line chose.
    """

    keys: dict[str, Key]
    found: dict[str, dict[str, dict[str, Key]]]
    entries: dict[str, dict[str, str]]
    values: dict[str, object]
    overridden: tuple[str, ...]

    def __getitem__(self, name: str) -> object:
        """The value of a key: the one chosen, that of the key it inherits from, or its default."""
        if name in self.values:
            return self.values[name]
        key = self.keys[name]
        return self[key.inherits] if key.inherits else key.default


def resolve(
    path: str, overrides: Mapping[str, str] | None = None, root: pathlib.Path = ROOT
) -> dict:
    """The configuration of an experiment as a plain nested dict: exactly what runs.

    path: a .py file with `get_config`, a text that --print_config wrote, or the bare name of a file
    in experiments/.  overrides: {dotted key: text as on a command line}.  root: the repository
    whose methods are read. Raises UsageError, whose text is one sentence.
    """
    return fitted(path, overrides or {}, (), root)[0]


def fitted(
    path: str, overrides: Mapping[str, str], optional: Collection[str], root: pathlib.Path = ROOT
) -> tuple[dict, Mapping[str, str]]:
    """The configuration as `resolve` gives it, and the overrides that it reads.

    optional: keys that may be left out where nothing reads them.
    """
    draft = compose(path, overrides, root)
    used = used_methods(draft)
    idle = dict(_unused(draft, used))
    if idle.keys() & set(optional):
        kept = {key: x for key, x in overrides.items() if key not in idle or key not in optional}
        return fitted(path, kept, (), root)
    for sentence in idle.values():
        raise UsageError(sentence)
    config = _assemble(draft, used)
    check(config)
    return config, overrides


def unused(path: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """{key: why nothing reads it} of the overrides that `resolve` would refuse for that."""
    draft = compose(path, overrides)
    return dict(_unused(draft, used_methods(draft)))


def compose(path: str, overrides: Mapping[str, str], root: pathlib.Path = ROOT) -> Draft:
    """All keys with the values chosen for them. Raises UsageError."""
    chosen = load(find(path, root))
    mentioned = set(re.findall(r"\w+", str(chosen | overrides)))
    found = {section.key: methods(root, section, mentioned) for section in SECTIONS}
    keys = shared_keys()
    for section, by_method in found.items():
        for method, own in by_method.items():
            keys |= {f"{section}.{method}.{argument}": key for argument, key in own.items()}
    entries = {}
    for family in FAMILIES:
        known = found[family.section.key]
        entries[family.key] = family.entries(chosen | overrides, known)
        for entry, method in entries[family.key].items():
            own = family.keys(method, known[method])
            keys |= {f"{family.key}.{entry}.{argument}": key for argument, key in own.items()}
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


def _named(draft: Draft) -> dict[str, list[tuple[str, str]]]:
    """{section: (key, method) for every place that names a method of it}."""
    named = {}
    for section in SECTIONS:
        value = draft[section.chosen_by]
        names = (value,) if isinstance(value, str) else value or ()
        named[section.key] = [(section.chosen_by, name) for name in names]
    for family in FAMILIES:
        entries = draft.entries[family.key]
        listed = [(key, name) for key in family.listed_by for name in draft[key]]
        if not listed:
            continue
        direct = [(key, name) for key, name in listed if name not in entries]
        named[family.section.key] = direct
        for argument, section in family.parts.items():
            keys = [f"{family.key}.{name}.{argument}" for _, name in listed if name in entries]
            shared = named[section.key] if direct else []
            named[section.key] = [*((key, draft[key]) for key in keys), *shared]
    return named


def used_methods(draft: Draft) -> dict[str, list[str]]:
    """{key of a section or a family: the methods or entries that the configuration names}."""
    used = {}
    for family in FAMILIES:
        listed = {name for key in family.listed_by for name in draft[key]}
        used[family.key] = [entry for entry in draft.entries[family.key] if entry in listed]
    named = _named(draft)
    for section in SECTIONS:
        known = draft.found[section.key]
        for key, name in named[section.key]:
            if name not in known:
                beside = [draft.entries[f.key] for f in FAMILIES if key in f.listed_by]
                others = [entry for entries in beside for entry in entries]
                raise UsageError(section.absent(key, name, [*known, *others]))
        used[section.key] = list(dict.fromkeys(name for _, name in named[section.key]))
    return used


def _unused(draft: Draft, used: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Keys set on the command line that nothing reads, each with a sentence.

    A file may hold arguments for several methods between which the command line chooses.
    """
    read = dict(used)
    for family in FAMILIES:
        inherited = [draft.entries[family.key][entry] for entry in used[family.key]]
        read[family.section.key] = list(dict.fromkeys([*used[family.section.key], *inherited]))
    for name in draft.overridden:
        section, _, method = name.rpartition(".")[0].rpartition(".")
        if section in read and method not in read[section]:
            names = ", ".join(read[section]) or "nothing"
            yield (
                name,
                f"--config.{name} has no effect, because the configuration does not use "
                f"{method}; of {section} it uses {names}",
            )
        other = _overruling(name)
        if other and draft[other] not in (None, ()):
            yield (
                name,
                f"--config.{name} has no effect, because {other} is {spell(draft[other])}; "
                f"add --config.{other}={'none' if draft.keys[other].optional else repr('')}",
            )


def _overruling(name: str) -> str:
    """The key whose value keeps this one from being read, or ''."""
    owner, _, argument = name.rpartition(".")
    section, _, entry = owner.rpartition(".")
    others = OVERRULED.get(f"{section}.*.{argument}", "").replace("*", entry)
    return OVERRULED.get(name, others)


def _assemble(draft: Draft, used: Mapping[str, list[str]]) -> dict:
    config, owned = {}, {}
    for name in draft.keys:
        owner, _, argument = name.rpartition(".")
        owned.setdefault(owner, []).append(argument)
    for name in shared_keys():
        *above, last = name.split(".")
        place(config, above)[last] = draft[name]
    for section, names in used.items():
        methods = place(config, section.split("."))
        for name in names:
            owner = f"{section}.{name}"
            methods[name] = {own: draft[f"{owner}.{own}"] for own in owned.get(owner, ())}
    return config
