"""The peer: a decoder's training step in bare JAX, as one writes it without Meshwork.

A dict of arrays, no flax, no mesh, one device. The mathematics is that of the quickstart (Llama,
arXiv 2302.13971, with a tied head), the attention kernel and the batches are Meshwork's. What
deserves to be fast is: matrices are fused, rotary angles are computed once for all layers, the
layers run in one scan, parameters are donated.

As a script, `python -m launch.bench.bare CONFIG.json`, it takes the first step and says when.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.flash_attention import flash_attention

DECAYED = ("tokens", "q", "kv", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class Model:
    """vocab: rows of the embedding that are tokens, of `rows` in all. width: D, hidden: F."""

    vocab: int
    rows: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    eps: float
    rope_base: float
    dtype: str


def of_config(config: Mapping, vocab: int, rows: int) -> Model:
    """The model of a resolved configuration, with `rows` rows of embeddings."""
    model = config["model"]
    mixer, D = model["mixers"]["attention"], model["d_model"]
    return Model(
        vocab=vocab,
        rows=rows,
        width=D,
        layers=model["layers"],
        heads=mixer["heads"],
        kv_heads=mixer["kv_heads"] or mixer["heads"],
        head_dim=mixer["head_dim"] or D // mixer["heads"],
        hidden=model["ffns"]["swiglu"]["width"] or -(-8 * D // (3 * 64)) * 64,
        eps=model["norm_eps"],
        rope_base=mixer["rope_base"],
        dtype=model["dtype"],
    )


def init(key: jax.Array, m: Model) -> dict:
    """Parameters: matrices with standard deviation 1 / sqrt(fan-in), residual ones less."""
    N, D, F = m.layers, m.width, m.hidden
    H, G = m.heads * m.head_dim, m.kv_heads * m.head_dim
    less = (2 * N) ** -0.5
    normal = lambda i, std, *shape: std * jax.random.normal(jax.random.fold_in(key, i), shape)
    return {
        "tokens": normal(0, D**-0.5, m.rows, D),
        "q": normal(1, D**-0.5, N, D, H),
        "kv": normal(2, D**-0.5, N, D, 2 * G),
        "out": normal(3, less * H**-0.5, N, H, D),
        "up": normal(4, D**-0.5, N, D, 2 * F),
        "down": normal(5, less * F**-0.5, N, F, D),
        "norm_1": jnp.ones((N, D)),
        "norm_2": jnp.ones((N, D)),
        "final_norm": jnp.ones(D),
    }


def loss(params: dict, batch: dict, m: Model) -> jax.Array:
    """Mean cross-entropy of the batch's targets, fields `[B L]`."""
    B, L = batch["inputs"].shape
    freq = m.rope_base ** (-jnp.arange(0, m.head_dim, 2, dtype=jnp.float32) / m.head_dim)
    angle = batch["positions"][..., None, None].astype(jnp.float32) * freq[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    layers = {name: p for name, p in params.items() if name not in ("tokens", "final_norm")}

    def layer(x, p):
        p = {name: a.astype(m.dtype) if name in DECAYED else a for name, a in p.items()}
        h = rms_norm(x, p["norm_1"], m.eps)
        q = rotate((h @ p["q"]).reshape(B, L, m.heads, m.head_dim), cos, sin)
        kv = (h @ p["kv"]).reshape(B, L, 2, m.kv_heads, m.head_dim)
        k, v = rotate(kv[:, :, 0], cos, sin), kv[:, :, 1]
        segments = batch["segments"]
        o = flash_attention(q, k, v, q_segments=segments, kv_segments=segments)
        x = x + o.reshape(B, L, -1) @ p["out"]
        gate, up = jnp.split(rms_norm(x, p["norm_2"], m.eps) @ p["up"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ p["down"], None

    table = params["tokens"].astype(m.dtype)
    x, _ = jax.lax.scan(layer, table[batch["inputs"]], layers)
    x = rms_norm(x, params["final_norm"], m.eps)
    logits = jnp.matmul(x, table.T, preferred_element_type=jnp.float32)
    if m.rows > m.vocab:
        logits = jnp.where(jnp.arange(m.rows)[None, None] < m.vocab, logits, -jnp.inf)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(batch["weights"] * nll) / jnp.sum(batch["weights"])


def rms_norm(x, scale, eps):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * scale[None, None]).astype(x.dtype)


def rotate(x, cos, sin):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def optimizer(config: Mapping) -> optax.GradientTransformation:
    """Clipped AdamW with warm-up, stable, 1-sqrt decay; the first step is number 1."""
    optim, steps = config["optim"], config["steps"]
    warmup, tail = optim["warmup_fraction"] * steps, optim["schedules"]["wsd"]["decay_fraction"]

    def lr(count):
        now = count + 1.0
        done = jnp.clip(1 - (steps - now) / (tail * steps), 0.0, 1.0)
        return optim["lr"] * jnp.minimum(now / warmup, 1.0) * (1 - jnp.sqrt(done))

    decayed = lambda params: {name: name in DECAYED for name in params}
    own = optim["methods"]["adamw"] | {"weight_decay": optim["weight_decay"], "mask": decayed}
    return optax.chain(optax.clip_by_global_norm(optim["clip"]), optax.adamw(lr, **own))


def make_step(m: Model, tx: optax.GradientTransformation) -> Callable:
    """step(params, opt, batch) -> (params, opt, loss, norm of the gradient); donates its state."""

    def step(params, opt, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch, m)
        updates, opt = tx.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, value, optax.tree.norm(gradient)

    return jax.jit(step, donate_argnums=(0, 1))


def fields(batch) -> dict:
    """A Batch `[1 B L]` of one micro-batch as the dict that `loss` reads."""
    names = {"segment_ids": "segments"}
    used = ("inputs", "targets", "weights", "segment_ids", "positions")
    return {names.get(name, name): getattr(batch, name)[0] for name in used}


def from_flat(flat: Mapping, m: Model) -> dict:
    """Meshwork's parameters `{path: array}` as this file's; embeddings cut to `m.rows`."""
    names = {
        "q": "blocks/0/mixer/q",
        "kv": "blocks/0/mixer/kv",
        "out": "blocks/0/mixer/out",
        "up": "blocks/0/ffn/up",
        "down": "blocks/0/ffn/down",
        "norm_1": "blocks/0/norms/0/scale",
        "norm_2": "blocks/0/norms/1/scale",
    }
    like = jax.eval_shape(lambda: init(jax.random.key(0), m))
    params = {name: jnp.reshape(flat[path], like[name].shape) for name, path in names.items()}
    tokens, final = jnp.array(flat["tokens"][: m.rows]), jnp.array(flat["final_norm/scale"])
    return params | {"tokens": tokens, "final_norm": final}


def main() -> None:
    import json
    import sys
    import time

    import data.pipeline

    said = {"imported": time.time()}
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)
    corpus = data.pipeline.build(seed=config["seed"], **config["data"])
    vocab = config["model"]["vocab"] or corpus.vocab_size
    m, tx = of_config(config, vocab, vocab), optimizer(config)
    params = jax.jit(init, static_argnums=1)(jax.random.key(config["seed"]), m)
    opt = tx.init(params)
    said["built"] = time.time()
    *_, value, _ = make_step(m, tx)(params, opt, fields(corpus.batch(0)))
    print(json.dumps(said | {"loss": float(value), "stepped": time.time()}))


if __name__ == "__main__":
    main()
