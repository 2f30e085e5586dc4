"""Names of activations: found wherever a program has them, and without effect on it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from launch.config import resolve
from parallel import mesh as meshes
from parallel import named as module
from parallel.named import find, named
from parallel.rules import MESH_AXES, constrain
from training import program


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (named(2 * x, "in custom_vjp", "batch", None), None), lambda _, g: (2 * g,))


def everywhere(x):
    def body(x, _):
        run = jax.checkpoint(lambda x: jnp.sin(named(jnp.sin(x), "in remat", "batch", None)))
        return run(x), None

    x = named(x, "first", "batch", None)
    x, _ = jax.lax.scan(body, x, None, length=3)
    x, _ = jax.lax.scan(lambda x, _: (jax.lax.scan(body, x, None, 2)[0], None), x, None, 5)
    x = jax.lax.cond(
        x[0, 0].sum() > 0, lambda x: named(x, "in cond", "batch", None), lambda x: x, x
    )
    x = jax.jit(lambda x: named(x, "in jit", "batch", None))(x)
    return jnp.sum(jax.vmap(lambda row: named(row, "under vmap", None))(twice(x)))


def test_names_are_found_everywhere():
    with jax.sharding.use_abstract_mesh(meshes.make(fsdp=8).abstract_mesh):
        x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
        place = lambda x: everywhere(constrain(x, "batch", None))
        found = list(find(jax.make_jaxpr(jax.grad(place))(x).jaxpr))
    scans = {}
    for one in found:
        scans.setdefault(one.name, set()).add(one.scans)
        assert one.axes == (None if one.name == "under vmap" else ("batch", None))
        assert one.aval.sharding.spec[0] == ("replica", "data", "fsdp", "expert"), one.name
    assert scans == {
        "first": {()}, "in remat": {(3,), (5, 2)}, "in cond": {()}, "in jit": {()},
        "in custom_vjp": {()}, "under vmap": {()},
    }  # fmt: skip


def test_names_in_a_region_have_its_mesh():
    body = lambda x: named(x, "local", "batch", None)
    with jax.sharding.use_abstract_mesh(meshes.make(data=2, fsdp=4).abstract_mesh):
        spec = jax.sharding.PartitionSpec("data")
        run = lambda x: jax.shard_map(body, in_specs=spec, out_specs=spec, axis_names={"data"})(
            constrain(x, "batch", None)
        )
        (one,) = find(jax.make_jaxpr(run)(jax.ShapeDtypeStruct((8, 4), jnp.float32)).jaxpr)
    assert one.aval.shape == (4, 4)
    assert one.aval.sharding.mesh.manual_axes == ("data",)
    assert set(one.aval.sharding.mesh.explicit_axes) == set(MESH_AXES) - {"data"}


def test_bare_names_are_found_without_axes():
    jaxpr = jax.make_jaxpr(lambda x: checkpoint_name(x, "bare"))(1.0).jaxpr
    assert [(one.name, one.axes) for one in find(jaxpr)] == [("bare", None)]


def test_a_name_is_the_plain_one_to_remat_policies():
    """Numbers kept of f(x) = sin(sin(x)): the inner sine where its name is saved."""
    f = lambda x: jnp.sum(jnp.sin(named(jnp.sin(x), "inner", None)))
    kept = {}
    for names in (("inner",), ("other",)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        pull = jax.eval_shape(lambda x, p=policy: jax.vjp(jax.checkpoint(f, policy=p), x)[1], ROW)
        kept[names] = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert kept == {("inner",): 2 * ROW.size, ("other",): ROW.size}


ROW = np.arange(5.0, dtype=np.float32)


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        (("ffn",), "'h' names 1 dimensions"),
        (("heads", "ffn"), "h: dimensions 0 ('heads') and 1 ('ffn') would both be split over"),
        (("batch", "depth"), "h: logical axis 'depth' of dimension 1 is not in parallel/rules.py"),
    ],
)
def test_names_that_cannot_be(axes, why):
    with pytest.raises(ValueError, match=f"^{re.escape(why)}"):
        named(jnp.ones((2, 2)), "h", *axes)


SIZES = {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2", "model.dropout": "0.1"}


@pytest.mark.parametrize(("ffn", "remat"), [("swiglu", "none"), ("relu2", "named")])
def test_the_step_is_the_same_program_without_names(ffn, remat, monkeypatch):
    """All but the two that the policy saves are taken away, and not a letter changes.

    Without remat a value with two names would be kept twice for the backward pass.
    """
    config = resolve("base", SIZES | {"model.remat": remat, "model.ffn": ffn})

    def lowered():
        mesh = meshes.make(**config["mesh"])
        with jax.set_mesh(mesh):
            built = program.build(config, mesh, 258)
            traced = built.step.trace(built.state, built.batch)
            return {one.name for one in find(traced.jaxpr.jaxpr)}, traced.lower().as_text()

    names, text = lowered()
    assert {"embedded", "queries", "residual", "ffn_hidden", "logits"} < names
    keep = lambda x, name: checkpoint_name(x, name) if name in ("mixer", "ffn") else x
    monkeypatch.setattr(module, "checkpoint_name", keep)
    assert lowered() == ({"attention", "mixer", "ffn"}, text)
