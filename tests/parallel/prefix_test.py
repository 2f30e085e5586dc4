"""Rows in pieces against whole rows in float64, and what compiled programs send for it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_attention import State, linear_attention, merge
from pallas_kernels.linear_attention.summary import state_of
from parallel import mesh as meshes
from parallel.manual import manual
from parallel.prefix import linear, prefix
from parallel.rules import spec
from tests.hlo import collectives
from tests.models.built import packed

attend = linear(linear_attention, state_of, merge)
L, H, G, K, V, f = 80, 4, 2, 4, 4, 4
# In pieces of 40, 20 and 10: one document; borders at borders; inside pieces and over several;
# pieces of padding only; padding inside a document; nothing; keys that lag; next to the row's ends.
LENGTHS = [(80,), (10, 10, 20, 40), (3, 9, 25, 30), (5,), (15,), (), (3, 9, 25, 30), (1, 78, 1)]
SEGMENT = np.array([1, 9, 1, 0, 1, 4, 1, 9], np.int32)  # of the state before each row
AXES = {
    **dict.fromkeys("qkv", ("batch", "length", "heads", None)),
    **dict.fromkeys(("q_map", "k_map"), ("heads", None, None)),
    **dict.fromkeys(("q_bias", "k_bias"), ("heads", None)),
    **{"values": ("batch", "heads", None, None), "keys": ("batch", "heads", None)},
    **dict.fromkeys(("q_segments", "kv_segments"), ("batch", "length")),
    "segment": ("batch",),
}
OUT = (AXES["q"], AXES["q"][:3], AXES["values"], AXES["keys"])
INTEGERS = "q_segments", "kv_segments", "segment"
# Float32 sums of up to 80 terms in another order, and gradients that are products of such; 16-bit
# products round features, weights and states on both sides of them.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4 * 2.0**-8}


@functools.cache
def _arrays(dtype="float32", packing=True):
    rng, B = np.random.default_rng(0), len(LENGTHS)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    arrays = dict(q=normal(B, L, H, K), k=normal(B, L, G, K), v=normal(B, L, G, V))
    arrays = {n: np.float32(jnp.asarray(x, dtype)) for n, x in arrays.items()}
    arrays |= dict(q_map=normal(H, K, f), k_map=normal(G, K, f))
    arrays |= dict(q_bias=normal(H, f), k_bias=normal(G, f))
    arrays |= dict(values=abs(normal(B, G, 2 * f, V)), keys=abs(normal(B, G, 2 * f)))
    arrays |= dict(segment=SEGMENT)
    if packing:
        segments, _ = packed(LENGTHS, L)
        segments[4, 45:65], segments[4, 65:] = 1, 2
        lagging = segments.copy()
        lagging[6] = np.pad(segments[6], (7, 0))[:L]
        arrays |= dict(q_segments=segments, kv_segments=lagging)
    return arrays


def _cotangents():
    rng, B = np.random.default_rng(1), len(LENGTHS)
    shapes = (B, L, H, V), (B, L, H), (B, G, 2 * f, V), (B, G, 2 * f)
    # As bfloat16 has them, because o and its cotangent are rounded to the inputs' dtype.
    return tuple(np.float32(jnp.bfloat16(rng.standard_normal(shape))) for shape in shapes)


def _with_gradients(fn, dtype, arrays, cotangents, **own):
    """Outputs, gradients by name, and the document of the last state."""

    def call(floats, others):
        given = floats | others
        state = State(*(given.pop(n) for n in ("values", "keys", "segment")))
        given |= {n: given[n].astype(dtype) for n in "qkv"}
        o, total, state = fn(**given, state=state, features="softmax", **own)
        return (o, total, state.values, state.keys), state.segment

    others = {n: arrays[n] for n in INTEGERS if n in arrays}
    floats = {n: x for n, x in arrays.items() if n not in others}
    out, pull, segment = jax.vjp(lambda floats: call(floats, others), floats, has_aux=True)
    cotangents = jax.tree.map(lambda x, like: x.astype(like.dtype), cotangents, out)
    return out, pull(cotangents)[0], segment


_reference = functools.partial(_with_gradients, linear_attention, "float64")
_reference = jax.jit(functools.partial(_reference, implementation="reference"))


@functools.cache
def _expected(dtype="float32", packing=True):
    with jax.enable_x64(True):
        wide = lambda x: x if x.dtype == np.int32 else np.float64(x)
        args = jax.tree.map(wide, (_arrays(dtype, packing), _cotangents()))
        found = _reference(*args)
        return jax.tree.map(np.asarray, found)


def _mesh(**sizes):
    return jax.set_mesh(meshes.make(jax.devices()[: math.prod(sizes.values())], **sizes))


def _placed(arrays):
    put = lambda x, names: jax.device_put(x, spec(*names))
    cotangents = tuple(map(put, _cotangents(), OUT))
    return {n: put(x, AXES[n]) for n, x in arrays.items()}, cotangents


def _assert_same(got, expected, tolerance):
    np.testing.assert_array_equal(got[2], expected[2])
    leaves = jax.tree_util.tree_leaves_with_path(got[:2])
    for (path, ours), exact in zip(leaves, jax.tree.leaves(expected[:2]), strict=True):
        error = np.abs(np.float64(ours) - exact).max() / np.abs(exact).max()
        assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    ("sizes", "dtype", "packing"),
    [
        (dict(context=2, data=2, tensor=2), "float32", True),
        (dict(context=4), "float32", True),
        (dict(context=8), "float32", True),
        (dict(context=4, fsdp=2), "float32", False),
        (dict(context=4), "bfloat16", True),
    ],
    ids=["2-data-tensor", "4", "8", "4-fsdp-unpacked", "4-bfloat16"],
)
def test_pieces_equal_the_whole(sizes, dtype, packing):
    """Outputs, the state at the end and all nine gradients; with a state of some document before.

    Without segments the rows are of that document, whatever its number.
    """
    with _mesh(**sizes):
        args = _placed(_arrays(dtype, packing))
        got = jax.jit(functools.partial(_with_gradients, attend, dtype))(*args)
        for name, gradient in got[1].items():
            assert jax.typeof(gradient).sharding == jax.typeof(args[0][name]).sharding, name
        assert jax.typeof(got[0][0]).sharding.spec == spec(*AXES["q"])
    _assert_same(got, _expected(dtype, packing), TOLERANCE[dtype])


def _layers(fn, arrays):
    """Two layers, whose queries are the outputs of the one before, under the models' remat."""
    given = {n: x for n, x in arrays.items() if n not in ("values", "keys", "segment")}

    def layer(q, given):
        o, total, _ = fn(q, **given, features="softmax")
        return jnp.tanh(o + jnp.log(1 + total)[..., None])

    q, given = given["q"], {n: x for n, x in given.items() if n != "q"}
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    step = jax.checkpoint(lambda q, _: (layer(q, given), None), policy=policy)
    return jax.lax.scan(step, q, None, length=2)[0]


def _layers_gradients(fn, arrays, region=None):
    others = {n: arrays[n] for n in INTEGERS}
    floats = {n: x for n, x in arrays.items() if n not in others}

    def gradients(floats, others):
        loss = lambda floats: jnp.sum(jnp.sin(_layers(fn, floats | others)))
        return jax.grad(loss)(floats)

    return (region(gradients) if region else gradients)(floats, others)


def test_a_gradient_inside_a_region_over_data_through_a_scan_with_remat():
    """Three regions in one another: of the gradient, of the context, and of the kernel."""
    arrays = _arrays()
    rows = {n: "batch" in names for n, names in AXES.items()}

    def region(gradients):
        place = lambda names: {n: P("data") if rows[n] else P() for n in names}
        floats = [n for n in arrays if n not in INTEGERS]

        def per_shard(floats, others):
            found = gradients(floats, others)
            return {n: g if rows[n] else jax.lax.psum(g, "data") for n, g in found.items()}

        specs = place(floats), place(INTEGERS)
        return manual(per_shard, "data", specs, place(floats), check=False)

    expected = jax.jit(functools.partial(_layers_gradients, linear_attention))(arrays)
    with _mesh(data=2, context=2, tensor=2):
        run = functools.partial(_layers_gradients, attend, region=region)
        got = jax.jit(run)(_placed(arrays)[0])
    for name in ("q", "k", "v", "q_map", "k_map", "q_bias", "k_bias"):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=5e-5 * scale)


def _sent(n, length, remat=False):
    """(bytes, how often) of each collective of a gradient on `n` pieces, by kind and shapes."""
    shapes = dict(q=(2, length, H, K), k=(2, length, G, K), v=(2, length, G, V))

    def loss(arrays, segments):
        rows = dict(q_segments=segments, kv_segments=segments)
        fn = lambda arrays: attend(**arrays, **rows, features="elu")[0]
        if remat:
            policy = jax.checkpoint_policies.save_only_these_names("attention")
            fn = jax.checkpoint(fn, policy=policy)
        return jnp.sum(jnp.sin(fn(arrays)))

    with _mesh(context=n):
        like = lambda shape, kind, *names: jax.ShapeDtypeStruct(
            shape, kind, sharding=jax.NamedSharding(jax.sharding.get_mesh(), spec(*names))
        )
        arrays = {n: like(shape, jnp.float32, *AXES[n]) for n, shape in shapes.items()}
        segments = like((2, length), jnp.int32, "batch", "length")
        text = jax.jit(jax.grad(loss)).lower(arrays, segments).compile().as_text()
    found = [(c.kind, c.bytes) for c in collectives(text) for _ in range(c.times)]
    return {one: found.count(one) for one in found}


STATE = {"values": 4 * 2 * G * K * V, "keys": 4 * 2 * G * K, "segment": 4 * 2}  # bytes


@pytest.mark.parametrize(
    ("n", "rounds", "length"), [(2, 1, 32), (4, 3, 64), (4, 3, 128), (8, 4, 64)]
)
def test_what_is_sent_is_states_and_does_not_grow_with_the_length(n, rounds, length):
    """There and, in the backward pass, back; nothing is sent for the state that nobody reads."""
    kind = "collective-permute"
    expected = {(kind, STATE["values"]): 2 * rounds, (kind, STATE["keys"]): 2 * rounds}
    assert _sent(n, length) == expected | {(kind, STATE["segment"]): rounds}


def test_a_backward_pass_that_recomputes_sends_no_sums_again():
    assert _sent(2, 32, remat=True)["collective-permute", STATE["values"]] == 2


def _refuse(*args, **kwargs):
    raise AssertionError("a row in one piece is for the operation alone")


@pytest.mark.parametrize("sizes", [None, dict(data=2, tensor=2), dict(context=2)], ids=str)
def test_a_row_in_one_piece_is_the_plain_operation(sizes):
    """Also on a mesh that has the axis, as for one token that is decoded."""
    arrays, alone = _arrays(), linear(linear_attention, _refuse, _refuse)
    given = {n: x for n, x in arrays.items() if n not in ("values", "keys", "segment")}
    if sizes is None:
        jax.eval_shape(functools.partial(alone, features="softmax"), **given)
        return
    whole = lambda names: [None if name == "length" else name for name in names]
    with _mesh(**sizes):
        placed = {n: jax.device_put(x, spec(*whole(AXES[n]))) for n, x in given.items()}
        text = str(jax.make_jaxpr(functools.partial(alone, features="softmax"))(**placed))
    assert "ppermute" not in text
    assert "psum" not in text


def test_an_operation_of_another_kind():
    """h_i = exp(a_i) h_{i-1} + x_i, whose state is (log of the decay, h), against a loop."""

    def scan(rows, w, state):
        step = lambda h, row: (jnp.exp(row[0] * w) * h + row[1],) * 2
        start = jnp.zeros_like(rows["x"][:, 0]) if state is None else state[1]
        rows = jnp.moveaxis(rows["a"], 1, 0), jnp.moveaxis(rows["x"], 1, 0)
        h, out = jax.lax.scan(step, start, rows)
        return jnp.moveaxis(out, 0, 1), (0 * h, h)

    def summary(rows, w):
        return jnp.sum(rows["a"] * w, 1), scan(rows, w, None)[1][1]

    def join(before, after):
        return before[0] + after[0], jnp.exp(after[0]) * before[1] + after[1]

    run = prefix(scan, summary, join)
    rng = np.random.default_rng(2)
    a, x, start = -rng.random((2, 24)), rng.standard_normal((2, 24)), rng.standard_normal(2)

    def value(run, a, x, w, start):
        out, (_, h) = run(dict(a=a, x=x), w, (jnp.zeros_like(start), start))
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(h))

    args = jax.tree.map(np.float32, (a, x, 0.7, start))
    expected = jax.jit(jax.value_and_grad(functools.partial(value, scan), (0, 1, 2, 3)))(*args)
    with _mesh(context=8):
        names = ("batch", "length"), ("batch", "length"), (), ("batch",)
        args = [jax.device_put(x, spec(*n)) for x, n in zip(args, names, strict=True)]
        got = jax.jit(jax.value_and_grad(functools.partial(value, run), (0, 1, 2, 3)))(*args)
    for ours, exact in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
