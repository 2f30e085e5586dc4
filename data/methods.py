"""Finds a method's file by its name and builds it from its own arguments."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path


def make(folder: str, kind: str, name: str, own: Mapping, *args):
    """`data.<folder>.<name>.<kind>(*args, **own)`, for instance `('sources', 'Source', 'stdlib')`.

    Raises ValueError, naming what is nearest, for an unknown name or argument.
    """
    if name not in (names := _names(folder)):
        raise ValueError(f"There is no data/{folder}/{name}.py.{_nearest(name, names)}")
    module = importlib.import_module(f"data.{folder}.{name}")
    if not hasattr(module, kind):
        raise ValueError(f"data/{folder}/{name}.py has no class {kind}.")
    method = getattr(module, kind)
    parameters = inspect.signature(method).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for argument in own:
        if argument not in known:
            raise ValueError(f"{name} has no argument {argument!r}.{_nearest(argument, known)}")
    return method(*args, **own)


def _names(folder: str) -> list[str]:
    files = (Path(__file__).parent / folder).glob("*.py")
    return sorted(path.stem for path in files if path.stem != "__init__")


def _nearest(word: str, known: list[str]) -> str:
    if not known:
        return " It has none."
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else f" Known: {', '.join(known)}."
