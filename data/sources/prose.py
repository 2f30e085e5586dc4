"""The prose that every Python installation carries: what its library says about itself."""

import ast
import functools
import importlib.util
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping

from data import methods
from data.holdout import share
from data.parted import Parted

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_MEMORY_GB = 8.0
# What the first two lines of a file may say to programs and not to people.
_FOR_PROGRAMS = re.compile(r"#!|#.*?coding[:=]")


class Source(Parted):
    """Docstrings and comments of the files of the source stdlib, one document a file.

    A document holds what its file says in the file's order: docstrings, without the indentation,
    and comments with lines of their own, without #; an empty line stands between any two of them.
    No line of code is among it, nor any other string. Files that say nothing are left out. The
    licence, files in the root whose names begin with LICENSE, is a document as well.

    root: folder; None for the running Python's standard library (about 2.7 MB of prose).
    holdout: share of files kept for the split 'validation'. It is decided as in stdlib and by the
        same names, so with equal shares what a held-out file says is held out too.
    max_bytes: see `Parted`.

    The files are read at once, and parsed when documents are first asked for. Raises ValueError
    where there is no file, one is not Python, or an argument is out of range.
    """

    domain = "prose"

    def __init__(
        self,
        *,
        root: str | None = None,  # folder; none for the running Python's standard library
        holdout: float = 0.05,  # share of files kept for validation
        max_bytes: int | None = None,  # bytes kept for training
    ):
        self._code = methods.make("sources", "Source", "stdlib", {"root": root, "holdout": holdout})
        self._root, self._holdout = self._code.root, holdout
        corpus = f"the prose of {self._root}"
        super().__init__(corpus, holdout=holdout, max_bytes=max_bytes, memory_gb=_MEMORY_GB)

    def sizes(self) -> Mapping[str, int]:
        """{part: bytes of the file}; a part is a file."""
        return {name: len(raw) for name, (_, raw) in self._files.items()}

    def texts(self, part: str) -> Iterator[tuple[str, str, bytes]]:
        """(split, document's name, text) of a file. Raises ValueError where it is not Python."""
        split, raw = self._files[part]
        code = part.endswith(".py")
        text = said(raw, f"{self._root / part}") if code else raw.decode(errors="replace")
        yield split, part, text.encode(errors="replace")

    @functools.cached_property
    def _files(self) -> dict[str, tuple[str, bytes]]:
        """{path relative to the root: (split, content)}."""
        found = {}
        for split in ("train", "validation"):
            if self._code.count(split):
                documents = self._code.documents(split)
                names = enumerate(documents.names)
                found |= {name: (split, documents[k].tobytes()) for k, name in names}
        for path in self._root.glob("LICENSE*"):
            if path.is_file() and path.name not in found:
                held = share("split", path.name) < self._holdout
                found[path.name] = "validation" if held else "train", path.read_bytes()
        return dict(sorted(found.items()))


def said(raw: bytes, path: str) -> str:
    """Docstrings and whole-line comments of a Python file, in its order.

    path: for messages. Raises ValueError where the content is not Python.
    """
    try:
        code = importlib.util.decode_source(raw)
        with warnings.catch_warnings(action="ignore"):  # About the code's own style.
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{path} is not Python that this interpreter reads ({error}); set root to a folder of "
            "files that are."
        ) from None
    strings, found = _strings(tree)
    found |= _comments(code.split("\n"), strings)
    return "".join(f"{text}\n\n" for _, text in sorted(found.items()) if text)[:-1]


def _strings(tree: ast.Module) -> tuple[set[int], dict[int, str]]:
    """Lines that begin within a string, and {line: docstring} by the lines where these begin."""
    inside, docstrings, left = set(), {}, [tree]
    while left:
        node = left.pop()
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            docstrings[node.body[0].lineno] = text.strip()
        if isinstance(node, ast.Constant):  # Those of a formatted string are its parts.
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
        left += [child for child in ast.iter_child_nodes(node) if _may_hold(child)]
    return inside, docstrings


def _may_hold(node: ast.AST) -> bool:
    # Looking at nodes of several lines alone takes a third of the time.
    if isinstance(node, _DOCUMENTED):
        return True
    return getattr(node, "end_lineno", 0) > getattr(node, "lineno", 0)


def _comments(lines: list[str], strings: set[int]) -> dict[int, str]:
    """{line: text} of comments that have lines for themselves; neighbouring ones are one text."""
    found, block = {}, []
    for number, line in enumerate([*lines, ""], 1):
        bare = line.strip()
        if bare.startswith("#") and number not in strings:
            silent = number <= 2 and _FOR_PROGRAMS.match(bare)
            block.append("" if silent else _worded(bare))
        elif block:
            found[number - len(block)] = textwrap.dedent("\n".join(block)).strip("\n")
            block = []
    return found


def _worded(comment: str) -> str:
    """Without #; nothing of a line that only separates."""
    text = comment.lstrip("#").rstrip("#").rstrip()
    return text if re.search(r"\w", text) else ""
