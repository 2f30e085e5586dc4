"""A dataclass' fields from a command line, by their types; a field may be a dataclass itself."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from launch.schema import KINDS, Key, UsageError


def read(key: Key, name: str, text: str) -> Any:
    """The value of a flag or a field. Raises UsageError."""
    try:
        return key.parse(text)
    except TypeError as error:
        raise UsageError(f"--{name} {error}") from None


def changed(instance: Any, texts: Mapping[str, str], prefix: str = "") -> Any:
    """The instance with fields set from texts; `a.b` is field b of field a.

    prefix: of the flags, 'config.' for --config.T.

    Raises UsageError: no such field, or not what the field or the whole takes.
    """
    hints = typing.get_type_hints(type(instance))
    values = {}
    for flag, text in texts.items():
        name, _, rest = flag.partition(".")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
            raise UsageError(f"--{prefix}{flag} is no field; did you mean --{prefix}{near[0]}?")
        current = values.get(name, getattr(instance, name))
        if rest and dataclasses.is_dataclass(current):
            values[name] = changed(current, {rest: text}, f"{prefix}{name}.")
        else:
            values[name] = read(_key(hints[name], prefix + flag), prefix + flag, text)
    try:
        return dataclasses.replace(instance, **values)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def _key(hint: Any, flag: str) -> Key:
    kinds = typing.get_args(hint) or (hint,)
    kind = next((kind for kind in kinds if kind in KINDS.values()), None)
    if kind is None:
        raise UsageError(f"--{flag} cannot be set on a command line")
    return Key(kind, None, type(None) in kinds)
