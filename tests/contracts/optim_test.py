"""What every file of optim/methods must do, found by listing the folder."""

import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optim.methods
from optim.build import build
from parallel.weight import Entry, Weight

FOLDER = pathlib.Path(optim.methods.__file__).parent
METHODS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
N, D, F, H, K, W = 2, 8, 16, 2, 4, 16
NORMAL = ("normal", 0.3)
VECTOR = {"decay": False, "init": ("ones",), "group": "norm"}
TABLE = {
    "embed/tokens": Entry(Weight(("vocab", "embed"), init=NORMAL, group="embed"), (W, D)),
    "blocks/0/mixer/qkv": Entry(
        Weight(("embed", None, "heads", "kv"), (0,), (2, 3), (1,), NORMAL), (N, D, 3, H, K)
    ),
    "blocks/0/ffn/up": Entry(Weight(("embed", "mlp"), (0,), (1,), init=NORMAL), (N, D, F)),
    "blocks/0/ffn/down": Entry(Weight(("mlp", "embed"), (0,), (1,)), (N, F, D)),
    "blocks/0/norm/scale": Entry(Weight(("embed",), **VECTOR), (N, D)),
    "final_norm/scale": Entry(Weight(("embed",), **VECTOR), (D,)),
}
RULES = {"vocab": "tensor", "embed": "fsdp", "mlp": "tensor", "heads": "tensor"}
STEP = {"tokens": jnp.float32(0), "batch_tokens": jnp.float32(10)}

every_method = pytest.mark.parametrize("name", METHODS)


def made(name, table=TABLE, **keys):
    shared = {"lr": 0.01, "schedule": "constant", "warmup_tokens": 0, "warmup_fraction": 0.0}
    shared |= {"clip": 1.0, "weight_decay": 0.1, "methods": {}, "schedules": {}}
    return build(table, 1e6, name=name, **(shared | keys))[0]


def draw(seed, table=TABLE):
    rng = np.random.default_rng(seed)
    return {p: np.float32(rng.normal(size=e.shape)) for p, e in table.items()}


def several(count):
    return jax.tree.map(lambda *x: np.stack(x), *[draw(1 + i) for i in range(count)])


def run(tx, params, grads):
    """Parameters and state after one update for each of the gradients (stacked along axis 0)."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params, **STEP)
        return (jax.tree.map(jnp.add, params, updates), state), None

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g)[0])(params, grads)


def specs():
    return {p: PartitionSpec(*(RULES.get(a) for a in e.axes)) for p, e in TABLE.items()}


@every_method
def test_signature_is_a_schema(name):
    make = importlib.import_module(f"optim.methods.{name}").make
    table, *others = inspect.signature(make).parameters.values()
    assert table.name == "table"
    assert all(p.kind == p.KEYWORD_ONLY for p in others)
    assert [p.name for p in others if p.default is p.empty] == ["weight_decay"]
    own = [p for p in others if p.default is not p.empty]
    assert all(isinstance(p.default, p.annotation) for p in own)


@every_method
def test_converges_on_least_squares(name):
    """|x (A - A*)|^2 with A 8 x 8, rate falling to zero; the best of five learning rates counts."""
    table = {"kernel": Entry(Weight(("embed", "mlp"), (0,), (1,), init=NORMAL), (D, D))}
    rng = np.random.default_rng(0)
    x, target, w = (np.float32(rng.normal(size=s)) for s in ((32, D), (D, D), (D, D)))
    loss = lambda p: jnp.mean((x @ p["kernel"] - x @ target) ** 2)
    tx = made(name, table, lr=1.0, schedule="linear", weight_decay=0.0, clip=None)

    def final(lr):
        def step(carry, i):
            p, state = carry
            now = {"tokens": i * 1e4, "batch_tokens": 1e4}
            updates, state = tx.update(jax.grad(loss)(p), state, p, **now)
            return (jax.tree.map(lambda w, u: w + lr * u, p, updates), state), None

        p = {"kernel": jnp.asarray(w)}
        return loss(jax.lax.scan(step, (p, tx.init(p)), jnp.arange(100.0))[0][0])

    losses = jax.jit(jax.vmap(final))(np.float32([0.3, 0.1, 0.03, 0.01, 0.003]))
    assert np.nanmin(losses) < 0.01 * loss({"kernel": w})


@every_method
def test_state_is_float32_and_stable(name):
    """A state whose structure, shapes or types change would make jit trace the step twice."""
    tx, params = made(name), draw(0)
    state = jax.jit(tx.init)(params)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    traces = []

    @jax.jit
    def update(g, state, params):
        traces.append(1)
        return tx.update(g, state, params, **STEP)

    for g in (draw(1), draw(2)):
        updates, state = update(g, state, params)
    assert len(traces) == 1
    assert {p: u.dtype for p, u in updates.items()} == dict.fromkeys(TABLE, jnp.dtype("float32"))


@every_method
def test_zero_gradients_are_finite_and_only_decay_moves(name):
    grads = jax.tree.map(np.zeros_like, several(3))
    for weight_decay in (0.0, 0.1):
        params, state = run(made(name, weight_decay=weight_decay), draw(0), grads)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
        for path, entry in TABLE.items():
            before, after = draw(0)[path], np.asarray(params[path])
            if entry.weight.decay and weight_decay:
                # Towards zero, along the weight itself in each of its matrices or elements.
                assert (np.abs(after) < np.abs(before)).all(), path
            else:
                np.testing.assert_array_equal(after, before)


@every_method
def test_a_stacked_leaf_is_its_layers(name):
    """Updates of [N ...] leaves equal those of N separate ones (scan = unrolled)."""
    stacks = [p for p, e in TABLE.items() if e.layers]
    part = lambda tree, axis: {
        f"{i}/{p}": np.take(np.asarray(tree[p]), i, axis) for p in stacks for i in range(N)
    }
    weight = lambda p: TABLE[p].weight
    table = {f"{i}/{p}": Entry(weight(p), TABLE[p].shape[1:]) for p in stacks for i in range(N)}
    grads = {p: g for p, g in several(3).items() if p in stacks}
    params = {p: w for p, w in draw(0).items() if p in stacks}
    whole, _ = run(made(name), params, grads)
    parts, _ = run(made(name, table), part(params, 0), part(grads, 1))
    for path, want in part(whole, 0).items():
        # The same float32 operations; sums may be taken in another order.
        np.testing.assert_allclose(parts[path], want, rtol=1e-6, atol=1e-6)


@every_method
def test_sharded_equals_unsharded(name):
    """Explicit sharding over fsdp and tensor: same numbers, state sharded as the weights."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    tx, grads = made(name), several(3)
    want, want_state = run(tx, draw(0), grads)
    with jax.set_mesh(mesh):
        place = {p: NamedSharding(mesh, s) for p, s in specs().items()}
        over = {p: NamedSharding(mesh, PartitionSpec(None, *s)) for p, s in specs().items()}
        params = jax.device_put(draw(0), place)
        got, state = run(tx, params, jax.device_put(grads, over))
        began = jax.jit(tx.init)(params)
    for path in TABLE:
        assert got[path].sharding.is_equivalent_to(place[path], got[path].ndim)
        # Sums in another order, three steps.
        np.testing.assert_allclose(got[path], want[path], rtol=1e-6, atol=1e-6)
    for tree in (began, state):
        inherits_sharding(tree, place)
    assert jax.tree.structure(state) == jax.tree.structure(want_state)


def inherits_sharding(state, place):
    """Every state leaf that has its weight's shape has its weight's sharding."""
    seen = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = next((k.key for k in keys if isinstance(k, jax.tree_util.DictKey)), None)
        if path in TABLE and leaf.shape == TABLE[path].shape:
            assert leaf.sharding.is_equivalent_to(place[path], leaf.ndim), keys
            seen += 1
    assert seen or not jax.tree.leaves(state)
