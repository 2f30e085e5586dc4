import ast
import io
import re
import tokenize

import numpy as np
import pytest

from data.pipeline import build
from data.sources.prose import Source, said
from data.sources.stdlib import Source as Code

FILE = '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
# Of the file.
#
#   indented
###################
"""The module.

    Indented.
"""
x = 1  # beside code
y = """
# in a string
"""
z = f"""{x}
# in a formatted string
{x
+ 1}
# again
"""


class A:
    """The class."""

    # Before
    # a method: coding: utf-8

    def f(self):
        "The method's."
        "no docstring"
        # Within.
        if x:
            async def g():
                """
                    Deep.

                      Deeper.
                """
        return "# a value"


class B: "On a line."
# ---- the end ----
'''
SAID = [
    "Of the file.\n\n  indented",
    "The module.\n\nIndented.",
    "The class.",
    "Before\na method: coding: utf-8",
    "The method's.",
    "Within.",
    "Deep.\n\n  Deeper.",
    "On a line.",
    "---- the end ----",
]


def test_a_file_is_its_docstrings_and_comments_in_order():
    assert said(FILE.encode(), "file.py") == "\n\n".join(SAID) + "\n"
    assert said(FILE.replace("\n", "\r\n").encode(), "file.py") == "\n\n".join(SAID) + "\n"
    assert said(b"x = 1  # beside\n", "file.py") == said(b"#!/bin/sh\n# ----\n", "") == ""


def test_warnings_of_the_code_are_its_own():
    assert said(b'"""A \\d."""\nx = 1 is 1\n', "file.py") == "A \\d.\n"


def test_other_encodings_become_utf8(tmp_path):
    (tmp_path / "a.py").write_bytes("# coding: latin-1\n# für\n'''\\ud800'''\n".encode("latin-1"))
    source = Source(root=str(tmp_path), holdout=0)
    assert source.documents("train")[0].tobytes().decode() == "für\n\n?\n"


def write(root, count=60):
    for k in range(count):
        path = root / f"package{k % 7}" / f"module{k}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""About {k}."""\nvalue{k} = 1\n')
    (root / "silent.py").write_text("x = 1\n")
    (root / "LICENSE.txt").write_text("You may.")
    (root / "other.txt").write_text("other")
    return str(root)


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "lib")


def split(source):
    return [set(source.documents(name).names) for name in ("train", "validation")]


def test_files_are_held_out_where_their_code_is(root):
    prose, code = split(Source(root=root, holdout=0.3)), split(Code(root=root, holdout=0.3))
    assert [names - {"LICENSE.txt"} for names in prose] == [names - {"silent.py"} for names in code]
    assert "LICENSE.txt" in prose[0] | prose[1]
    documents = Source(root=root, holdout=0.3).documents("validation")
    for k, name in enumerate(documents.names):
        about = name.split("module")[-1].removesuffix(".py")
        assert documents[k].tobytes() in (f"About {about}.\n".encode(), b"You may.")


def test_fingerprints_are_of_the_prose(root, tmp_path):
    before = Source(root=root).fingerprint()
    path = tmp_path / "lib" / "package3" / "module3.py"
    path.write_text(path.read_text().replace("= 1", "= 2"))
    assert Source(root=root).fingerprint() == before
    path.write_text(path.read_text() + "# more\n")
    assert Source(root=root).fingerprint() != before


def test_budgets_leave_validation_whole(root):
    whole = Source(root=root, holdout=0.3)
    small, large = (Source(root=root, holdout=0.3, max_bytes=n) for n in (100, 300))
    assert [len(s.documents("train").tokens) for s in (small, large)] == [100, 300]
    assert set(small.documents("train").names) <= set(large.documents("train").names)
    assert small.documents("validation").names == whole.documents("validation").names


BAD = (
    b"print 'x'\n",
    b"# coding: nonsense\n",
    b"\n\n\n# \xff\n",
    # Nested too deeply, for the tree and for the parser.
    *(b"x = " + b"-" * depth + b"1\n" for depth in (5_000, 99_999)),
)


def test_errors_are_sentences(root, tmp_path):
    with pytest.raises(ValueError, match=r"no non-empty \*\.py file in .*nowhere"):
        Source(root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holdout .* got 1"):
        Source(root=root, holdout=1.0)
    with pytest.raises(ValueError, match=r"max_bytes .* got 0"):
        Source(root=root, max_bytes=0)
    with pytest.raises(ValueError, match=r"'validation' of the prose of .* raise holdout"):
        Source(root=root, holdout=0.0).documents("validation")
    for k, bad in enumerate(BAD):
        (tmp_path / "lib" / "old.py").write_bytes(bad)
        with pytest.raises(ValueError, match=r"lib/old\.py is not Python .* set root to"):
            Source(root=root, holdout=k / 9).documents("train")


def test_silent_files_are_no_corpus(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="There is no text in the prose of"):
        Source(root=str(tmp_path)).documents("train")


@pytest.fixture(scope="module")
def embedded():
    """{file: code}, {file: prose} of the standard library."""
    code, prose = Code(), Source()
    return [
        {s: dict(zip(d.names, map(d.__getitem__, range(len(d))), strict=True)) for s, d in both}
        for both in (
            [(s, source.documents(s)) for s in ("train", "validation")] for source in (code, prose)
        )
    ]


def test_the_embedded_corpus(embedded):
    code, prose = embedded
    size = {split: sum(map(len, found.values())) for split, found in prose.items()}
    assert size["train"] > 2e6
    assert 0.01 < size["validation"] / size["train"] < 0.2
    for split, found in prose.items():
        assert found.keys() - code[split].keys() <= {"LICENSE.txt", "LICENSE"}
        texts = {text.tobytes() for text in found.values()}
        # Packages that say no more than "This directory is a Python package." say it alike.
        assert len(texts) > 0.99 * len(found)
    long = [text.tobytes() for text in prose["validation"].values() if len(text) > 100]
    assert not {text.tobytes() for text in prose["train"].values()} & set(long)


def worded(line):
    return line.strip("# \t\f")


def test_no_line_of_code_and_nothing_said_is_lost(embedded):
    """Against the tokenizer of the library, which tells comments from all else by itself."""
    lost = found = 0
    for split, files in embedded[1].items():
        for name, text in list(files.items())[:: 8 if split == "train" else 2]:
            if not name.endswith(".py"):
                continue
            raw = embedded[0][split][name].tobytes()
            lines = {worded(line) for line in text.tobytes().decode().split("\n")}
            comments, docstrings = set(), set()
            for token in tokenize.tokenize(io.BytesIO(raw).readline):
                if token.type == tokenize.COMMENT and token.line.strip() == token.string.strip():
                    comments.add(worded(token.string))
            for node in ast.walk(ast.parse(raw)):
                documented = isinstance(node, ast.Module | ast.ClassDef)
                if documented or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    docstring = (ast.get_docstring(node) or "").strip()
                    assert docstring in text.tobytes().decode()
                    docstrings |= {worded(line) for line in docstring.split("\n")}
            assert lines <= comments | docstrings | {""}
            comments = {line for line in comments if re.search(r"\w", line)}
            lost, found = lost + len(comments - lines), found + len(comments & lines)
    # Encodings, and comments between the strings of one expression.
    assert lost < 0.01 * found


def test_four_domains_mix(root):
    own = {"stdlib": {"root": root}, "prose": {"root": root}}
    mixture = ("stdlib", "prose", "records", "arithmetic")
    make = lambda: build(seed=3, batch_size=8, length=64, mixture=mixture, sources=own)
    data, again = make(), make()
    rows = data.local(0, 0, 40)
    assert np.bincount(rows.domain).tolist() == [10] * 4
    for k in (0, 7, 22, 39):
        alone = again.row(k)
        assert all(np.array_equal(a, b[k]) for a, b in zip(alone, rows, strict=True))
    assert (rows.weights.sum(1) > 0).all()
