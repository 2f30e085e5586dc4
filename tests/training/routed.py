"""A model whose experts are balanced, what it gives on any mesh, and a float64 oracle of that.

The model has the real mixture of experts in two scanned layers, between a look-up and a head. The
oracle is dense, of the whole batch at once and knows nothing of training/balance.py: with f the
frequencies that a token's probabilities p are weighted by, its balance is sum_t E f_t . p_t / T,
and loops over sets of tokens say whose choices f_t counts.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.batch import Batch
from models.context import of_batch
from models.ffns import moe
from models.param import Dims, restore, table
from parallel import mesh as meshes
from parallel import zero
from parallel.fsdp import gather
from parallel.replicas import differences
from parallel.rules import spec
from parallel.vocab import look_up
from parallel.weight import Entry, Weight
from training.accumulate import value_and_grad
from training.loss import Loss
from training.losses import cross_entropy
from training.program import batch_sharding

N, D, E, K, F, W, B, L = 2, 16, 4, 2, 8, 64, 64, 8
PATH, BIAS, ROUTER = "blocks/0/ffn", "blocks/0/ffn/bias", "blocks/0/ffn/router"
MESHES = {1: {}, 2: {"data": 2}, 4: {"fsdp": 2, "expert": 2}}
MESHES |= {8: {"data": 2, "context": 2, "expert": 2}}
MARGIN = 1e-4  # between chosen and not chosen: float32 decides as float64 does
SIZES = dict(experts=E, top_k=K, width=F, implementation="reference")
GRAPH, STATE = nnx.split(
    nnx.eval_shape(lambda: moe.FFN(Dims(D, L, N, D), rngs=nnx.Rngs(0), **SIZES))
)
TABLE = {f"{PATH}/{n}": Entry(e.weight, (N, *e.shape)) for n, e in table(STATE).items()}
TABLE |= {"tokens": Entry(Weight((None, "embed")), (W, D))}
TABLE |= {"head/kernel": Entry(Weight(("embed", None)), (D, W))}
TRAINED = {path: entry for path, entry in TABLE.items() if path != BIAS}
OWN = ("router", "bias", "up", "down")  # of a layer

# What is common to all words makes some experts more popular.
SCALE = {"tokens": 1.0, "common": 0.5, BIAS: 0.02, ROUTER: 0.5, "head/kernel": 0.1}
RNG = np.random.default_rng(2)
PARAMS = {
    path: np.float32(SCALE.get(path, 0.25) * RNG.normal(size=entry.shape))
    for path, entry in TABLE.items()
}
PARAMS["tokens"] += np.float32(SCALE["common"] * RNG.normal(size=(1, D)))


def _apply(params, inputs, ctx, *, remat, unroll):
    x = look_up(gather(params["tokens"]).astype(ctx.dtype), inputs, ctx.stream)

    def layer(x, own):
        own = {name: gather(value[...]) for name, value in own.items()}
        y, aux = nnx.merge(GRAPH, restore(STATE, own))(x, ctx)
        return x + y, aux

    one = jax.checkpoint(layer, prevent_cse=unroll == N) if remat else layer
    layers = {p.removeprefix(f"{PATH}/"): v for p, v in params.items() if p.startswith(PATH)}
    x, aux = jax.lax.scan(one, x, layers, unroll=unroll)
    logits = jnp.einsum("bld,dw->blw", x, gather(params["head/kernel"]).astype(x.dtype))
    return logits.astype(jnp.float32), {f"{PATH}/{name}": a for name, a in aux.items()}


@functools.cache
def loss(method="global_batch", remat=False, unroll=1, **own) -> Loss:
    """Cross-entropy with a method of balance, of weight 1 where `own` gives no other."""
    module = importlib.import_module(f"training.balances.{method}")
    apply = functools.partial(_apply, remat=remat, unroll=unroll)
    return module.make(cross_entropy.make(apply), (PATH,), **{"weight": 1.0, "z": 0.0, **own})


def batch(seed, empty=0):
    """Rows of several documents with padding anywhere between; the first `empty` have no token."""
    rng = np.random.default_rng(seed)
    document = 1 + np.cumsum(rng.random((B, L)) < 0.3, 1)
    here = rng.random((B, L)) < rng.choice([0.3, 0.8, 1.0], (B, 1))
    here &= (np.arange(B) >= empty)[:, None]
    return Batch(
        inputs=rng.integers(0, W, (B, L), dtype=np.int32),
        targets=rng.integers(0, W, (B, L), dtype=np.int32),
        weights=np.float32(rng.choice([0.0, 0.5, 1.0], (B, L)) * here),
        segment_ids=np.int32(document * here),
        positions=np.zeros((B, L), np.int32),
        sample=np.stack([np.zeros(B), 100 + np.arange(B)], -1).astype(np.uint32),
        domain=np.zeros(B, np.int32),
    )


@functools.cache
def program(loss, stage="none", dtype="float32"):
    """(trained, fixed, batch `[A b L]`) -> (value, balance, counts of choices, gradient)."""
    context = lambda micro, totals: of_batch(micro, train=True, totals=totals, dtype=dtype)

    def run(trained, fixed, batch):
        place = zero.make(stage, TRAINED, jax.sharding.get_abstract_mesh())
        own = dict(fixed=fixed, place=place)
        value, metrics, totals, gradient = value_and_grad(loss, trained, batch, context, **own)
        return value, metrics["balance"], totals[f"{PATH}/selected"], gradient

    return jax.jit(run)


def placed(params, batch, A, mesh):
    """(trained parameters, fixed ones, batch `[A b L]`) on the devices."""
    put = lambda path, leaf: jax.device_put(leaf, spec(*TABLE[path].axes))
    params = {path: put(path, leaf) for path, leaf in params.items()}
    parts = {n: x.reshape(A, B // A, *x.shape[1:]) for n, x in batch._asdict().items()}
    parts = {n: jax.device_put(x, batch_sharding(n, mesh, 1)) for n, x in parts.items()}
    return params, {BIAS: params.pop(BIAS)}, Batch(**parts)


def run(loss, batch, A=1, sizes=MESHES[1], params=PARAMS, **how):
    """What `program` gives, on the host, of a mesh whose devices hold equal copies."""
    mesh = meshes.make(jax.devices()[: math.prod(sizes.values())], **sizes)
    with jax.set_mesh(mesh):
        out = program(loss, **how)(*placed(params, batch, A, mesh))
        assert differences(out) == []
        return jax.device_get(out)


@jax.jit
def _dense(params, batch, weighted, z):
    """(value, (choices, probabilities, gaps)), gradient: every expert for every token.

    weighted: of probabilities, and z of squared log-partition functions, `[N B L E]`, `[B L]`.
    """

    def value(params):
        x, balance, seen = params["tokens"][batch.inputs], 0.0, []
        for n in range(N):
            router, bias, up, down = (params[f"{PATH}/{w}"][n] for w in OWN)
            logits = x @ router
            p = jax.nn.softmax(logits, -1)
            scores = jax.lax.stop_gradient(p) + bias[None, None]
            rank = jnp.argsort(jnp.argsort(-scores, -1), -1)
            chosen, order = rank < K, -jnp.sort(-scores, -1)
            gates = jnp.where(chosen, p, 0.0) / jnp.sum(jnp.where(chosen, p, 0.0), -1)[..., None]
            gates = gates * (batch.segment_ids > 0)[..., None]
            h = jnp.einsum("bld,edsf->blesf", x, up)
            y = jnp.einsum("blef,efd->bled", jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down)
            x = x + jnp.einsum("ble,bled->bld", gates, y)
            balance = balance + jnp.sum(weighted[n] * p)
            balance = balance + jnp.sum(z * jax.nn.logsumexp(logits, -1) ** 2)
            seen.append((chosen, p, order[..., K - 1] - order[..., K]))
        log_p = jax.nn.log_softmax(x @ params["head/kernel"], -1)
        nll = -jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
        nll = jnp.sum(batch.weights * nll) / jnp.maximum(jnp.sum(batch.weights), 1e-9)
        return nll + balance, [jnp.stack(x) for x in zip(*seen, strict=True)]

    return jax.value_and_grad(value, has_aux=True)(params)


def oracle(batch, sets=None, z=0.0, params=PARAMS):
    """(value, balance, counts, gradient) in float64, of a weight of 1.

    sets: pairs of masks `[B L]`, tokens whose probabilities are weighted and those that are
    counted for it; every token by all of them when None.
    """
    here = batch.segment_ids > 0
    T = max(1, here.sum())
    with jax.enable_x64(True):
        wide = lambda x: np.float64(x) if x.dtype == np.float32 else x
        params, batch = jax.tree.map(wide, (params, batch))
        z, weighted = z * here / T, np.zeros((N, B, L, E))
        (_, (chosen, p, gap)), _ = jax.device_get(_dense(params, batch, weighted, z))
        assert gap[:, here].min() > MARGIN
        for mine, counted in sets or [(here, here)]:
            for n in range(N):
                counts = chosen[n][counted & here].sum(0)
                weighted[n][mine & here] = E * counts / max(1, counts.sum()) / T
        (value, _), gradient = jax.device_get(_dense(params, batch, weighted, z))
    gradient.pop(BIAS)
    return value, (weighted * p).sum() / N, chosen[:, here].sum(1), gradient


def error(actual, expected):
    """The largest deviation of any leaf, relative to the leaf's largest value."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return np.max([np.abs(a - e).max() / np.abs(e).max() for a, e in pairs])


def check(found, expected, tolerance=3e-6):
    """3e-6: float32 sums of some hundred tokens in another order, through two layers."""
    assert error(found, expected) < tolerance
    np.testing.assert_array_equal(found[2], expected[2])
