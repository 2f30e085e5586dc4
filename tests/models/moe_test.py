"""The mixture against a loop over tokens and their experts in float64 numpy, its gradients too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.context import Context
from models.ffns.moe import FFN
from models.ffns.swiglu import FFN as Dense
from models.param import Dims, restore, table
from models.routing import ROUTERS
from parallel import mesh as meshes
from parallel.named import find
from parallel.rules import spec
from tests.models.built import build, close, context, packed
from training import flops

B, L, D, F, E = 4, 12, 8, 6, 4
LAYOUT = ((7, 3), (12,), (2, 2), (5, 6))
KINDS = [(r, k) for r in ROUTERS for k in (1, 2, 3) if (r, k) != ("topk_softmax", 1)]


def made(seed=0, **own):
    """(params -> module, params, table), nothing at its start."""
    own = dict(experts=E, width=F) | own
    dims = Dims(d_model=D, length=L, n_layers=2, base_d_model=D)
    graph, state = nnx.split(nnx.eval_shape(lambda: FFN(dims, rngs=nnx.Rngs(0), **own)))
    entries, rng = table(state), np.random.default_rng(seed)
    draw = lambda entry: np.float32(0.4 * rng.normal(size=entry.shape))
    params = {path: draw(entry) for path, entry in entries.items()}
    return lambda params: nnx.merge(graph, restore(state, params)), params, entries


def rows(seed=1):
    """x [B L D], weights of the same shape for a sum over outputs, and segments of LAYOUT."""
    rng = np.random.default_rng(seed)
    x, c = np.float32(rng.normal(size=(2, B, L, D)))
    return x, c, packed(LAYOUT, L)[0]


def ran(module, params, x, c, segments):
    """((sum of c y, (y, aux)), gradients by (params, x))."""

    def loss(params, x):
        y, aux = module(params)(x, context(segments, np.zeros_like(segments)))
        return jnp.sum(y * c), (y, aux)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def network(x, up, down):
    """SwiGLU of rows [T D]: y, and dy -> (dx, dup, ddown)."""
    a, b = x @ up[:, 0], x @ up[:, 1]
    s = sigmoid(a)
    h = a * s * b

    def back(dy):
        dh = dy @ down.T
        da, db = dh * b * (s + a * s * (1 - s)), dh * a * s
        dx = da @ up[:, 0].T + db @ up[:, 1].T
        return dx, np.stack([x.T @ da, x.T @ db], 1), h.T @ dy

    return h @ down, back


def gated(logits, bias, router, k):
    """A token's experts and gates, and dgates -> dlogits."""
    p = np.exp(logits - logits.max())
    p = sigmoid(logits) if router == "sigmoid" else p / p.sum()
    chosen = np.argsort(-(p + bias))[:k]
    whole = router == "topk_softmax" or (router == "sigmoid" and k > 1)
    total = p[chosen].sum() if whole else 1.0
    g = p[chosen] / total

    def back(dg):
        dp = np.zeros_like(p)
        dp[chosen] = (dg - whole * dg @ g) / total
        if router == "sigmoid":
            return dp * p * (1 - p)
        return p * (dp - dp @ p)

    return chosen, g, back


def loop(params, x, c, segments, router, k, scale=1.0, keep=lambda b, t, i, e: True):
    """y and gradients of sum(c y) by name and of x, all float64, token by token.

    keep: whether choice i of the token at (b, t), expert e, is taken.
    """
    p = {name: w.astype(np.float64) for name, w in params.items()}
    x, c = x.astype(np.float64), c.astype(np.float64)
    y, dx, d = np.zeros_like(x), np.zeros_like(x), {name: np.zeros_like(w) for name, w in p.items()}
    for b, t in np.argwhere(segments):
        logits = x[b, t] @ p["router"]
        chosen, g, back = gated(logits, p["bias"], router, k)
        dg = np.zeros(k)
        for i, e in enumerate(chosen):
            if keep(b, t, i, e):
                out, through = network(x[b, t][None], p["up"][e], p["down"][e])
                y[b, t] += scale * g[i] * out[0]
                dg[i] = scale * out[0] @ c[b, t]
                own, dup, ddown = through(scale * g[i] * c[b, t][None])
                d["up"][e], d["down"][e] = d["up"][e] + dup, d["down"][e] + ddown
                dx[b, t] += own[0]
        dlogits = back(dg)
        d["router"] += np.outer(x[b, t], dlogits)
        dx[b, t] += p["router"] @ dlogits
    if "shared_up" in p:
        out, through = network(x.reshape(-1, D), p["shared_up"], p["shared_down"])
        own, d["shared_up"], d["shared_down"] = through(c.reshape(-1, D))
        y, dx = y + out.reshape(y.shape), dx + own.reshape(y.shape)
    return y, d, dx


def chosen_by(params, x, router, k):
    """Each token's experts [B L k]."""
    logits = x.astype(np.float64) @ params["router"].astype(np.float64)
    pick = lambda l: gated(l, params["bias"], router, k)[0]
    return np.apply_along_axis(pick, -1, logits)


@pytest.mark.parametrize(("router", "k"), KINDS)
def test_it_is_a_loop_over_experts(router, k):
    """Padding gets what the shared experts give and nothing else, and documents are not seen."""
    module, params, _ = made(router=router, top_k=k, shared=k - 1, scale=1.5)
    x, c, segments = rows()
    (_, (y, aux)), (grads, dx) = ran(module, params, x, c, segments)
    known, d, dx_known = loop(params, x, c, segments, router, k, 1.5)
    close(y, known)
    close(dx, dx_known)
    assert grads.keys() == d.keys()
    for name in d.keys() - {"bias"}:
        close(grads[name], d[name])
    assert np.all(np.asarray(grads["bias"]) == 0)
    assert aux["dropped"] == 0


@pytest.mark.parametrize("capacity", [0.5, 1.3])
def test_a_capacity_takes_the_first_of_a_row(capacity):
    module, params, _ = made(top_k=2, capacity=capacity)
    x, c, segments = rows()
    chosen = chosen_by(params, x, "topk_softmax", 2)
    most, held, lost = math.ceil(capacity * L * 2 / E), np.zeros((B, E), int), set()
    for b, t in np.argwhere(segments):
        for i, e in enumerate(chosen[b, t]):
            held[b, e] += 1
            lost |= {(b, t, i)} if held[b, e] > most else set()
    (_, (y, aux)), (grads, dx) = ran(module, params, x, c, segments)
    keep = lambda b, t, i, e: (b, t, i) not in lost
    known, d, dx_known = loop(params, x, c, segments, "topk_softmax", 2, keep=keep)
    assert aux["dropped"] == len(lost) > 0
    np.testing.assert_array_equal(aux["selected"], held.sum(0))
    close(y, known)
    close(dx, dx_known)
    for name in ("router", "up", "down"):
        close(grads[name], d[name])


def test_what_is_dropped_does_not_look_ahead():
    """Other inputs later in a row, and other rows, change no bit of what comes before."""
    module, params, _ = made(top_k=2, capacity=0.5)
    x, _, segments = rows()
    ctx = context(segments, np.zeros_like(segments))
    params = jax.tree.map(jnp.asarray, params)
    forward = jax.jit(lambda x: module(params)(x, ctx)[0])
    y = np.asarray(forward(jnp.asarray(x)))
    others = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    changed = 0
    for b, t in np.argwhere(segments):
        mixed = others.copy()
        mixed[b, : t + 1] = x[b, : t + 1]
        found = np.asarray(forward(jnp.asarray(mixed)))[b]
        np.testing.assert_array_equal(found[: t + 1], y[b, : t + 1])
        changed += np.any(found[t + 1 :] != y[b, t + 1 :])
    assert changed


@pytest.mark.parametrize("sizes", [dict(context=4, expert=2), dict(expert=4, tensor=2)], ids=str)
def test_what_is_dropped_is_the_same_on_eight_devices(sizes):
    """Token for token, where rows are split too."""
    module, params, entries = made(experts=8, top_k=2, capacity=0.75)
    x, _, segments = rows()

    def forward(params, x, ctx):
        return module(params)(x, ctx)

    ctx = context(segments, np.zeros_like(segments))
    y, aux = jax.jit(forward)(params, x, ctx)
    with jax.set_mesh(meshes.make(**sizes)):
        placed = {p: jax.device_put(w, spec(*entries[p].axes)) for p, w in params.items()}
        x = jax.device_put(x, spec("batch", "length", None))
        split, sums = jax.jit(forward)(placed, x, context(segments, np.zeros_like(segments)))
    close(split, y)
    assert aux["dropped"] > 0
    for name in ("selected", "dropped"):
        np.testing.assert_array_equal(sums[name], aux[name])
    for name in ("probability", "z", "entropy"):
        close(sums[name], aux[name])


@pytest.mark.parametrize("room", [0.5, 4.0])
def test_what_finds_no_room_is_lost_and_counted(room):
    """Of a device's assignments to a device, in order of expert and then token, the last."""
    module, params, entries = made(experts=8, top_k=2, room=room)
    x, c, segments = rows()
    chosen, shards = chosen_by(params, x, "topk_softmax", 2), 4
    most, lost = math.ceil(room * (B // shards) * L * 2 / shards), set()
    for shard in range(shards):
        held = np.zeros(shards, int)
        mine = [(e, b, t, i) for b, t, i in np.ndindex(chosen.shape) for e in [chosen[b, t, i]]]
        mine = [x for x in sorted(mine) if x[1] // (B // shards) == shard and segments[x[1], x[2]]]
        for e, b, t, i in mine:
            to = e // (8 // shards)
            held[to] += 1
            lost |= {(b, t, i)} if held[to] > most else set()
    keep = lambda b, t, i, e: (b, t, i) not in lost
    known, d, dx_known = loop(params, x, c, segments, "topk_softmax", 2, keep=keep)
    with jax.set_mesh(meshes.make(jax.devices()[:4], expert=4)):
        placed = {p: jax.device_put(w, spec(*entries[p].axes)) for p, w in params.items()}
        put = lambda x: jax.device_put(x, spec("batch", "length", None))
        (_, (y, aux)), (grads, dx) = ran(module, placed, put(x), put(c), segments)
    assert aux["dropped"] == len(lost)
    assert (len(lost) > 0) == (room < 4)
    close(y, known)
    close(dx, dx_known)
    for name in ("router", "up", "down"):
        close(grads[name], d[name])


SIZES = dict(vocab=29, length=L, d_model=16, mixers={"attention": {"heads": 2}}, ffn="moe")
MOE = dict(experts=E, width=8, top_k=2)


def lm(**changes):
    own = MOE | changes.pop("own", {})
    return build(**(SIZES | changes), ffns={"moe": own})


def tokens():
    inputs = np.random.default_rng(1).integers(0, 29, (B, L), dtype=np.int32)
    return jnp.asarray(inputs), *packed(LAYOUT, L)


def products(jaxpr):
    """Every dot_general of a jaxpr, inside others too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from products(inner)


def test_logits_and_gates_stay_float32_in_a_bfloat16_model():
    """Also on a TPU, which makes bfloat16 of a float32 product's factors unless told otherwise."""
    built = lm(own=dict(experts=5, top_k=3), layers=3, prefix=("attention",))
    inputs, segments, positions = tokens()

    def forward(params):
        ctx = context(segments, positions, dtype="bfloat16")
        return built.model(params)(inputs, ctx)

    jaxpr = jax.make_jaxpr(forward)(built.params).jaxpr
    routers = [found.aval for found in find(jaxpr) if found.name == "router"]
    assert [x.dtype for x in routers] == [jnp.float32] * 2  # one in the scan, one before it
    exact = (jax.lax.Precision.HIGHEST,) * 2
    of_router = lambda eqn: eqn.invars[1].aval.shape == (16, 5)
    of_gates = lambda eqn: (B * L, 3) in [x.aval.shape for x in eqn.invars]
    for of in (of_router, of_gates):
        found = [eqn for eqn in products(jaxpr) if of(eqn)]
        assert len(found) == 2
        for eqn in found:
            assert {x.aval.dtype for x in eqn.invars} == {jnp.dtype("float32")}
            assert eqn.params["precision"] == exact


def test_logits_that_are_alike_in_bfloat16_are_told_apart():
    """Columns v (1 + 2^-12) against v, and for tokens of the other side -v (1 + 2^-12)."""
    built = lm(own=dict(top_k=1, router="softmax"), layers=1)
    v = np.random.default_rng(3).normal(size=16)
    columns = np.stack([v, v * (1 + 2**-12), -v, -v * (1 + 2**-12)], 1)
    params = built.params | {"blocks/0/ffn/router": np.float32(columns)[None]}
    params["blocks/0/ffn/bias"] = np.zeros((1, 4), np.float32)
    inputs, segments, positions = tokens()
    ctx = context(segments, positions, dtype="bfloat16")
    _, aux = jax.jit(lambda params: built.model(params)(inputs, ctx))(params)
    (selected,) = np.asarray(aux["blocks/0/ffn/selected"])
    assert selected[0] == selected[2] == 0
    assert selected[1] + selected[3] == np.count_nonzero(segments)


def trained(**changes):
    """(sum over logits, aux), gradients."""
    built = lm(own=dict(capacity=1.0), **changes)
    inputs, segments, positions = tokens()
    ctx = context(segments, positions)

    def loss(params):
        logits, aux = built.model(params)(inputs, ctx)
        taken = jnp.take_along_axis(logits, inputs[..., None], -1)
        return jnp.sum(taken) + jnp.sum(jnp.square(aux["blocks/0/ffn/probability"])), aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(built.params)


def test_remat_changes_nothing():
    (value, aux), grads = trained(remat="full")
    (known, aux_known), grads_known = trained()
    close(value, known)
    assert np.sum(aux["blocks/0/ffn/dropped"]) > 0
    for name, total in aux_known.items():
        close(aux[name], total)
    for path, gradient in grads_known.items():
        if not path.endswith("ffn/bias"):  # no gradient
            close(grads[path], gradient)


def test_stacked_layers_are_layers_of_their_own():
    stacked, each = lm(), lm(prefix=("attention",) * 2)
    params = dict(stacked.params)
    for path in [path for path in params if path.startswith("blocks/0/")]:
        for i, part in enumerate(params.pop(path)):
            params[path.replace("blocks/0", f"prefix/{i}")] = part
    assert params.keys() == each.params.keys()
    inputs, segments, positions = tokens()
    ctx = context(segments, positions)
    logits, aux = jax.jit(lambda p: stacked.model(p)(inputs, ctx))(stacked.params)
    alone, by_layer = jax.jit(lambda p: each.model(p)(inputs, ctx))(params)
    close(logits[..., :29], alone[..., :29])
    for name, shape in dict(selected=(E,), probability=(E,), z=(), entropy=(), dropped=()).items():
        layers = [by_layer[f"prefix/{i}/ffn/{name}"] for i in range(2)]
        assert layers[0].shape == shape
        np.testing.assert_allclose(aux[f"blocks/0/ffn/{name}"], np.stack(layers), rtol=1e-5)


def test_a_start_is_drawn_for_each_layer_and_expert_by_its_own_fan_in():
    dims = Dims(d_model=32, length=L, n_layers=2, base_d_model=32)
    make = lambda key: FFN(dims, rngs=nnx.Rngs(key), experts=E, width=48, shared=2)
    drawn = jax.jit(jax.vmap(lambda key: nnx.state(make(key))))(
        jax.random.split(jax.random.key(0), 3)
    )
    sizes = dict(up=32, down=48 * 4, router=32, shared_up=32, shared_down=96 * 4)
    for name, inverse in sizes.items():
        w = np.asarray(drawn[name][...])
        # Of at least 3 x 128 numbers: four deviations of their spread.
        np.testing.assert_allclose(w.std() * np.sqrt(inverse), 1, atol=4 / np.sqrt(2 * w.size))
        matrices = w.reshape(-1, *w.shape[2:]) if name in ("up", "down") else w
        flat = matrices.reshape(len(matrices), -1)
        assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.35
    assert np.all(drawn["bias"][...] == 0)


def test_prefill_and_decode_equal_one_pass():
    """Ragged prompts, then one token a time."""
    built, prompts = lm(own=dict(shared=1, router="sigmoid")), np.array([3, 8, 1, 5])
    inputs, at = tokens()[0], np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    run = lambda p, inputs, *where: built.model(p)(inputs, context(*where))[0]
    whole = np.asarray(jax.jit(run)(built.params, inputs, np.ones_like(at), at))[..., :29]
    inside = np.int32(at < prompts[:, None])

    @jax.jit
    def prefill(params):
        model = built.model(params)
        ctx = context(inside, at * inside)
        return model.prefill(jnp.where(inside, inputs, 7), ctx, model.init_cache(B, L, "float32"))

    @jax.jit
    def decode(params, token, position, cache):
        ctx = context(jnp.ones_like(position), position)
        return built.model(params).decode(token, ctx, cache)

    logits, cache = prefill(built.params)
    for row, size in enumerate(prompts):
        close(logits[row, :size, :29], whole[row, :size])
    every = np.arange(B)
    for offset in range(4):
        at = (prompts + offset).astype(np.int32)
        logits, cache = decode(built.params, inputs[every, at][:, None], at[:, None], cache)
        close(logits[:, 0, :29], whole[every, at])


def test_a_decoding_step_runs_where_rows_are_split():
    """A row of one token is on one device of mesh.context, and drops nothing."""
    module, params, entries = made(top_k=2, capacity=1.0)
    x, _, _ = rows()
    step = lambda params, x, ctx: module(params)(x, ctx)
    segments = jnp.ones((B, 1), jnp.int32)
    ctx = Context(positions=segments - 1, segment_ids=segments, decoding=True)
    y, _ = jax.jit(step)(params, x[:, :1], ctx)
    with jax.set_mesh(meshes.make(context=2, expert=2, tensor=2)):
        placed = {p: jax.device_put(w, spec(*entries[p].axes)) for p, w in params.items()}
        put = lambda x: jax.device_put(x, spec("batch", *[None] * (x.ndim - 1)))
        split, aux = jax.jit(step)(placed, put(x[:, :1]), jax.tree.map(put, ctx))
    close(split, y)
    assert aux["dropped"] == 0


@pytest.mark.parametrize("width", [64, 96, 256, 2048])
@pytest.mark.parametrize(("k", "shared"), [(1, 0), (2, 0), (2, 1), (6, 2), (8, 0)])
def test_a_token_costs_what_it_does_in_the_dense_network(width, k, shared):
    """Its experts' matrix products, their widths rounded up to a multiple of 64, beside routing."""
    dims = Dims(d_model=width, length=L, n_layers=2, base_d_model=width)
    segments = packed(LAYOUT, L)[0]

    def cost(of, **own):
        forward = lambda x: of(dims, rngs=nnx.Rngs(0), **own)(x, context(segments, segments))[0]
        work = flops.count(forward, jax.ShapeDtypeStruct((B, L, width), jnp.float32))
        assert not work.unknown
        return work.matmul / (B * L)

    own = dict(experts=16, top_k=k, shared=shared, router="softmax", implementation="reference")
    routing = 2 * width * (16 + k)  # logits, and gates times outputs
    rounding = 2 * 3 * width * 64
    assert -rounding < cost(FFN, **own) - routing - cost(Dense) < (k + shared) * rounding


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (dict(router="soft"), "moe's router is 'soft'; known: softmax, topk_softmax, sigmoid"),
        (dict(top_k=0), "moe's top_k is 0; it must be from 1 to its 4 experts"),
        (dict(top_k=5), "moe's top_k is 5; it must be from 1 to its 4 experts"),
        (dict(experts=0), "moe's top_k is 2; it must be from 1 to its 0 experts"),
        (dict(top_k=1), "'topk_softmax' gives one expert the constant weight 1, .* take router"),
        (dict(shared=-1), "moe's shared is -1; it must be 0 or more experts"),
        (dict(capacity=0.0), "moe's capacity is 0.0; it must be above 0, or none"),
        (dict(room=-1.0), "moe's room is -1.0; it must be above 0, or none"),
    ],
)
def test_refusals(own, expected):
    with pytest.raises(ValueError, match=expected) as error:
        made(**own)
    assert "\n" not in str(error.value)
    assert not str(error.value).endswith(".")
