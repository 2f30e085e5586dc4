"""The table from logical to mesh axes, and what `spec` makes of it where JAX stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from launch.config import resolve
from models.ffns import swiglu
from models.param import param
from parallel import mesh as meshes
from parallel.rules import (
    MESH_AXES,
    RULES,
    automatic,
    constrain,
    explicit_axes,
    layout,
    partition,
    spec,
    ways,
)
from training import program


def test_every_rule_names_axes_of_the_mesh_once():
    for name, axes in RULES.items():
        assert set(axes) <= set(MESH_AXES), name
        assert len(set(axes)) == len(axes), name


def test_partition():
    assert partition() == P()
    assert partition("batch", "length", None) == P(
        ("replica", "data", "fsdp", "expert"), "context", None
    )
    assert partition("layers", "embed", None, "heads") == P(None, "fsdp", None, "tensor")
    assert partition("batch", "embed", axes={"data"}) == P("data", None)
    assert partition("batch", axes={"replica", "fsdp"}) == P(("replica", "fsdp"))


@pytest.mark.parametrize(
    ("names", "first", "second", "axis"),
    [
        (("heads", None, "ffn"), "0 ('heads')", "2 ('ffn')", "'tensor'"),
        (("vocab", "vocab"), "0 ('vocab')", "1 ('vocab')", "'tensor'"),
        # A weight's D beside an activation's batch: two of three axes differ and one collides.
        (("length", "batch", "embed"), "1 ('batch')", "2 ('embed')", "'fsdp'"),
    ],
)
def test_a_collision_names_both_dimensions_and_the_axis(names, first, second, axis):
    with pytest.raises(ValueError, match="would both be split") as error:
        partition(*names)
    assert all(part in str(error.value) for part in (first, second, axis))


def test_an_unknown_name_is_named_with_its_dimension():
    with pytest.raises(ValueError, match=r"'embd' of dimension 1 is not in .*known: batch, "):
        partition("batch", "embd")


def test_a_rule_with_an_unknown_mesh_axis_is_refused(monkeypatch):
    """It would leave the dimension whole on every device, and nothing else would say so."""
    monkeypatch.setitem(RULES, "ffn", ("tensr",))
    mesh = meshes.make(jax.devices()[:1])
    uses = {
        "partition": lambda: partition("embed", "ffn"),
        "ways": lambda: ways(mesh, "ffn"),
        "build": lambda: program.build(resolve("base"), mesh, 258),
    }
    for use, call in uses.items():
        with pytest.raises(
            ValueError, match=r"rule of 'ffn' .* mesh axis 'tensr', .*known"
        ) as error:
            call()
        assert ("the weight blocks/0/ffn/" in str(error.value)) == (use == "build")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("embed", "embed"), "0 ('embed') and 1 ('embed') would both be split over mesh axis 'fs"),
        (("ffn", "heads"), "0 ('ffn') and 1 ('heads') would both be split over mesh axis 'tensor'"),
        (("embed", "mlp"), "logical axis 'mlp' of dimension 1 is not in parallel/rules.py"),
    ],
)
def test_a_weight_whose_declaration_collides_is_named_on_one_device_too(axes, words, monkeypatch):
    class FFN(swiglu.FFN):
        def __init__(self, dims, *, rngs, **own):
            super().__init__(dims, rngs=rngs, **own)
            self.mix = param(rngs, (dims.d_model, dims.d_model), axes)

    monkeypatch.setattr(swiglu, "FFN", FFN)
    config, mesh = resolve("base"), meshes.make(jax.devices()[:1])
    with pytest.raises(ValueError, match=r"the weight blocks/0/ffn/mix: ") as error:
        program.build(config, mesh, 258)
    assert words in str(error.value)


def test_spec_names_only_what_is_explicit_here():
    assert spec("batch") is None
    x = jnp.zeros((2, 2))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(meshes.make(data=4, tensor=2)):
        assert explicit_axes() == set(MESH_AXES)
        assert spec("heads", None) == P("tensor", None)
    auto = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(auto):
        assert explicit_axes() == frozenset()
        assert spec("batch") is None


def test_spec_inside_a_manual_region_leaves_its_axis_out():
    seen = []

    def look(x):
        seen.append(spec("batch", "heads"))
        return x

    with jax.set_mesh(meshes.make(data=4, tensor=2)):
        x = jax.device_put(np.zeros((8, 8), np.float32), P("data", "tensor"))
        manual = jax.shard_map(look, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        jax.eval_shape(manual, x)
    assert seen == [P(("replica", "fsdp", "expert"), "tensor")]


def test_constrain_moves_the_array():
    with jax.set_mesh(meshes.make(data=4, tensor=2)):
        x = jax.device_put(np.arange(64.0).reshape(8, 8), P())
        y = constrain(x, "batch", "heads")
        assert y.sharding.shard_shape(y.shape) == (2, 4)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("heads", "ffn", None), "dimensions 0 ('heads') and 1 ('ffn') would both be split over"),
        (("batch", "hed", None), "'hed' of dimension 1 is not in"),
        (("batch", None), "2 names, ('batch', None), were given for the 3 dimensions of (8, 6, 3)"),
        (("batch", None, "heads"), "dimension 2 ('heads') of (8, 6, 3) does not divide over ten"),
        ((None, "batch", None), "1 ('batch') of (8, 6, 3) does not divide over replica=1 x data=4"),
    ],
)
def test_an_activation_that_cannot_be_laid_out_so_is_a_sentence(names, words):
    mesh, x = meshes.make(data=4, tensor=2), jnp.zeros((8, 6, 3))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"\w+ \w+ \w+") as error:
        constrain(x, *names)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_automatic_leaves_shardings_to_the_compiler():
    # A product over two dimensions on one mesh axis has no type of its own under Explicit axes.
    product = lambda x: x @ x.T
    with jax.set_mesh(meshes.make(data=4, tensor=2)):
        x = jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8), P(None, "tensor"))
        y = jax.jit(lambda x: automatic(product, "batch", None)(x))(x)
        assert y.sharding.shard_shape(y.shape) == (2, 8)
    np.testing.assert_array_equal(y, np.asarray(x) @ np.asarray(x).T)
    assert automatic(product) is product


def test_layout_of_abstract_arrays():
    assert layout(jax.ShapeDtypeStruct((), jnp.float32)) == P()
    with jax.set_mesh(meshes.make(data=8)):
        make = lambda: jnp.zeros((8, 2), out_sharding=spec("batch", None))
        split = P(("replica", "data", "fsdp", "expert"), None)
        assert layout(jax.eval_shape(make)) == split
