"""Muon against a float64 Muon of separate matrices; what it costs under a mesh; its width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim.methods import muon
from parallel.weight import Entry, Weight
from tests.hlo import collectives
from tests.optim import layers
from tests.optim.layers import DECAYED, TABLE, D, F, H, K, draws, start

# Fan-in and fan-out of each of the separate matrices that Muon steps.
FLAT = {
    "blocks/0/mixer/qkv": (D, H * K),
    "blocks/0/mixer/out": (H * K, D),
    "blocks/0/ffn/up": (D, F),
    "blocks/0/ffn/experts": (D, F),
    "blocks/0/ffn/down": (F, D),
}
QKV, UP, DOWN = "blocks/0/mixer/qkv", "blocks/0/ffn/up", "blocks/0/ffn/down"


def orthogonal(x, steps=5):
    x = x / np.sqrt((x**2).sum())
    for _ in range(steps):
        x = 3.4445 * x - 4.775 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def oracle(w, grads, lr, wd, *, rms, nesterov, adam):
    def step(path, index, x):
        m, v, decay = 0.0, 0.0, wd * (path in DECAYED)
        for t, g in enumerate(grads, 1):
            g = g[path][index]
            if path in FLAT:
                fan_in, fan_out = FLAT[path]
                m = 0.95 * m + g
                u = orthogonal((g + 0.95 * m if nesterov else m).reshape(fan_in, fan_out))
                scale = np.sqrt(max(1, fan_out / fan_in))
                scale = scale if rms is None else rms * np.sqrt(max(fan_in, fan_out))
                x = x - lr * (scale * u.reshape(x.shape) + decay * x)
            else:
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
                u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
                x = x - lr * adam * (u + decay * x)
        return x

    return layers.oracle(w, step)


@pytest.mark.parametrize(
    ("rms", "nesterov", "adam"), [(0.2, True, 1.0), (None, False, 0.1), (0.5, False, 1.0)]
)
def test_equals_muon_on_separate_layers(rms, nesterov, adam):
    w, *grads = map(dict if nesterov else layers.some, (start(), *draws(5)[1:]))
    own = {"rms": rms, "nesterov": nesterov}
    tx = muon.make(TABLE, weight_decay=0.1, adam_lr_ratio=adam, **own)
    got = layers.run(tx, w, grads, 0.01)
    # float32; the polynomial makes a rounding of 6e-8 that lies along a small singular value up
    # to 3.4445^5 = 480 times larger, in a step of a hundredth of the weight.
    layers.agree(got, oracle(w, grads, 0.01, 0.1, adam=adam, **own), 3e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15)])
@pytest.mark.parametrize("shape", [(2, 3, 12, 20), (2, 3, 20, 12)])
def test_singular_values_come_near_one(dtype, tolerance, shape):
    """tolerance, of the norm: float32 as above; bfloat16 rounds each of 15 products to 4e-3, and
    a step of the iteration makes what lies along a small singular value 3.4 times larger."""
    x = np.random.default_rng(0).normal(size=shape)
    weight = Weight((None, None), (0,), (1,), init=("normal", 1.0))
    make = jax.jit(lambda x: muon._orthogonalise(Entry(weight, shape), x, 5, dtype))
    got = np.float64(make(np.float32(x)))
    values = np.linalg.svd(got, compute_uv=False)
    assert values.min() > 0.65
    assert values.max() < 1.25
    want = np.stack([orthogonal(y) for y in x.reshape(6, *shape[2:])]).reshape(shape)
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)
    assert (np.linalg.norm(got - want) > 1e-3) == (dtype == "bfloat16")


def test_dimensions_stand_in_any_order():
    x = np.float32(np.random.default_rng(0).normal(size=(5, 3, 4, 2)))
    weight = Weight((None,) * 4, fan_in=(2, 0), fan_out=(3,), stack=(1,), init=("normal", 1.0))
    got = jax.jit(lambda x: muon._orthogonalise(Entry(weight, x.shape), x, 5, "float32"))(x)
    for j in range(3):
        flat = np.array([[x[o, j, i, :] for o in range(5)] for i in range(4)]).reshape(20, 2)
        want = orthogonal(flat).reshape(4, 5, 2)
        np.testing.assert_allclose(np.moveaxis(got[:, j], 1, 0), want, atol=1e-4)  # as above


def test_the_scale_of_the_gradient_does_not_matter():
    w, *grads = ({UP: tree[UP]} for tree in (start(), *draws(3)[1:]))
    tx = muon.make(TABLE, weight_decay=0.0)
    one, other = (layers.run(tx, w, [{UP: c * g[UP]} for g in grads], 0.01)[UP] for c in (1.0, 1e3))
    np.testing.assert_allclose(one, other, atol=1e-6)  # float32


BOTH = (None, "fsdp", None, "tensor")


def exchanged(stack, *axes):
    """What 4 by 2 devices exchange for a leaf that lies so; its steps equal those of one."""
    entry = Entry(
        Weight(("embed", None, "heads", None), (0,), (2, 3), (1,), ("normal", 1.0)),
        (stack, 16, 3, 8, 4),
    )
    x = np.float32(np.random.default_rng(0).normal(size=entry.shape))
    run = jax.jit(lambda x: muon._orthogonalise(entry, x, 5, "float32"))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    alone = run(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(*axes)))
        program = run.lower(placed).compile()
        got = program(placed)
    assert got.sharding.is_equivalent_to(placed.sharding, x.ndim)
    # Only the norm is a sum in another order, see above.
    np.testing.assert_allclose(got, alone, atol=1e-4)
    return [c for c in collectives(program.as_text()) if c.bytes > 4 * 3 * stack]


def test_devices_exchange_their_matrices():
    """Where the stack divides, an axis sends each element of a device's part there and back."""
    found, part = exchanged(8, *BOTH), 8 * 16 * 3 * 8 * 4 // 8
    assert [c.kind for c in found] == ["all-to-all"] * 4
    assert {c.bytes for c in found} == {4 * part}


def test_axes_that_share_a_dimension():
    found = exchanged(8, None, ("fsdp", "tensor"))
    assert [c.kind for c in found] == ["all-to-all"] * 4


def test_an_axis_that_does_not_divide_the_stack_gathers_it():
    found, leaf = exchanged(4, *BOTH), 4 * 16 * 3 * 8 * 4
    assert sorted(c.kind for c in found) == ["all-gather", "all-to-all", "all-to-all"]
    assert next(c.bytes for c in found if c.kind == "all-gather") == 4 * leaf // 4


def test_the_iteration_is_of_the_matrices_alone():
    state = jax.eval_shape(muon.make(TABLE, weight_decay=0.0).init, start())
    assert state.momentum.keys() == FLAT.keys()
    assert state.adam.mu.keys() == TABLE.keys() - FLAT.keys()


@pytest.mark.parametrize("rms", [0.2, None])
def test_width_makes_the_spectral_norm_follow_the_fans(rms):
    """A step's is sqrt(o / i) of that at the base width, where the base is wide or tall."""
    weight = Weight((None, None), (0,), (1,), init=("normal", 1.0))
    table = {
        f"{base} {i} {o}": Entry(weight, (base[0] * i, base[1] * o), (float(i), float(o)))
        for base in ((4, 12), (12, 4))
        for i, o in ((1, 1), (4, 1), (1, 4), (2, 8))
    }
    eyes = {path: np.eye(*entry.shape, dtype=np.float32) for path, entry in table.items()}
    tx = muon.make(table, weight_decay=0.0, rms=rms)
    steps = jax.jit(lambda w: tx.update(w, tx.init(w), w)[0])(eyes)
    for path, entry in table.items():
        base = f"{path[: path.index(')') + 1]} 1 1"
        size = lambda path: (
            muon.width(table[path])
            * np.linalg.norm(steps[path], 2)
            # All singular values of an identity are alike, and after five turns not quite 1.
            / np.linalg.norm(orthogonal(np.eye(*table[path].shape)), 2)
        )
        i, o = entry.wider
        assert size(path) / size(base) == pytest.approx(np.sqrt(o / i), rel=1e-4)  # float32


WIDER = {DOWN: (4.0, 4.0), "head/kernel": (4.0, 1.0)}


def test_width_of_the_others_and_the_decay():
    wider = lambda path: dataclasses.replace(TABLE[path], wider=WIDER[path])
    assert all(muon.width(entry) == 1.0 for entry in TABLE.values())
    assert muon.width(wider(DOWN)) == pytest.approx(1 / 2)
    assert muon.width(wider("head/kernel")) == 1.0
    for path in WIDER:
        w = {path: np.float32(draws(1)[0][path])}
        zeros = jax.tree.map(np.zeros_like, w)
        for rms in (0.2, None):
            tx = muon.make({path: wider(path)}, weight_decay=0.1, rms=rms)
            u = jax.jit(lambda g, w, tx=tx: tx.update(g, tx.init(w), w)[0])(zeros, w)
            decayed = muon.width(wider(path)) * u[path]
            np.testing.assert_allclose(decayed, 0.1 * w[path], rtol=1e-6)


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="dtype is 'float16'; it must be float32 or bfloat16"):
        muon.make(TABLE, weight_decay=0.0, dtype="float16")
    tx, params = muon.make(TABLE, weight_decay=0.0), {"blocks/1/mixer/q": jnp.ones((2, 2))}
    with pytest.raises(KeyError, match="'blocks/1/mixer/q' is not in the table"):
        tx.init(params)
