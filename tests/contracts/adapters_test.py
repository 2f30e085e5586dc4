"""What every file in training/adapters must hold; a new file is tested by being there."""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import training.adapters
from launch.files import ROOT
from launch.schema import SECTIONS, methods
from models.param import read
from parallel import mesh as meshes
from parallel.rules import partition, spec
from parallel.weight import Entry, Weight
from tests.models.built import build, close, context, packed
from training import adapter as adapters

NAMES = sorted(m.name for m in pkgutil.iter_modules(training.adapters.__path__))
N, D, H, G, K, F, W = 2, 8, 4, 2, 4, 6, 128
NORMAL = ("normal", 0.3)
VECTOR = {"decay": False, "init": ("ones",), "group": "norm"}
TABLE = {
    "tokens": Entry(Weight(("vocab", "embed"), (), (1,), init=NORMAL, group="embed"), (W, D)),
    "blocks/0/mixer/q": Entry(Weight(("embed", "heads", None), (0,), (1, 2)), (N, D, H, K)),
    "blocks/0/mixer/kv": Entry(
        Weight(("embed", None, "heads", None), (0,), (2, 3), (1,)), (N, D, 2, G, K)
    ),
    "blocks/0/mixer/out": Entry(Weight(("heads", None, "embed"), (0, 1), (2,)), (N, H, K, D)),
    "blocks/0/mixer/q_map": Entry(Weight(("heads", None, None), (1,), (2,), (0,)), (N, H, K, F)),
    "blocks/0/ffn/up": Entry(
        Weight((None, "embed", None, "ffn"), (1,), (3,), (0, 2)), (N, 3, D, 2, F)
    ),
    "blocks/0/norm/scale": Entry(Weight((None,), **VECTOR), (N, D)),
    "suffix/0/ffn/down": Entry(Weight(("ffn", "embed"), (0,), (1,)), (F, D)),
    "head/kernel": Entry(Weight(("embed", "vocab"), (0,), (1,), group="head"), (D, W)),
}  # fmt: skip


def cases():
    for name in NAMES:
        module = importlib.import_module(f"training.adapters.{name}")
        for i, own in enumerate(({}, *getattr(module, "CASES", ()))):
            yield pytest.param({"name": name, name: own}, id=f"{name}-{i}")


every_case = pytest.mark.parametrize("config", list(cases()))
every_method = pytest.mark.parametrize("config", [{"name": name} for name in NAMES], ids=NAMES)


def draw(table, seed=0):
    rng = np.random.default_rng(seed)
    return {path: np.float32(rng.normal(size=entry.shape)) for path, entry in table.items()}


def start(table):
    return jax.jit(lambda: adapters.start(table, 0))()


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_a_schema(name):
    make = importlib.import_module(f"training.adapters.{name}").make
    table, *own = inspect.signature(make).parameters.values()
    assert table.name == "table"
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in own)
    section = next(section for section in SECTIONS if section.key == "adapter")
    assert set(methods(ROOT, section, ())[name]) == {p.name for p in own}


def test_no_adapter_adds_nothing():
    adapter, params = adapters.make({"name": None}, TABLE), draw(TABLE)
    assert adapter.table == {}
    assert adapter.bind(params) is params


@every_case
def test_what_is_added_is_declared(config):
    """New paths, a name a dimension, layers as the model stacks them, fans of every matrix."""
    adapter = adapters.make(config, TABLE)
    assert adapter.table
    assert not set(adapter.table) & set(TABLE)
    for path, entry in adapter.table.items():
        beside = [own for own in TABLE if path.startswith(f"{own}/")]
        assert [entry.layers] == [TABLE[own].layers for own in beside], path
        assert entry.shape[: entry.layers] == TABLE[beside[0]].shape[: entry.layers]
        partition(*entry.axes)
        weight = entry.weight
        dims = sorted((*weight.fan_in, *weight.fan_out, *weight.stack))
        assert dims == list(range(len(weight.axes))) or not entry.is_matrix, path
        assert weight.group in ("embed", "hidden", "head", "norm", "bias")


@every_case
def test_the_start_is_the_model_s_own(config):
    """Bit for bit; and what is drawn for one path does not depend on the others."""
    adapter, own = adapters.make(config, TABLE), draw(TABLE)
    added = start(adapter.table)
    merged = jax.jit(adapter.merged)(own | added)
    assert merged.keys() == TABLE.keys()
    for path, weight in merged.items():
        assert (weight.shape, weight.dtype) == (TABLE[path].shape, jnp.float32)
        np.testing.assert_array_equal(weight, own[path], path)
    for path, entry in adapter.table.items():
        assert (added[path].shape, added[path].dtype) == (entry.shape, jnp.float32)
    few = dict(list(adapter.table.items())[3:5])
    for path, leaf in start(few).items():
        np.testing.assert_array_equal(leaf, added[path])


@every_case
def test_a_stack_is_its_layers(config):
    adapter = adapters.make(config, TABLE)
    params = draw(TABLE | adapter.table)
    merged = jax.jit(adapter.merged)(params)
    one = {p: Entry(e.weight, e.shape[1:]) for p, e in TABLE.items() if e.layers}
    alone = adapters.make(config, one)
    run = jax.jit(alone.merged)
    for layer in range(N):
        for path, weight in run({p: params[p][layer] for p in (one | alone.table)}).items():
            # The same float32 sums, perhaps in another order.
            np.testing.assert_allclose(merged[path][layer], weight, rtol=1e-6, atol=1e-6)


@every_case
def test_one_device_equals_eight(config):
    """Values and gradients, on shards laid out as the model's own weights are."""
    adapter = adapters.make(config, TABLE)
    table = TABLE | adapter.table
    params, cotangents = draw(table), draw(TABLE, 1)

    def run(params, cotangents):
        merged, pull = jax.vjp(adapter.merged, params)
        return merged, pull(cotangents)[0]

    expected = jax.jit(run)(params, cotangents)
    with jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2)):
        put = lambda tree: {p: jax.device_put(x, spec(*table[p].axes)) for p, x in tree.items()}
        found = jax.jit(run)(put(params), put(cotangents))
        for tree in found:
            for path, leaf in tree.items():
                assert leaf.sharding.spec == put({path: params[path]})[path].sharding.spec, path
    # Sums of a few float32 products in another order.
    jax.tree.map(functools.partial(close, tolerance=1e-6), found, expected)


@pytest.fixture(scope="module")
def model():
    return build(d_model=20, positions="learned", tied=False, remat="full")


@every_method
def test_a_model_reads_its_weights_in_the_loop_over_layers(config, model):
    """As the merged ones, gradients included, and no weight of all layers is made on the way."""
    adapter = adapters.make(config, model.table)
    added = draw(adapter.table)
    added = {p: 0.3 * leaf for p, leaf in added.items()}
    ids = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    ctx = context(*packed([(12,), (5, 7)]))

    def loss(weights, added, own):
        logits, _ = model.model(weights(own | added))(ids, ctx)
        return jnp.sum(jax.nn.log_softmax(logits)[:, :, 3])

    def run(weights):
        return jax.value_and_grad(functools.partial(loss, weights))

    given = added, model.params
    expected, found = (jax.jit(run(w))(*given) for w in (adapter.merged, adapter.bind))
    jax.tree.map(close, found, expected)
    for path, gradient in found[1].items():
        assert np.abs(gradient).max() > 0, path
    stacks = {e.shape for e in model.table.values() if e.layers and e.is_matrix}
    made = lambda fn: {
        var.aval.shape for eqn in jax.make_jaxpr(fn)(*given).eqns for var in eqn.outvars
    }
    assert not made(run(adapter.bind)) & stacks
    assert made(run(adapter.merged)) & stacks


@every_method
def test_weights_may_be_read_before_a_loop_and_not_at_all(config, model):
    """Decoding reads them once; of abstract ones there is a model to be asked for its sizes."""
    adapter = adapters.make(config, model.table)
    params = model.params | draw(adapter.table)
    once = lambda p: jax.tree.leaves(read(model.model(adapter.bind(p))))
    merged = lambda p: jax.tree.leaves(model.model(adapter.merged(p)))
    assert str(jax.make_jaxpr(once)(params)) == str(jax.make_jaxpr(merged)(params))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    plain = model.model(model.params)
    unread = model.model(adapter.bind(abstract))
    assert unread.masked_flops(8) == plain.masked_flops(8) > 0
    assert (unread.decodes, unread.longest) == (plain.decodes, plain.longest)
