"""Rows to experts and back, against loops over tokens and experts in float64 numpy.

XLA's CPU has no ragged all-to-all; here it is one of gathers that does what lax's documentation
says, and gives NaN where offsets and sizes contradict each other. What a TPU's compiler makes of
the real one is looked at in `test_a_tpu_compiles_...`.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from launch.files import ROOT
from launch.platform import present
from parallel import expert
from parallel import mesh as meshes
from parallel.manual import manual
from parallel.rules import MESH_AXES
from tests import hlo

D, ROWS = 4, P(("data", "expert"))
PLACES = {
    "1": dict(expert=1),
    "2": dict(expert=2),
    "4": dict(expert=4),
    "8": dict(expert=8),
    "2x4": dict(data=2, expert=4),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """`jax.lax.ragged_all_to_all` by all-gathers; NaN for slices that leave their array, overlap
    or are not as long as their receiver says."""
    rows = jax.lax.all_gather(operand, axis_name)
    given = jnp.stack([input_offsets, send_sizes, output_offsets], 1)
    mine = jax.lax.all_to_all(given, axis_name, 0, 0, tiled=True)
    (start, size, to), n = mine.T[..., None], len(recv_sizes) // len(rows)
    at = jnp.arange(len(output))[None]
    inside = (at >= to) & (at < to + size)
    source = jnp.repeat(jnp.arange(len(rows)), n)[:, None]
    wrong = (start + size > rows.shape[1]) | (to + size > len(output)) | (start < 0) | (to < 0)
    wrong = jnp.any(wrong | (size != recv_sizes[:, None])) | jnp.any(jnp.sum(inside, 0) > 1)
    pick = lambda x: jnp.sum(jnp.where(inside, x, 0), 0)
    taken = rows[pick(source), pick(start + at - to)]
    result = jnp.where(jnp.any(inside, 0)[:, None], taken, output)
    return jnp.where(wrong, jnp.nan, result)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _ragged_all_to_all)
    monkeypatch.setattr(expert, "RAGGED", ("cpu",))


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _choices(kind, shards, T, k, E):
    """Int `[shards T k]`: the experts that tokens chose, E for none."""
    rng = np.random.default_rng(T + k + E)
    chosen = np.argsort(rng.random((shards, T, E)), -1)[..., :k]
    if kind == "skewed":  # to the first experts mostly, nobody to most of the others
        chosen = np.argsort(rng.random((shards, T, E)) + np.arange(E) ** 2 / E, -1)[..., :k]
    if kind == "holes":
        chosen = np.where(rng.random(chosen.shape) < 0.4, E, chosen)
    if kind == "one":  # each shard has an expert that all its tokens choose, some choose no other
        chosen = np.full(chosen.shape, E)
        chosen[..., -1] = (np.arange(shards) * 3 % E)[:, None]
    if kind == "none":
        chosen = np.full(chosen.shape, E)
    return chosen.astype(np.int32)


def _empty(rows, used):
    """rows, with NaN for all where one that is nobody's is not 0."""
    return jnp.where(jnp.any((rows != 0) & ~used), jnp.nan, rows)


def _poisoned(rows, used):
    return jnp.where(used, rows, jnp.nan)


def _mark(backward):
    """The identity on rows whose gradient is `backward` of it."""
    mark = jax.custom_vjp(lambda rows, used: rows)
    mark.defvjp(lambda rows, used: (rows, used), lambda used, dy: (backward(dy, used), None))
    return mark


def _op(weights, rows, sizes):
    """tanh(x W_e) v_e. Rows that are nobody's come as 0, as do their results' gradients; what they
    give back is NaN, as is the gradient."""
    W, v = weights
    at, ends = jnp.arange(len(rows))[:, None], jnp.cumsum(sizes)
    used = at < ends[-1]
    group = jnp.minimum(jnp.sum(at >= ends[None], 1), len(W) - 1)
    rows = jnp.where(used, _mark(_poisoned)(_empty(rows, used), used), 0)
    out = jnp.tanh(jnp.einsum("qd,qdf->qf", rows, W[group])) * v[group]
    return _mark(_empty)(jnp.where(used, out, jnp.nan), used)


def _exchanged(E, check=False, op=_op, wrap=lambda f: f, **own):
    """exchange on whole arrays, in a region over all mesh axes: (weights, x, chosen) -> y, lost."""

    def shard(weights, x, chosen):
        run = lambda weights, x: expert.exchange(
            functools.partial(op, weights), x, chosen, E, **own
        )
        return wrap(run)(weights, x)

    specs = P("expert"), ROWS, ROWS
    return manual(shard, MESH_AXES, specs, (ROWS, ROWS), check=check)


def _all(fn, weights, x, chosen, c):
    """y, lost and the gradients of sum(c y), on the mesh at hand."""

    def loss(weights, x):
        y, lost = fn(weights, x, chosen)
        return jnp.sum(y * c), (y, lost)

    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, x)
    return *out, *gradients[0], gradients[1]


def _arrays(chosen, E):
    T, k = chosen.shape
    weights = _normal(0, E, D, D), _normal(1, E, D)
    return weights, _normal(2, T, D), chosen, _normal(3, T, k, D)


def _put(weights, x, chosen, c):
    put = lambda tree, spec: jax.tree.map(lambda x: jax.device_put(x, spec), tree)
    return put(weights, P("expert")), *(put(a, ROWS) for a in (x, chosen, c))


def _run(mesh, fn, arrays):
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(functools.partial(_all, fn))(*_put(*arrays)))


def _mesh(sizes):
    return meshes.make(jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)


def _lost(chosen, shards, S, E, room):
    """Which of `[shards T k]` do not fit into `room` rows from a shard to a shard."""
    lost = np.zeros(chosen.shape, bool)
    for s in range(shards):
        for d in range(S):
            places = [p for p in np.ndindex(chosen[s].shape) if chosen[s][p] * S // E == d]
            for p in sorted(places, key=lambda p: (chosen[s][p], p))[room:]:
                lost[s][p] = True
    return lost


def _oracle(weights, x, chosen, c, lost, E):
    """What `_all` returns."""
    (W, v), x, c = (np.float64(w) for w in weights), np.float64(x), np.float64(c)
    y, dW, dv, dx = np.zeros(c.shape), np.zeros(W.shape), np.zeros(v.shape), np.zeros(x.shape)
    for t, i in np.ndindex(chosen.shape):
        e = chosen[t, i]
        if e == E or lost[t, i]:
            continue
        h = np.tanh(x[t] @ W[e])
        y[t, i], dv[e] = h * v[e], dv[e] + c[t, i] * h
        inner = c[t, i] * v[e] * (1 - h**2)
        dW[e] += np.outer(x[t], inner)
        dx[t] += W[e] @ inner
    return y, lost, dW, dv, dx


def _assert_close(found, expected):
    for f, e in zip(found, expected, strict=True):
        # Float32 sums of at most some 50 products of size 1 and their tanh.
        np.testing.assert_allclose(f, e, rtol=0, atol=3e-5)


# Method, place, T of a shard, k, E, room, whether the region is checked.
CASES = [
    ("padded", "1", 5, 3, 16, None, True),
    ("padded", "1", 6, 2, 8, 7, False),
    ("padded", "2", 5, 3, 16, None, False),
    ("padded", "2", 5, 3, 16, 4, True),
    ("padded", "4", 5, 3, 16, None, True),
    ("padded", "4", 5, 3, 16, 2, False),
    ("padded", "8", 6, 2, 8, None, True),
    ("padded", "8", 6, 2, 16, 1, False),
    ("padded", "8", 1, 2, 16, None, False),
    ("padded", "8", 1, 1, 8, 1, True),
    ("padded", "2x4", 5, 3, 16, 2, True),
    ("padded", "2x4", 5, 2, 4, 9, False),
    ("ragged", "1", 5, 3, 16, None, False),
    ("ragged", "2", 5, 3, 16, None, True),
    ("ragged", "4", 5, 3, 16, 2, True),
    ("ragged", "8", 6, 2, 8, 1, False),
    ("ragged", "8", 6, 2, 16, None, True),
    ("ragged", "8", 1, 2, 16, None, False),
    ("ragged", "2x4", 5, 3, 16, 2, False),
    ("ragged", "2x4", 5, 2, 4, None, False),
]


@pytest.mark.parametrize(("method", "place", "T", "k", "E", "room", "check"), CASES)
def test_values_and_gradients(emulated, method, place, T, k, E, room, check):
    mesh, S = _mesh(PLACES[place]), PLACES[place]["expert"]
    run = jax.jit(functools.partial(_all, _exchanged(E, check, method=method, room=room)))
    for kind in ("even", "skewed", "holes", "one", "none"):
        chosen = _choices(kind, mesh.size, T, k, E)
        lost = _lost(chosen, mesh.size, S, E, room or T * k)
        arrays = _arrays(chosen.reshape(-1, k), E)
        with jax.set_mesh(mesh):
            found = run(*_put(*arrays))
        _assert_close(found, _oracle(*arrays, lost.reshape(-1, k), E))
        assert np.any(lost) or kind != "one" or not room or room >= T


def _scaled(scale, rows, sizes):
    """Row by row, so that it is the same number wherever a row lies."""
    at = jnp.arange(len(rows))[:, None]
    used = at < jnp.sum(sizes)
    group = jnp.sum(at >= jnp.cumsum(sizes)[None], 1)
    return jnp.where(used, jnp.sin(rows) * scale.at[group].get(mode="clip")[:, None], jnp.nan)


@pytest.mark.parametrize(("method", "dtype"), [("padded", jnp.bfloat16), ("ragged", np.float32)])
def test_many_shards_are_one_shard_bit_by_bit(emulated, method, dtype):
    """The gradient of x too, which adds up a token's choices; lost ones change no other."""
    E, k = 16, 4
    chosen = _choices("holes", 1, 64, k, E)[0]
    c, x, scale = (_normal(i, *shape) for i, shape in enumerate([(64, k, D), (64, D), (E,)]))
    arrays = jax.tree.map(lambda x: x.astype(dtype), ((scale,), x, c))
    arrays = *arrays[:2], chosen, arrays[2]
    fn = lambda **own: _exchanged(E, op=lambda w, *args: _scaled(*w, *args), method=method, **own)
    y, lost, _, dx = _run(_mesh(dict(expert=1)), fn(), arrays)
    assert not np.any(lost)
    assert y.dtype == dx.dtype == dtype
    found = _run(_mesh(dict(data=2, expert=4)), fn(), arrays)
    np.testing.assert_array_equal(found[0], y)
    np.testing.assert_array_equal(found[3], dx)
    some, lost = _run(_mesh(dict(expert=8)), fn(room=2), arrays)[:2]
    assert 0.1 < np.mean(lost) < 0.9
    np.testing.assert_array_equal(some, np.where(lost[..., None], 0, y))


def _layers(E, wrap, check=False, **own):
    """Three layers in a scan: each adds to its tokens what the experts make of them."""

    def shard(weights, x, chosen):
        def layer(x, chosen):
            y, lost = expert.exchange(functools.partial(_op, weights), x, chosen, E, **own)
            return x + jnp.sum(y, 1), lost

        return jax.lax.scan(wrap(layer), x, chosen)

    by_layer = P(None, *ROWS)
    specs = (P("expert"), ROWS, by_layer), (ROWS, by_layer)
    return manual(shard, MESH_AXES, *specs, check=check)


@pytest.mark.parametrize(("method", "check"), [("padded", True), ("ragged", False)])
def test_in_a_scan_of_layers_that_are_recomputed(emulated, method, check):
    E, k = 8, 2
    chosen = _choices("holes", 3, 32, k, E)
    weights, x = (_normal(0, E, D, D), _normal(1, E, D)), _normal(2, 32, D)

    def found(sizes, fn):
        loss = lambda weights, x, chosen: jnp.sum(jnp.sin(fn(weights, x, chosen)[0]))
        with jax.set_mesh(_mesh(sizes)):
            placed = *_put(weights, x, x, x)[:2], jax.device_put(chosen, P(None, *ROWS))
            return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(*placed))

    wanted = found(dict(expert=1), _layers(E, lambda f: f))
    got = found(dict(data=2, expert=4), _layers(E, jax.checkpoint, check=check, method=method))
    for a, b in zip(got, wanted, strict=True):
        # Float32 sums of 32 tokens in another order, through three layers.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_without_a_mesh_one_shard_is_plain_code():
    chosen = _choices("holes", 1, 20, 3, 8)[0]
    arrays = _arrays(chosen, 8)
    fn = lambda weights, x, chosen: expert.exchange(
        functools.partial(_op, weights), x, chosen, 8, axis=None, method="ragged"
    )
    found = jax.jit(functools.partial(_all, fn))(*arrays)
    _assert_close(found, _oracle(*arrays, np.zeros(chosen.shape, bool), 8))


def test_in_a_region_over_the_axis_alone():
    E, chosen, parts = 8, _choices("holes", 4, 5, 2, 8).reshape(-1, 2), P("expert")
    arrays = _arrays(chosen, E)
    shard = lambda w, *args: expert.exchange(functools.partial(_op, w), *args, E)
    fn = manual(shard, "expert", (parts, parts, parts), (parts, parts))
    with jax.set_mesh(_mesh(dict(expert=4))):
        placed = jax.tree.map(lambda x: jax.device_put(x, parts), arrays)
        found = jax.jit(functools.partial(_all, fn))(*placed)
    _assert_close(found, _oracle(*arrays, np.zeros(chosen.shape, bool), E))


@pytest.mark.parametrize("method", ["padded", "ragged"])
def test_tokens_that_are_the_same_along_another_axis(emulated, method):
    """Where types are checked, their gradient is summed over it, as choices differ along it."""
    E, chosen = 8, _choices("holes", 8, 5, 2, 8).reshape(-1, 2)
    weights, x, chosen, c = _arrays(chosen, E)
    x, parts = x[:20], P("expert")
    arrays = weights, np.concatenate([x, x]), chosen, c
    op = lambda w, *args: expert.exchange(functools.partial(_op, w), *args, E, method=method)
    fn = manual(op, MESH_AXES, (parts, parts, ROWS), (ROWS, ROWS))
    with jax.set_mesh(_mesh(dict(data=2, expert=4))):
        placed = list(_put(*arrays))
        placed[1] = jax.device_put(x, parts)
        found = jax.jit(functools.partial(_all, fn))(*placed)
    *expected, dx = _oracle(*arrays, np.zeros(chosen.shape, bool), E)
    _assert_close(found, [*expected, dx[:20] + dx[20:]])


@pytest.mark.parametrize(("S", "size", "P"), [(2, 3, 7), (4, 1, 2), (3, 4, 5)])
def test_order_of_expert_and_back(S, size, P):
    """Of rows from shards, in parts of P, each part in order of expert itself."""
    rng = np.random.default_rng(P)
    parts = [np.sort(rng.integers(0, size, rng.integers(0, P + 1))) for _ in range(S)]
    arrived = np.stack([np.bincount(part, minlength=size) for part in parts]).astype(np.int32)
    slots = {(e, s, p): s * P + p for s, part in enumerate(parts) for p, e in enumerate(part)}
    ordered = [slots[key] for key in sorted(slots)]
    there, back = expert._by_expert(jnp.asarray(arrived), P)
    np.testing.assert_array_equal(there, ordered + [S * P] * (S * P - len(ordered)))
    rows = [ordered.index(slot) if slot in ordered else S * P for slot in range(S * P)]
    np.testing.assert_array_equal(back, rows)


def _abstract(mesh, T, k, E, D=D):
    """What `_arrays` gives, for T tokens of a shard."""
    like = lambda kind, spec, *shape: jax.ShapeDtypeStruct(
        shape, kind, sharding=jax.NamedSharding(mesh, spec)
    )
    parts, rows, f32 = P("expert"), mesh.size * T, jnp.float32
    x, chosen = like(f32, ROWS, rows, D), like(jnp.int32, ROWS, rows, k)
    return (
        (like(f32, parts, E, D, D), like(f32, parts, E, D)),
        x,
        chosen,
        like(f32, ROWS, rows, k, D),
    )


def _sines(mesh, T, k, E, room, D=D):
    """The compiled y and gradient of x, in a region that adds no sums of its own."""
    fn = _exchanged(E, True, lambda weights, rows, sizes: jnp.sin(rows), room=room)

    def run(x, chosen, c):
        y, pull = jax.vjp(lambda x: fn((), x, chosen)[0], x)
        return y, pull(c)

    return jax.jit(run).lower(*_abstract(mesh, T, k, E, D)[1:]).compile().as_text()


@pytest.mark.parametrize(("room", "P"), [(None, 32), (5, 5)])
def test_what_equal_parts_send(room, P):
    """There and back S P rows, and as much for the gradient, besides a count for each expert."""
    S, T, k, E = 8, 16, 3, 16
    mesh = _mesh(dict(expert=S))
    with jax.set_mesh(mesh):
        text = _sines(mesh, T, k, E, room)
    found = hlo.collectives(text)
    assert {c.kind for c in found} == {"all-to-all"}
    assert sorted(c.bytes for c in found) == [4 * E] + 4 * [4 * S * P * D]
    assert not re.search(r"f32\S* scatter\(", text)


@pytest.mark.parametrize("check", [False, True])
def test_ragged_ones_are_lowered_with_their_gradients(monkeypatch, check):
    monkeypatch.setattr(expert, "platform", lambda: "tpu")
    mesh = _mesh(dict(data=2, expert=4))
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(_all, _exchanged(16, check)))
        text = run.lower(*_abstract(mesh, 8, 2, 16)).as_text()
    assert text.count("@ragged_all_to_all") == 4


def test_the_emulation_does_what_the_documentation_shows(emulated):
    """The example of `jax.lax.ragged_all_to_all`; then slices that overlap at their receiver."""
    operand = [[1, 2, 2], [3, 4, 0]], [[0] * 4] * 2
    slices = [[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]]
    rows = [np.float32(x).reshape(-1, 1) for x in operand]
    numbers = [np.int32(x).reshape(-1) for x in slices]
    with jax.set_mesh(_mesh(dict(expert=2))):
        fn = functools.partial(jax.lax.ragged_all_to_all, axis_name="expert")
        run = jax.jit(manual(fn, "expert", P("expert"), P("expert")))
        put = lambda x: jax.device_put(x, P("expert"))
        result = run(*map(put, rows + numbers))
        wrong = run(*map(put, rows + numbers[:2] + [np.int32([0, 1, 0, 1])] + numbers[3:]))
    np.testing.assert_array_equal(result[:, 0], [1, 3, 0, 0, 2, 2, 4, 0])
    assert np.any(np.isnan(wrong))


_same = lambda rows, sizes: rows
ERRORS = {
    "experts": (dict(experts=12), ValueError, "12 experts do not divide over 8 shards"),
    "method": (dict(method="ring"), ValueError, "No method is called 'ring'; there are: padded, "),
    "ragged": (dict(method="ragged"), NotImplementedError, "no ragged all-to-all on a cpu: use"),
    "room": (dict(room=0), ValueError, "room is 0; it must be 1 row or more"),
    "x": (dict(x=(16, 2, 4)), ValueError, r"x \(2, 2, 4\) must be \[T D\], and chosen \(2, 3\)"),
    "chosen": (dict(chosen=(8, 3)), ValueError, r"x \(2, 4\) must be .*, and chosen \(1, 3\)"),
    "dtype": (dict(dtype=jnp.float32), ValueError, "must hold numbers of experts, not float32"),
    "op": (dict(op=lambda rows, sizes: rows[1:]), ValueError, r"\(47, 4\) for rows of \(48, 4\)"),
}


@pytest.mark.parametrize(("own", "error", "sentence"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_is_said_in_a_sentence(own, error, sentence):
    own = dict(op=_same, experts=32, x=(16, 4), chosen=(16, 3), dtype=jnp.int32) | own
    mesh = _mesh(dict(expert=8))
    like = lambda shape, kind: jax.ShapeDtypeStruct(
        shape, kind, sharding=jax.NamedSharding(mesh, ROWS)
    )
    x, chosen = like(own.pop("x"), jnp.float32), like(own.pop("chosen"), own.pop("dtype"))
    shard = lambda x, chosen: expert.exchange(x=x, chosen=chosen, **own)
    with jax.set_mesh(mesh), pytest.raises(error, match=sentence):
        jax.eval_shape(manual(shard, MESH_AXES, (ROWS, ROWS), ROWS), x, chosen)


@pytest.mark.parametrize("name", ["tpu", "gpu", "cpu"])
def test_the_target_decides_and_not_the_machine_at_hand(name):
    """Ragged where such programs run for others already; on a GPU by name only."""
    device = AbstractDevice(device_kind="any", num_cores=None, platform=name)
    kinds = (jax.sharding.AxisType.Explicit,) * len(MESH_AXES)
    sizes = tuple(8 if axis == "expert" else 1 for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=kinds, abstract_device=device)

    def uses(method):
        shard = lambda x, chosen: expert.exchange(_same, x, chosen, 16, method=method)
        run = manual(shard, MESH_AXES, (ROWS, ROWS), (ROWS, ROWS))
        return "ragged_all_to_all" in str(jax.make_jaxpr(run)(*_abstract(mesh, 8, 2, 16)[1:3]))

    with use_abstract_mesh(mesh):
        assert expert.platform() == name
        assert uses(None) == (name == "tpu")
        assert not uses("padded")
        if name != "cpu":
            assert uses("ragged")


def compile_for_a_tpu():
    """Prints the program of a value and its gradients for eight chips."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(topology_name="v5p:2x2x2", platform="tpu").devices
    mesh = meshes.make(chips, expert=8)
    with use_abstract_mesh(mesh.abstract_mesh):
        print(_sines(mesh, 256, 2, 16, 32, 128))


@pytest.mark.aot
def test_a_tpu_compiles_ragged_ones_both_ways():
    """S P rows there and T k back, and as many for the gradient."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: uv sync --extra aot")
    if "tpu" in present():
        pytest.skip("there is a TPU")
    chosen = ("JAX_", "XLA_", "TPU_", "LIBTPU_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(chosen)} | ENVIRONMENT
    command = [sys.executable, "-m", "tests.parallel.expert_test"]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sent = re.findall(r"= f32\[(\d+),.* ragged-all-to-all\(", done.stdout)
    assert sorted(map(int, sent)) == [256, 256, 512, 512]
    assert not re.search(r"all-gather|f32\S* scatter\(", done.stdout)


if __name__ == "__main__":
    compile_for_a_tpu()
