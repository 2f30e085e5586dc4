"""The parameter table of a small model, and state to flat dictionary and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.lm import LM
from models.param import Dims, flatten, param, restore, table
from parallel import mesh as meshes
from parallel.weight import Entry, Weight
from tests.models.built import TINY

SMALL = dict(layers=4, prefix=("attention",), pattern=("attention",), suffix=("attention",))
SMALL |= dict(positions="learned", token_types=2, embed_norm=True, norm="layernorm", tied=False)
SMALL |= dict(mixers={"attention": {"heads": 4, "kv_heads": 2, "bias": True, "qk_norm": True}})
SMALL |= dict(ffns={"swiglu": {"width": 24, "bias": True}})
STD, WRITERS = 1 / math.sqrt(16), math.sqrt(8)  # of 4 layers with two sublayers each


def _vector(*axes, group="bias", start=("zeros",)):
    return Weight(axes, init=start, decay=False, group=group)


def _expected():
    """{path below a layer: (declaration, true shape)} of the layers, then those outside."""
    up = dict(fan_in=(0,), init=("normal", STD))
    layer = {
        "mixer/q": (Weight(("embed", "heads", None), fan_out=(1, 2), **up), (16, 4, 4)),
        "mixer/kv": (
            Weight(("embed", None, "heads", None), fan_out=(2, 3), stack=(1,), **up),
            (16, 2, 2, 4),
        ),
        "mixer/out": (
            Weight(("heads", None, "embed"), (0, 1), (2,), init=("normal", STD / WRITERS)),
            (4, 4, 16),
        ),
        "mixer/q_bias": (_vector("heads", None), (4, 4)),
        "mixer/kv_bias": (_vector(None, "heads", None), (2, 2, 4)),
        "mixer/out_bias": (_vector(None), (16,)),
        "ffn/up": (Weight(("embed", None, "ffn"), fan_out=(2,), stack=(1,), **up), (16, 2, 24)),
        "ffn/down": (
            Weight(("ffn", "embed"), (0,), (1,), init=("normal", 1 / math.sqrt(24) / WRITERS)),
            (24, 16),
        ),
        "ffn/up_bias": (_vector(None, "ffn"), (2, 24)),
        "ffn/down_bias": (_vector(None), (16,)),
    }
    scale, bias = _vector(None, group="norm", start=("ones",)), _vector(None, group="norm")
    layer |= {f"mixer/{name}_norm/scale": (scale, (4,)) for name in "qk"}
    norm = {"scale": (scale, (16,)), "bias": (bias, (16,))}
    layer |= {f"norms/{i}/{name}": row for i in range(2) for name, row in norm.items()}
    embedding = dict(fan_out=(1,), init=("normal", 1.0), group="embed")
    outside = {
        "tokens": (Weight(("vocab", "embed"), **embedding), (128, 16)),
        "positions": (Weight((None, "embed"), **embedding), (12, 16)),
        "types": (Weight((None, "embed"), **embedding), (2, 16)),
        "head/kernel": (Weight(("embed", "vocab"), fan_out=(1,), group="head", **up), (16, 128)),
    }
    outside |= {f"{at}/{n}": row for at in ("embed_norm", "final_norm") for n, row in norm.items()}
    return layer, outside


def test_table():
    state = nnx.state(nnx.eval_shape(lambda: LM(rngs=nnx.Rngs(0), **(TINY | SMALL))))
    layer, outside = _expected()
    expected = {path: Entry(weight, shape) for path, (weight, shape) in outside.items()}
    for home, lead in (("prefix/0", ()), ("blocks/0", (2,)), ("suffix/0", ())):
        expected |= {f"{home}/{p}": Entry(w, (*lead, *shape)) for p, (w, shape) in layer.items()}
    assert table(state) == expected


def test_entries_count_layers_and_parts():
    entry = Entry(Weight(("embed", None, "ffn"), (0,), (2,), (1,)), (3, 16, 2, 24))
    assert entry.layers == 1
    assert entry.axes == ("layers", "embed", None, "ffn")
    assert entry.stack_axes == (0, 2)
    assert entry.norm_axes == (1, 3)
    assert entry.is_matrix
    stacked_vector = Entry(Weight((None,), decay=False, group="norm"), (3, 16))
    assert stacked_vector.norm_axes == (1,)
    assert not stacked_vector.is_matrix


@pytest.mark.parametrize(
    ("init_std", "scale_residual", "inner", "writer"),
    [(None, True, 0.25, 0.25 / 2), (0.02, True, 0.02, 0.01), (0.02, False, 0.02, 0.02)],
)
def test_starts(init_std, scale_residual, inner, writer):
    dims = Dims(16, 8, 2, 16, init_std, scale_residual)  # 2 layers: residual writers / sqrt(4)
    for residual, std in ((False, inner), (True, writer)):
        kind, value = dims.normal(16, residual=residual)
        assert (kind, value) == ("normal", pytest.approx(std, rel=1e-12))


def test_arrays_start_as_declared_and_layers_differ():
    own = TINY | dict(layers=3, d_model=32, vocab=128)
    module = jax.jit(lambda: nnx.state(LM(rngs=nnx.Rngs(0), **own)))()
    entries, params = table(module), flatten(module)
    for path, entry in entries.items():
        value = np.asarray(params[path])
        assert value.dtype == np.float32
        assert value.shape == entry.shape
        if entry.weight.init[0] != "normal":
            assert np.all(value == {"zeros": 0, "ones": 1}[entry.weight.init[0]])
            continue
        std = entry.weight.init[1]
        # Five standard errors of the standard deviation and of the mean of n normal draws.
        assert abs(value.std() - std) < 5 * std / math.sqrt(2 * value.size)
        assert abs(value.mean()) < 5 * std / math.sqrt(value.size)
    q = np.asarray(params["blocks/0/mixer/q"])
    assert np.all(q[0] != q[1])
    assert np.all(q[1] != q[2])


def test_flatten_and_restore_are_inverse():
    graph, state = nnx.split(nnx.eval_shape(lambda: LM(rngs=nnx.Rngs(0), **(TINY | SMALL))))
    entries = table(state)
    params = {p: jnp.full(e.shape, i, jnp.float32) for i, (p, e) in enumerate(entries.items())}
    restored = restore(state, params)
    assert flatten(restored).keys() == params.keys()
    for path, value in flatten(restored).items():
        assert value is params[path]
    assert table(restored) == entries  # declarations survive
    model = nnx.merge(graph, restored)
    assert model.blocks[0].mixer.q[...].shape == (2, 16, 4, 4)
    np.testing.assert_array_equal(model.head.kernel[...], params["head/kernel"])


def test_errors():
    with pytest.raises(ValueError, match=r"\(2, 3\) has 2 dimensions and axes \('embed',\) 1"):
        param(nnx.Rngs(0), (2, 3), ("embed",))
    with pytest.raises(ValueError, match=r"init \('uniform', 1\) is unknown; known: \('normal'"):
        param(nnx.Rngs(0), (2,), (None,), init=("uniform", 1))
    mesh = meshes.make(jax.devices()[:1])  # names are looked up where there is a mesh
    unknown = pytest.raises(ValueError, match="'width' of dimension 0 is not in")
    with jax.set_mesh(mesh), unknown:
        param(nnx.Rngs(0), (2,), ("width",))
