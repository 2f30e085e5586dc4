"""What the function that train hands to a run shows of a metric, and where nothing can draw."""

import sys
import types

import numpy as np
import pytest

from analysis import heat
from launch import pictures, train
from tests import tiny

MODEL = {"layers": 8, "prefix": ("a",), "pattern": ("a", "b"), "suffix": ("a",)}
DOMAINS = ("code", "prose")


@pytest.fixture
def shown(monkeypatch):
    """shown(name, values): what is drawn, as (maps, title, words)."""
    draw = drawer()

    def show(name, values):
        seen = []
        monkeypatch.setattr(heat, "picture", lambda *what, **words: seen.append((*what, words)))
        draw(name, np.float32(values))
        return seen[0]

    return show


def drawer():
    data = types.SimpleNamespace(domains=list(DOMAINS))
    return pictures.drawer(types.SimpleNamespace(config={"model": MODEL}, data=data))


@pytest.mark.parametrize(
    ("path", "numbers"),
    [("blocks/0/ffn", [1, 3, 5]), ("blocks/1/ffn", [2, 4, 6]), ("prefix/0/ffn", [0])],
)
@pytest.mark.parametrize("kind", ["co_activation", "experts_by_domain", "of_another_kind"])
def test_maps_have_the_numbers_of_their_layers_in_the_model(shown, path, numbers, kind):
    values = np.random.default_rng(0).uniform(0.1, 1, (len(numbers), 2, 2))
    single = path.startswith("prefix")
    maps, title, _ = shown(f"picture/{path}/{kind}", values[0] if single else values)
    assert title == f"{path}/{kind}"
    assert list(maps) == [f"layer {number}" for number in numbers]
    for found, value in zip(maps.values(), values, strict=True):
        if kind == "co_activation":
            np.fill_diagonal(value, np.nan)
        np.testing.assert_array_equal(found, np.float32(value))


def test_rows_without_a_token_are_grey(shown):
    values = np.array([[1, 0, 0.5], [0, 0, 0], [0.25, 0, 1]])
    (found,) = shown("picture/suffix/0/ffn/co_activation", values)[0].values()
    nan = np.nan
    np.testing.assert_array_equal(found, [[nan, 0, 0.5], [nan, nan, nan], [0.25, 0, nan]])
    (found,) = shown("picture/suffix/0/ffn/experts_by_domain", values[:2])[0].values()
    np.testing.assert_array_equal(found, [[1, 0, 0.5], [nan, nan, nan]])


def test_rows_are_named_after_domains(shown):
    values = np.ones((2, 4))
    words = shown("picture/suffix/0/ffn/experts_by_domain", values)[2]
    assert words == dict(
        rows="domain", columns="expert", value="share of the domain's choices", names=DOMAINS
    )
    assert shown("picture/suffix/0/ffn/co_activation", np.ones((4, 4)))[2]["names"] == ()
    assert shown("picture/suffix/0/of_another_kind", values)[2]["names"] == ()


def test_a_run_is_given_it(tmp_path):
    built = tiny.setup(tiny.corpus(tmp_path / "corpus"), model__layers=2)
    head = {"flops_per_token": {}}
    draw = train.prepare(built, tmp_path, head).draw
    png = draw("picture/blocks/0/ffn/experts_by_domain", np.full((2, 1, 4), 0.25, np.float32))
    assert png[:4] == b"\x89PNG"


def test_without_matplotlib_a_sentence_says_so_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw = drawer()
    assert [draw("picture/prefix/0/ffn/co_activation", np.eye(2)) for _ in range(3)] == [None] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: matplotlib is not installed, so a heat map was not drawn; run ")
