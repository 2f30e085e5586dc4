"""A table whose leaves hold many matrices, and its separate matrices, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parallel.weight import Entry, Weight

N, D, H, K, F, E, W = 3, 8, 2, 4, 16, 2, 10
NORMAL = ("normal", 0.1)
VECTOR = {"decay": False, "init": ("ones",), "group": "norm"}
TABLE = {
    "embed/tokens": Entry(
        Weight(("vocab", "embed"), fan_out=(1,), init=NORMAL, group="embed"), (W, D)
    ),
    "blocks/0/mixer/qkv": Entry(
        Weight(("embed", None, "heads", "kv"), (0,), (2, 3), (1,), NORMAL), (N, D, 3, H, K)
    ),
    "blocks/0/mixer/out": Entry(
        Weight(("heads", "kv", "embed"), (0, 1), (2,), init=NORMAL), (N, H, K, D)
    ),
    "blocks/0/mixer/k_norm": Entry(Weight(("heads", "kv"), **VECTOR), (N, H, K)),
    "blocks/0/ffn/up": Entry(
        Weight(("embed", None, "mlp"), (0,), (2,), (1,), NORMAL), (N, D, 2, F)
    ),
    "blocks/0/ffn/experts": Entry(
        Weight(("expert", "embed", None, "mlp"), (1,), (3,), (0, 2), NORMAL), (N, E, D, 2, F)
    ),
    "blocks/0/ffn/down": Entry(Weight(("mlp", "embed"), (0,), (1,)), (N, F, D)),
    "blocks/0/norm/scale": Entry(Weight(("embed",), **VECTOR), (N, D)),
    "head/kernel": Entry(Weight(("embed", "vocab"), (0,), (1,), init=NORMAL, group="head"), (D, W)),
    "head/bias": Entry(Weight(("vocab",), decay=False, group="bias"), (W,)),
}
RATIO = {"embed/tokens", "blocks/0/mixer/qkv", "blocks/0/mixer/out", "blocks/0/ffn/up"}
RATIO |= {"blocks/0/ffn/experts", "head/kernel"}
DECAYED = RATIO | {"blocks/0/ffn/down"}
SOME = ("embed/tokens", "blocks/0/mixer/qkv", "blocks/0/ffn/experts", "blocks/0/ffn/down")
SOME += ("blocks/0/norm/scale", "head/bias")
# How many stand side by side, and where in the leaf.
STACKS = {
    "blocks/0/mixer/qkv": ((N, 3), lambda i, j: (i, slice(None), j)),
    "blocks/0/ffn/up": ((N, 2), lambda i, j: (i, slice(None), j)),
    "blocks/0/ffn/experts": ((N, E, 2), lambda i, e, j: (i, e, slice(None), j)),
}


def stack(path):
    """(how many matrices stand side by side, their indices by place)."""
    default = ((N,), lambda i: (i,)) if path.startswith("blocks") else ((), lambda: ())
    return STACKS.get(path, default)


def pieces(path):
    """Indices of the separate matrices of a leaf."""
    sizes, index = stack(path)
    return [index(*place) for place in np.ndindex(sizes)]


def draws(count, spread=2.0):
    """Values of the table, representable in float32; layers of very different size, for which one
    ratio for the stack would be far off."""
    rng = np.random.default_rng(1)
    scale = lambda e: (
        spread ** np.arange(N).reshape(N, *[1] * (len(e.shape) - 1)) if e.layers else 1
    )
    one = lambda: {
        p: np.float64(np.float32(rng.normal(size=e.shape) * scale(e))) for p, e in TABLE.items()
    }
    return [one() for _ in range(count)]


def some(tree):
    """One leaf of each kind, for tests that need not compile them all."""
    return {path: tree[path] for path in SOME}


def start(spread=2.0):
    w = draws(1, spread)[0]
    for path, entry in TABLE.items():
        if entry.weight.init[0] != "normal":
            w[path] = np.full(entry.shape, float(entry.weight.init[0] == "ones"))
    return w


def oracle(w, step):
    """`w` with each separate matrix x of each leaf replaced by step(path, index, x)."""
    w = {path: x.copy() for path, x in w.items()}
    for path in w:
        for index in pieces(path):
            w[path][index] = step(path, index, w[path][index].copy())
    return w


def trace(tx, w, grads, lr):
    """Weights after these gradients, and each step's reports along axis 0."""
    tx = optax.with_extra_args_support(tx)
    single = lambda *trees: jax.tree.map(lambda *x: np.float32(np.stack(x)), *trees)
    rates = np.broadcast_to(np.float32(lr), len(grads))

    def step(carry, now):
        (params, state), (g, rate), report = carry, now, {}
        u, state = tx.update(g, state, params, report=report)
        return (jax.tree.map(lambda x, u: x - rate * u, params, u), state), report

    @jax.jit
    def steps(params, grads):
        (params, _), reports = jax.lax.scan(step, (params, tx.init(params)), (grads, rates))
        return params, reports

    return steps(jax.tree.map(jnp.float32, w), single(*grads))


def run(tx, w, grads, lr):
    return trace(tx, w, grads, lr)[0]


def agree(got, want, tolerance):
    """Every separate matrix to this share of its largest element."""
    for path in want:
        for index in pieces(path):
            a, b = np.float64(got[path])[index], want[path][index]
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (path, index)
