"""What heat maps show, read from the figure before it is closed and from the written pixels."""

import io
import itertools
import struct

import numpy as np
import pytest

from analysis import heat, plotting

WORDS = dict(rows="expert", columns="expert also chosen", value="share of the expert's tokens")
NAMES = ("code", "prose_of_several_languages", "tables")


@pytest.fixture
def drawn(monkeypatch):
    """drawn(layers, names): (the figure of their picture, its PNG)."""
    plt, kept = plotting.pyplot("nothing"), []
    close = plt.close
    monkeypatch.setattr(plt, "close", kept.append)

    def draw(layers, names=(), title="blocks/0/ffn/co_activation"):
        png = heat.picture(layers, title, **WORDS, names=names)
        return kept[-1], png

    yield draw
    for figure in kept:
        close(figure)


def maps(N, R, C, seed=0):
    values = np.random.default_rng(seed).uniform(size=(N, R, C))
    return {f"layer {3 * n}": (1 + n) * x for n, x in enumerate(values)}


def shown(figure):
    """The maps of a figure, in their order; the last of all is the colours'."""
    return [axes for axes in figure.axes[:-1] if axes.get_visible()]


@pytest.mark.parametrize("shape", [(2, 8, 8), (7, 3, 16), (1, 1, 1), (5, 40, 2)])
def test_a_map_a_layer_on_one_scale(drawn, shape):
    layers = maps(*shape)
    figure, png = drawn(layers)
    assert png[:4] == b"\x89PNG"
    axes = shown(figure)
    assert [place.get_title() for place in axes] == list(layers)
    top = max(x.max() for x in layers.values())
    for place, values in zip(axes, layers.values(), strict=True):
        (image,) = place.images
        np.testing.assert_array_equal(image.get_array(), values)
        assert image.get_clim() == (0, top)
    words = [figure.get_supxlabel(), figure.get_supylabel(), figure.axes[-1].get_ylabel()]
    assert words == [WORDS["columns"], WORDS["rows"], WORDS["value"]]
    assert figure.get_suptitle() == "blocks/0/ffn/co_activation"


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 8, 8), ()),
        ((12, 64, 64), ()),
        ((4, 256, 256), ()),
        ((1, 1, 1), ()),
        ((2, 3, 8), NAMES),
        ((12, 3, 64), NAMES),
        ((1, 1, 8), NAMES[:1]),
        ((3, 40, 8), tuple(f"domain_{i}" for i in range(40))),
    ],
)
def test_nothing_that_is_written_is_cut_off_or_covered(drawn, shape, names):
    figure, png = drawn(maps(*shape), names)
    wide, high = struct.unpack(">II", png[16:24])
    assert 300 <= wide <= 3000
    assert 250 <= high <= 3000
    renderer = figure.canvas.get_renderer()
    boxes = []
    for text in figure.findobj(lambda artist: hasattr(artist, "get_text")):
        box = text.get_window_extent(renderer)
        if text.get_text() and text.get_visible() and _seen(text):
            boxes.append((text.get_text(), box))
            assert min(box.x0, box.y0) >= -1, text
            assert box.x1 <= wide + 1, text
            assert box.y1 <= high + 1, text
    for axes in shown(figure):
        box = axes.get_window_extent(renderer)
        assert box.width > 150, "names take the place of maps"
        assert box.height > 50
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)


def _seen(text):
    """Whether it belongs to a map that is shown, or to the figure itself."""
    return text.axes is None or text.axes.get_visible()


def test_rows_have_their_names(drawn):
    figure, _ = drawn(maps(4, 3, 64), NAMES)
    axes = shown(figure)
    left = [label.get_text() for label in axes[0].get_yticklabels()]
    assert left == list(NAMES)
    assert axes[0].get_yticks().tolist() == [0, 1, 2]
    sides = [place.yaxis.get_tick_params().get("labelleft", True) for place in axes]
    assert sides == [True, False, True, False]


def test_rows_without_names_have_whole_numbers(drawn):
    figure, _ = drawn(maps(1, 2, 3))
    (axes,) = shown(figure)
    for ticks in (axes.get_xticks(), axes.get_yticks()):
        assert set(ticks) >= {0, 1}
        assert all(tick == int(tick) for tick in ticks)


def test_colours_go_from_dark_to_light_and_nothing_is_grey(drawn):
    plt = plotting.pyplot("nothing")
    layers = {"layer 0": np.array([[0.0, 0.25], [1.0, np.nan]])}
    figure, png = drawn(layers)
    pixels = plt.imread(io.BytesIO(png))[..., :3]
    (axes,) = shown(figure)
    at = lambda x, y: axes.transData.transform((x, y)).round().astype(int)
    colour = lambda x, y: pixels[len(pixels) - at(x, y)[1], at(x, y)[0]]
    viridis = plt.get_cmap("viridis")
    for x, y, share in [(0, 0, 0.0), (1, 0, 0.5), (0, 1, 1.0)]:  # of the colours: square roots
        np.testing.assert_allclose(colour(x, y), viridis(share)[:3], atol=0.01)
    np.testing.assert_allclose(colour(1, 1), 0.8, atol=0.01)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_maps_without_anything_are_drawn(drawn, value):
    figure, _ = drawn({"layer 0": np.full((4, 4), value)})
    assert shown(figure)[0].images[0].get_clim() == (0, 1)


def test_the_same_values_give_the_same_bytes(drawn):
    png = drawn(maps(2, 8, 8))[1]
    assert drawn(maps(2, 8, 8))[1] == png
    assert b"matplotlib" not in png.lower()
