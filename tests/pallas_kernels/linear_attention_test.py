"""Linear attention's definition by its recurrence, its state, its shards, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_attention import State, features, linear_attention, merge
from pallas_kernels.linear_attention.specs import SPECS, Spec, tagged
from pallas_kernels.linear_attention.state import held

EPS = float(np.finfo(np.float32).eps)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def taylor(z):
    f = z.shape[-1]
    square = (z[..., :, None] * z[..., None, :]).reshape(*z.shape[:-1], f * f)
    return np.concatenate([np.ones_like(z[..., :1]), z / f**0.25, square / (2 * f) ** 0.5], -1)


MAPS = {
    "identity": lambda z: z,
    "elu": lambda z: np.where(z > 0, 1 + z, np.exp(np.minimum(z, 0))),
    "relu": lambda z: np.maximum(z, 0),
    "exp": lambda z: np.exp(np.concatenate([z, -z], -1)),
    "softmax": lambda z: np.concatenate([softmax(z), softmax(-z)], -1),
    "joint": lambda z: softmax(np.concatenate([2 * z, -2 * z], -1)),
    "taylor": taylor,
}


def phi(spec, x, name, arrays):
    if spec.f:
        x = np.einsum("blhk,hkf->blhf", x, arrays[f"{name}_map"])
    if spec.bias:
        x = x + arrays[f"{name}_bias"]
    return MAPS[spec.features](x)


def recurrence(spec, arrays):
    """o, total, values and keys, one token after another with a memory for every document."""
    arrays = {n: np.float64(x) if x.dtype == np.float32 else x for n, x in arrays.items()}
    (B, L, H), G = arrays["q"].shape[:3], arrays["k"].shape[2]
    V, R = arrays["v"].shape[3], H // G
    phi_q, phi_k = (phi(spec, arrays[n], n, arrays) for n in "qk")
    ones = np.ones((B, L), np.int32)
    q_ids, kv_ids = (arrays.get(f"{n}_segments", ones) for n in ("q", "kv"))
    o, total = np.zeros((B, L, H, V)), np.full((B, L, H), 1e-12)
    last = np.zeros((B, G, spec.F, V)), np.zeros((B, G, spec.F))
    for b in range(B):
        memory = {}
        document = None
        if spec.state:
            document = arrays["segment"][b] if spec.documents else 1
            memory[document] = [arrays["values"][b].copy(), arrays["keys"][b].copy()]
        for t in range(L):
            if kv_ids[b, t]:
                document = kv_ids[b, t]
                empty = [np.zeros((G, spec.F, V)), np.zeros((G, spec.F))]
                values, keys = memory.setdefault(document, empty)
                values += phi_k[b, t][:, :, None] * arrays["v"][b, t][:, None]
                keys += phi_k[b, t]
            if q_ids[b, t] and q_ids[b, t] in memory:
                values, keys = memory[q_ids[b, t]]
                for h in range(H):
                    total[b, t, h] += phi_q[b, t, h] @ keys[h // R]
                    o[b, t, h] = phi_q[b, t, h] @ values[h // R] / total[b, t, h]
        if document is not None:
            last[0][b], last[1][b] = memory[document]
    return o, total, *last


@pytest.mark.parametrize("spec", tagged("ci"), ids=lambda spec: spec.name)
def test_the_reference_is_the_recurrence(spec):
    arrays = spec.inputs()
    with jax.enable_x64(True):
        wide = {
            n: jnp.asarray(x, np.float64 if x.dtype == np.float32 else None)
            for n, x in arrays.items()
        }
        found = spec.call("reference")(**wide)
    for ours, exact in zip(found, recurrence(spec, arrays), strict=True):
        # 1e-12 stands in float64 sums of up to 200 terms of order 1.
        np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", features.FORMS)
def test_weights_sum_to_one(form):
    spec = Spec(
        "ones", "ci", B=1, L=90, H=2, K=4, features=form, V=3, f=4 if form != "identity" else 0
    )
    arrays = spec.inputs() | {"v": np.ones((1, 90, 2, 3), np.float32)}
    arrays = {n: jnp.asarray(x) for n, x in arrays.items()}
    o, total, *_ = spec.call("xla")(**arrays)
    seen = np.asarray(total) > 1e-6  # 'relu' may have no feature in common
    np.testing.assert_allclose(np.asarray(o)[seen], 1, atol=16 * EPS)
    assert seen.mean() > 0.9


@pytest.mark.parametrize(
    ("name", "cut"),
    [("plain", 64), ("grouped", 1), ("packed", 130), ("lagging", 99), ("going_on_packed", 149)],
)
def test_a_row_in_two_pieces_is_the_row(name, cut):
    """The second piece goes on from the first one's state; pieces' states merge to the whole's."""
    spec = next(s for s in SPECS if s.name == name)
    arrays = {n: jnp.asarray(x) for n, x in spec.inputs().items()}
    given = [arrays.pop(n, None) for n in ("values", "keys", "segment")]
    state = None if given[0] is None else State(*given)
    rows = [n for n in arrays if arrays[n].ndim > 1 and arrays[n].shape[:2] == (spec.B, spec.L)]
    part = lambda at: {n: x[:, at] if n in rows else x for n, x in arrays.items()}
    run = functools.partial(linear_attention, features=spec.features, implementation="xla")
    o, _, end = run(**arrays, state=state)
    first, _, middle = run(**part(slice(cut)), state=state)
    second, _, last = run(**part(slice(cut, None)), state=middle)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=64 * EPS * np.abs(b).max())
    close(np.concatenate([first, second], 1), o)
    alone = run(**part(slice(cut, None)))[2]
    for whole, going_on, merged in zip(end, last, merge(middle, alone), strict=True):
        close(going_on, whole)
        close(merged, whole)


def test_held_is_the_document_of_the_last_key_that_is_not_padding():
    rng = np.random.default_rng(0)
    segments = rng.choice([0, 0, 1, 2, 3], (5, 24)).astype(np.int32)
    before = np.array([0, 1, 7, 0, 3], np.int32)
    found = np.asarray(held(jnp.asarray(segments), jnp.asarray(before), 4))
    for b in range(5):
        document = before[b]
        for m in range(7):
            assert found[b, m] == document
            for s in segments[b, 4 * m : 4 * m + 4]:
                document = s or document


@pytest.mark.parametrize("form", ["exp", "softmax", "joint", "elu", "relu"])
def test_large_inputs_stay_finite(form):
    spec = Spec("large", "ci", B=1, L=20, H=1, K=4, features=form, f=4)
    arrays = {n: jnp.asarray(x) for n, x in spec.inputs().items()}
    arrays["q"] *= 1e4
    arrays["k"] *= 1e4
    loss = lambda q, k: jnp.sum(spec.call("xla")(**arrays | {"q": q, "k": k})[0] ** 2)
    value, grads = jax.value_and_grad(loss, (0, 1))(arrays["q"], arrays["k"])
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in (value, *grads))


NAMES = ("q", "k", "v", "q_map", "k_map", "values", "keys", "q_segments", "segment")


def loss(*arrays, implementation="xla"):
    given = dict(zip(NAMES, arrays, strict=True))
    state = State(given.pop("values"), given.pop("keys"), given.pop("segment"))
    own = dict(features="softmax", implementation=implementation, state=state)
    o, total, state = linear_attention(**given, kv_segments=given["q_segments"], **own)
    parts = jnp.sin(o), jnp.log(total), jnp.cos(state.values / 8), jnp.sin(state.keys / 8)
    return sum(map(jnp.mean, parts))


@pytest.mark.parametrize("G", [1, 2])
def test_one_device_equals_eight(G):
    """Batch over data, heads over tensor; the only key head may be whole on every device."""
    spec = Spec("sharded", "ci", B=4, L=40, H=4, G=G, K=8, f=6, documents=2, state=True)
    arrays = [jnp.asarray(spec.inputs()[n]) for n in NAMES]
    gradient = jax.jit(jax.value_and_grad(loss, tuple(range(7))))
    expected = gradient(*arrays)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Explicit,) * 2)
    heads = {"q": "tensor", "q_map": "tensor"}
    if G > 1:
        heads |= dict.fromkeys(("k", "v", "k_map", "values", "keys"), "tensor")

    def place(name, x):
        axes = [None] * x.ndim if name.endswith("map") else ["data", *[None] * (x.ndim - 1)]
        at = {"q": 2, "k": 2, "v": 2, "q_map": 0, "k_map": 0, "values": 1, "keys": 1}.get(name)
        if at is not None:
            axes[at] = heads.get(name)
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    with jax.set_mesh(mesh):
        found = gradient(*map(place, NAMES, arrays))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Sums over tokens and rows in another order.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=64 * EPS * np.abs(theirs).max())


def shapes(**changes):
    given = {"q": (2, 8, 4, 8), "k": (2, 8, 2, 8), "v": (2, 8, 2, 8)} | changes
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in given.items()}


@pytest.mark.parametrize(
    ("given", "own", "match"),
    [
        (shapes(q=(2, 8, 3, 8)), {}, "3 query heads cannot share 2 key heads: 3 % 2 is 1"),
        (shapes(), {"features": "cosine"}, "features 'cosine' are unknown; known: identity, elu"),
        (shapes(q_map=(4, 8, 8)), {}, "Give the map or bias of both"),
        (shapes(q_bias=(4, 8), k_bias=(2, 8)), {}, "A bias is a map's"),
        (shapes(), {"implementation": "cuda"}, "No implementation is called 'cuda'"),
        (shapes(), {"config": 3}, "is for one of the implementations"),
    ],
)
def test_what_does_not_fit_is_refused(given, own, match):
    own = {"features": "softmax"} | own
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda given: linear_attention(**given, **own), given)
