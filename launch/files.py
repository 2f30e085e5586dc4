"""Configuration files: finding, running, writing and reading them."""

import ast
import difflib
import importlib.util
import pathlib
import traceback
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from launch.provenance import ROOT
from launch.schema import UsageError


def find(path: str, root: pathlib.Path = ROOT) -> pathlib.Path:
    """The file meant by --config: as given, below the repository, or a name in experiments/.

    Raises UsageError, which lists near files.
    """
    given, folder = pathlib.Path(path), root / "experiments"
    for candidate in (given, root / given, folder / f"{path}.py"):
        if candidate.is_file():
            return candidate
    beside = [place for place in (given.parent, root / given.parent) if place.is_dir()]
    around = beside[0] if beside and given.parent.name else folder
    stems = sorted(file.stem for file in around.glob("*.py") if not file.stem.startswith("_"))
    near = difflib.get_close_matches(given.stem, stems, n=3, cutoff=0.4) or stems
    names = ", ".join(f"{stem}.py" for stem in near) or "no configuration"
    raise UsageError(f"there is no configuration {path!r}; in {around} there is {names}")


def load(path: pathlib.Path) -> dict[str, object]:
    """{dotted key: value} of a .py file's get_config(), or of a text that `render` wrote.

    Raises UsageError: the file fails, with its line, or gives no ConfigDict.
    """
    if path.suffix != ".py":
        text = path.read_text(encoding="utf-8", errors="replace")
        return dict(leaves(read(text, path.name)))
    spec = importlib.util.spec_from_file_location(f"configuration_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # A user's file may raise anything; it is told in one sentence.
        raise UsageError(_failure(path, error)) from None
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict")
    return dict(leaves(config))


def _failure(path: pathlib.Path, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f"{path} line {line}" if line else str(path)
    return f"{place}: {type(error).__name__}: {' '.join(str(error).split())}"


def leaves(tree: Mapping | ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of a nested dict."""
    for name, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def place(tree: dict, path: list[str]) -> dict:
    """The nested dict at this path, made where it is missing."""
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def render(config: Mapping, prefix: str = "") -> str:
    """The configuration as text, one `key = value` a line (sections that are empty as `{}`)."""
    lines = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            lines.append(render(value, f"{prefix}{name}."))
        else:
            lines.append(f"{prefix}{name} = {value!r}\n")
    return "".join(lines)


def read(text: str, name: str = "text") -> dict:
    """The configuration that `render` wrote. Raises UsageError for a line that it did not write."""
    config = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, _, value = line.partition(" = ")
        *above, last = key.split(".")
        try:
            place(config, above)[last] = ast.literal_eval(value)
        except (ValueError, SyntaxError, AttributeError, TypeError):
            raise UsageError(f"{name} line {number} is not 'key = value': {line!r}") from None
    return config
