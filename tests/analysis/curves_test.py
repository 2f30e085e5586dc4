"""The picture of schedules, read from the figure before it is closed."""

import ast
import inspect
import pathlib
import types

import numpy as np
import pytest

from analysis import curves, plotting
from launch import curves as command
from optim import schedules


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(): {title: panel} of what the command draws."""
    plt, kept = plotting.pyplot("nothing"), []
    close = plt.close
    monkeypatch.setattr(plt, "close", kept.append)

    def draw():
        out = tmp_path / "a.png"
        command.main(["--out", str(out)])
        assert out.read_bytes()[:4] == b"\x89PNG"
        return {axes.get_title("left"): axes for axes in kept[-1].axes if axes.get_visible()}

    yield draw
    for figure in kept:
        close(figure)


def test_every_public_schedule_gets_a_panel_with_its_curve(drawn):
    """The names are those by which a configuration may choose: functions that the file defines."""
    nodes = ast.parse(pathlib.Path(schedules.__file__).read_text()).body
    named = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    panels = drawn()
    assert list(panels) == [name for name in named if name[0] != "_"]
    run = dict(total=curves.TOTAL, peak=curves.PEAK, warmup=curves.WARMUP)
    for name, axes in panels.items():
        batches = curves.BATCHES if name == "power" else curves.BATCHES[:1]
        *lines, _ = axes.lines  # the last is the peak's
        assert len(lines) == len(batches)
        for line, batch in zip(lines, batches, strict=True):
            n, rate = line.get_data()
            assert (n[0], n[-1]) == (0, curves.TOTAL)
            np.testing.assert_array_equal(rate, getattr(schedules, name)(n, batch=batch, **run))
        assert axes.get_ylim()[0] == 0 < max(line.get_ydata().max() for line in lines)
        assert axes.get_ylim()[1] > curves.PEAK


def test_a_panel_names_its_own_arguments_and_shows_its_phases(drawn):
    panels = drawn()
    for name, axes in panels.items():
        words = " ".join(text.get_text() for text in axes.texts).replace("\n", " ")
        parameters = inspect.signature(getattr(schedules, name)).parameters.values()
        own = {p.name: p.default for p in parameters if p.default not in (p.empty, None)}
        assert words == ", ".join(f"{key}={value}" for key, value in own.items())
    bands = lambda name: [(b.get_x(), b.get_x() + b.get_width()) for b in panels[name].patches]
    # In tokens of the run, which are exact in float64.
    assert bands("constant") == [(0, 5e9)]
    assert bands("wsd") == [(0, 5e9), (90e9, 100e9)]
    assert bands("infinite") == [(0, 5e9), (5e9, 65e9), (90e9, 100e9)]


def test_schedules_are_a_modules_own_public_functions_in_their_order():
    module = types.ModuleType("own")
    source = "from textwrap import wrap\n"
    source += "def b(n): ...\ndef _part(n): ...\ndef a(n): ..."
    exec(source, module.__dict__)
    assert [*curves.schedules(module)] == ["b", "a"]


def test_words_and_panels_do_not_overlap(drawn):
    panels = drawn()
    figure = next(iter(panels.values())).figure
    figure.canvas.draw()
    boxes = []
    for axes in panels.values():
        words = [axes.title, axes._left_title, *axes.texts, axes.xaxis.label]
        boxes += [text.get_window_extent() for text in words if text.get_text()]
        boxes.append(axes.patch.get_window_extent())
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for place, box in enumerate(boxes):
        assert box.x0 >= 0 <= box.y0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert box.count_overlaps(boxes[place + 1 :]) == 0
