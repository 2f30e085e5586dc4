"""The keys of a configuration: shared ones from experiments/base.py, own ones from signatures.

Everything is read from source text with `ast`: no method is imported, and therefore no jax.
"""

import ast
import dataclasses
import difflib
import io
import math
import pathlib
import tokenize
from collections.abc import Collection, Iterable

KINDS = {"int": int, "float": float, "bool": bool, "str": str}
NOUNS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "names separated by commas",
}


class UsageError(Exception):
    """One sentence that tells the user what to change."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What may be written for a key or a flag.

    kind: int, float, bool, str or tuple (of str).  optional: `none` is accepted.
    choices: the only values accepted, if there are any.  comment: a line for --help.
    raw: a text is taken to the letter, quotes and `none` included.
    inherits: the key whose value holds instead of the default, if there is one.
    """

    kind: type
    default: object = None
    optional: bool = False
    choices: tuple[str, ...] = ()
    comment: str = ""
    raw: bool = False
    inherits: str = ""

    @property
    def expects(self) -> str:
        """The values accepted, in words."""
        words = " | ".join(self.choices) if self.choices else NOUNS[self.kind]
        return f"{words} or none" if self.optional else words

    def conform(self, value: object) -> object:
        """The value in this key's type (an int becomes a float, a list a tuple).

        Raises TypeError: it has another type, is not finite, or is not among the choices.
        """
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if self.kind is tuple and isinstance(value, list):
            value = tuple(value)
        wrong = type(value) is not self.kind
        wrong = wrong or (self.kind is float and not math.isfinite(value))
        wrong = wrong or (self.kind is tuple and not all(type(item) is str for item in value))
        if wrong or (self.choices and value not in self.choices):
            raise TypeError(f"takes {self.expects} and got {value!r}")
        return value

    def parse(self, text: str) -> object:
        """The value that a text on the command line stands for. Raises TypeError as `conform`."""
        if self.raw:
            return text
        if self.optional and text.lower() == "none":
            return None
        try:
            value = PARSERS[self.kind](text)
        except (ValueError, SyntaxError, KeyError):
            value = text
        return self.conform(value)


def _parse_text(text: str) -> object:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return ast.literal_eval(text) if quoted else text


def _parse_tuple(text: str) -> object:
    if text[:1] in "([":
        return ast.literal_eval(text) if text else ()
    return tuple(_parse_text(part.strip()) for part in text.split(",") if part.strip())


PARSERS = {
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    str: _parse_text,
    tuple: _parse_tuple,
}


def spell(value: object) -> str:
    """The value as it may be written on a command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return (",".join(value) or "()") if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True)
class Section:
    """Where own arguments of one sort of method live.

    key: their place in the configuration, `<key>.<method>.<argument>`.
    home: the folder whose files are methods, or the one file whose functions are.
    constructor: the class or the function in such a file.  chosen_by: the key that names methods.
    """

    key: str
    home: str
    constructor: str
    chosen_by: str

    def source(self, method: str) -> str:
        """The file that defines this method, relative to the repository."""
        return self.home if self.home.endswith(".py") else f"{self.home}/{method}.py"

    def absent(self, key: str, name: str, known: Iterable[str]) -> str:
        """The sentence for a key that names a method which is not there."""
        file = f"{self.home}/{name}.py"
        lacks = f"{self.home} has no {name}.py"
        if self.home.endswith(".py"):
            lacks = f"{self.home} has no such function"
        elif (pathlib.Path(__file__).resolve().parents[1] / file).is_file():
            lacks = f"{file} has no {self.constructor}"
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key} names {name!r}, and {lacks}{guess}"


SOURCES = Section("data.sources", "data/sources", "Source", "data.source")
MIXERS = Section("model.mixers", "models/mixers", "Mixer", "model.pattern")
FFNS = Section("model.ffns", "models/ffns", "FFN", "model.ffn")
SECTIONS = (
    SOURCES,
    Section("data.mixings", "data/mixings", "Mixing", "data.mixing"),
    Section("data.tokenizers", "data/tokenizers", "Tokenizer", "data.tokenizer"),
    Section("data.packings", "data/transforms", "Packer", "data.packing"),
    Section("data.transform", "data/transforms", "Transform", "data.transforms"),
    MIXERS,
    FFNS,
    Section("model.heads", "models/heads", "Head", "model.head"),
    Section("adapter", "training/adapters", "make", "adapter.name"),
    Section("loss.losses", "training/losses", "make", "loss.name"),
    Section("balance.balances", "training/balances", "make", "balance.name"),
    Section("optim.methods", "optim/methods", "make", "optim.name"),
    Section("optim.schedules", "optim/schedules.py", "", "optim.schedule"),
)


def methods(
    root: pathlib.Path, section: Section, mentioned: Collection[str]
) -> dict[str, dict[str, Key]]:
    """All methods of a section with their own keys: {method: {argument: Key}}.

    A file without the constructor is not a method. Raises UsageError: a file is not Python, or a
    signature breaks the rule that every own argument is annotated and has a literal default; of
    files that are not `mentioned` in the configuration such a one, half written, is left out.
    """
    home = root / section.home
    if home.suffix == ".py":
        functions = _functions(home) if home.exists() else {}
        return {name: own(node, home, root) for name, node in functions.items()}
    found = {}
    for path in sorted(home.glob("*.py")):
        try:
            node = None if path.stem.startswith("_") else _constructor(path, section.constructor)
            if node is not None:
                found[path.stem] = own(node, path, root)
        except UsageError:
            if path.stem in mentioned:
                raise
    return found


def _tree(path: pathlib.Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UsageError(f"{path} line {error.lineno} is not Python: {error.msg}") from None


def _functions(path: pathlib.Path) -> dict[str, ast.FunctionDef]:
    nodes = (node for node in _tree(path).body if isinstance(node, ast.FunctionDef))
    return {node.name: node for node in nodes if not node.name.startswith("_")}


def _constructor(path: pathlib.Path, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            inner = node.body if isinstance(node, ast.ClassDef) else ()
            inits = (child for child in inner if getattr(child, "name", "") == "__init__")
            return next(inits, node)
    return None


def own(node: ast.AST, path: pathlib.Path, root: pathlib.Path) -> dict[str, Key]:
    """The own keys of a constructor: its keyword-only arguments that have a default.

    Those without one (`rngs`) are given by the code that calls it.
    """
    if isinstance(node, ast.ClassDef):
        return {}
    comments = trailing_comments(path.read_text(encoding="utf-8"))
    keys = {}
    for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if default is None:
            continue
        try:
            kind, optional, choices = _annotation(arg.annotation)
            key = Key(kind, None, optional, choices, comments.get(default.end_lineno, ""))
            keys[arg.arg] = dataclasses.replace(key, default=key.conform(ast.literal_eval(default)))
        except (ValueError, TypeError):
            place = f"{path.relative_to(root)} line {arg.lineno}"
            raise UsageError(
                f"{place}: own argument {arg.arg!r} must be annotated int, float, bool or str, "
                "perhaps '| None', and have a literal default of that type"
            ) from None
    return keys


def _annotation(node: ast.expr | None) -> tuple[type, bool, tuple[str, ...]]:
    parts = [] if node is None else [part.strip() for part in ast.unparse(node).split(" | ")]
    kinds = [part for part in parts if part != "None"]
    if len(kinds) == 1 and kinds[0].startswith("Literal["):
        choices = ast.literal_eval(f"({kinds[0].removeprefix('Literal[').removesuffix(']')},)")
        return str, "None" in parts, choices
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise ValueError("not an annotation of an own argument")
    return KINDS[kinds[0]], "None" in parts, ()


def trailing_comments(source: str) -> dict[int, str]:
    """{line number: the comment at its end, without the sign}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def documented(source: str) -> dict[str, str]:
    """{dotted key: trailing comment} of every `config.<key> = ...` in a source, in its order."""
    comments, found = trailing_comments(source), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            name = ast.unparse(node.targets[0])
            if name.startswith("config."):
                found[name.removeprefix("config.")] = comments.get(node.end_lineno, "")
    return found
