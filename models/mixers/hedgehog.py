"""Hedgehog: linear attention whose learned feature map imitates softmax.

Hedgehog (arXiv 2402.04347): `o_i = sum_{j <= i} a_ij v_j / sum_{j <= i} a_ij`, `a_ij = phi_q(q_i) .
phi_k(k_j)`, with a map a head, z = x W, applied after the rotary positions and starting as the
identity. Three published forms are different models:

- 'paper'    phi = [exp z, exp -z] (section 4.2), |z| bounded by 20
- 'lolcats'  phi = [softmax z, softmax -z] (LoLCATs, arXiv 2410.10254, its released code)
- 'fla'      phi = softmax [2z, -2z], z = x W + b, one W and b for all heads
             (flash-linear-attention)

With a window w, LoLCATs' hybrid: `y_i = (sum_{i-w < j <= i} g e^(s_ij - c_i) v_j + sum_{j <= i-w}
a_ij v_j) / (the same without v)`, s = q.k / sqrt(K), c_i the window's largest s_ij, which is part
of the model, and g = sigmoid(mix), a head's, 0.1 at the start.

Deviation: with grouped queries a key head has one map for its group (LoLCATs repeats keys first),
so that the decoding state is one a key head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models import band, ring, transfer
from models.context import Context
from models.param import Dims, param
from models.projections import Heads
from models.recurrent import LinearMixer
from pallas_kernels.linear_attention import State
from parallel.halo import halo
from parallel.rules import spec

FORMS = {"paper": "exp", "lolcats": "softmax", "fla": "joint"}
MIX = -2.1972246  # log(0.1 / 0.9): g = 0.1
# What counts of a window and of what lies before it; an ablation leaves one of them out.
BRANCHES = {"both": (1.0, 1.0), "window": (1.0, 0.0), "linear": (0.0, 1.0)}

CASES = (
    {"form": "paper", "heads": 4, "kv_heads": 2},
    {"form": "fla", "rope": False, "bias": True},
    {"width": 4, "window": 5, "kv_heads": 2},
    {"window": 7, "qk_norm": True},
    {"window": 5, "branches": "window"},
    {"window": 5, "branches": "linear"},
)


class Mixer(LinearMixer):
    """heads: H query heads over kv_heads (G, H when None) of head_dim (K, D / H when None).

    form: 'paper', 'lolcats' or 'fla', see above.  width: f of the maps, K when None; features are
    2 f.  window: tokens that softmax attention weighs, None for none.  branches: what counts of a
    hybrid, 'both', 'window' or 'linear'; a query that then sees nothing gets 0.  implementation:
    of the kernel, None lets the platform decide.
    """

    def __init__(
        self,
        dims: Dims,
        *,
        rngs: nnx.Rngs,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        form: str = "lolcats",
        width: int | None = None,
        window: int | None = None,
        branches: str = "both",
        rope: bool = True,
        rope_base: float = 10000.0,
        rope_scaling: str = "none",
        rope_factor: float = 1.0,
        rope_original_length: int = 8192,
        qk_norm: bool = False,
        bias: bool = False,
        implementation: str | None = None,
    ):
        if form not in FORMS:
            raise ValueError(f"form {form!r} of Hedgehog is unknown; known: {', '.join(FORMS)}")
        if width is not None and width < 1:
            raise ValueError(f"width of the maps is {width} and must be at least 1")
        if window is not None and window < 1:
            raise ValueError(f"window counts tokens, one's own included: {window} is less than 1")
        if branches not in BRANCHES:
            raise ValueError(f"branches {branches!r} are unknown; known: {', '.join(BRANCHES)}")
        if window is None and branches != "both":
            raise ValueError(f"branches {branches!r} are those of a hybrid; give it a window")
        sizes = Heads.of(dims, heads, kv_heads, head_dim)
        scaling = (rope_base, rope_scaling, rope_factor, rope_original_length) if rope else None
        super().__init__(dims, sizes, rngs=rngs, scaling=scaling, qk_norm=qk_norm, bias=bias)
        self.form, self.f = FORMS[form], sizes.K if width is None else width
        self.implementation = implementation
        self.window, self.branches, shared = window, BRANCHES[branches], form == "fla"
        maps = dict(fan_in=(1,), fan_out=(2,), stack=(0,), init=("identity",), decay=False)
        vector = dict(decay=False, group="bias")
        for name, heads in (("q", sizes.H), ("k", sizes.G)):
            n, axis = (1, None) if shared else (heads, "heads")
            weight = param(rngs, (n, sizes.K, self.f), (axis, None, None), **maps)
            setattr(self, f"{name}_map", weight)
            if shared:
                setattr(self, f"{name}_map_bias", param(rngs, (1, self.f), (None, None), **vector))
        if window is not None:
            mix = dict(init=("constant", MIX), **vector)
            self.mix = param(rngs, (sizes.H,), ("heads",), **mix)

    def maps(self) -> dict:
        each = lambda w, heads: jnp.broadcast_to(
            w, (heads, *w.shape[1:]), out_sharding=spec("heads", *[None] * (w.ndim - 1))
        )
        return {
            f"{name}_{part}": each(weight[...], heads)
            for name, heads in (("q", self.heads.H), ("k", self.heads.G))
            for part, weight in self._own(name)
        }

    def _own(self, name: str):
        yield "map", getattr(self, f"{name}_map")
        if hasattr(self, f"{name}_map_bias"):
            yield "bias", getattr(self, f"{name}_map_bias")

    def attend(self, q, k, v, ctx: Context, state: State | None = None) -> tuple[Array, State]:
        if self.window is None:
            return super().attend(q, k, v, ctx, state)
        rows, shared = (self.tempered(q), ctx.segment_ids), (k, v, ctx.segment_ids)
        near, (k, v, left) = halo(_near, min(self.window, q.shape[1]))(rows, shared)
        # What leaves the window where the row has ended has not left it.
        left = jnp.where(ctx.valid, left, 0)
        far = self.weigh(q, k, v, ctx.segment_ids, left)
        return self._join(near, *far[:2]).astype(q.dtype), far[2]

    def _join(self, near: band.Terms, o, total):
        (num, weight), g = near, self._gate().reshape(1, 1, -1)
        total = self.branches[1] * total
        both = g * weight + total
        o = g[..., None] * num + total[..., None] * o.astype(jnp.float32)
        return o / jnp.where(both > 0, both, 1.0)[..., None]

    def _gate(self) -> Float[Array, "H"]:
        """g of the window, of which nothing depends on mix where a branch is alone."""
        nearby, before = self.branches
        mixed = jax.nn.sigmoid(self.mix[...])
        return mixed if nearby and before else jnp.full_like(mixed, nearby)

    def weights(self, q, k) -> transfer.Student:
        far = super().weights(q, k)
        if self.window is None:
            return far
        G, R = k.shape[2], q.shape[2] // k.shape[2]

        def student(s, distance, rows):
            inside = ((distance >= 0) & (distance < self.window))[None, None, None]
            peak = jnp.max(jnp.where(inside, s, transfer.FLOOR), -1, keepdims=True)
            g = self._gate().reshape(
                1, G, R, 1, 1, out_sharding=spec(None, "heads", None, None, None)
            )
            near = g * jnp.exp(jnp.minimum(s - peak, 0.0))
            return jnp.where(inside, near, self.branches[1] * far(s, distance, rows))

        return student

    def masked_flops(self, length: int) -> float:
        """As said there; a window's blocks hold twice the pairs that it sees."""
        wasted = 0 if self.window is None else min(self.window, length)
        return super().masked_flops(length) + 4 * self.heads.H * self.heads.K * wasted

    def state_size(self, length: int) -> int:
        own = 0 if self.window is None else min(self.window, length)
        return super().state_size(length) + 2 * self.heads.G * self.heads.K * own

    def init_cache(self, B: int, length: int, dtype: str) -> dict[str, Array]:
        cache = super().init_cache(B, length, dtype)
        if self.window is None:
            return cache
        shape = (B, min(self.window, length), self.heads.G, self.heads.K)
        layout = spec("batch", None, "heads", None)
        return cache | {n: jnp.zeros(shape, dtype, out_sharding=layout) for n in ("k", "v")}

    def prefill(self, x: Float[Array, "B L D"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        if self.window is None:
            return super().prefill(x, ctx, cache)
        q, k, v = self.project(x, ctx)
        o, state = self.attend(q, k, v, ctx)
        slots = {n: cache[n] for n in ("k", "v")}
        slots = ring.fill(slots, {"k": k, "v": v}, jnp.sum(ctx.valid, 1) - 1)
        return self.write(o, ctx), {"values": state.values, "keys": state.keys, **slots}

    def decode(self, x: Float[Array, "B 1 D"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        if self.window is None:
            return super().decode(x, ctx, cache)
        q, k, v = self.project(x, ctx)
        now, segments = ctx.positions[:, 0], ctx.segment_ids
        slots = {n: cache[n] for n in ("k", "v")}
        leaving = {n: slot.astype(k.dtype) for n, slot in ring.take(slots, now).items()}
        T = slots["k"].shape[1]
        left = jnp.where((now >= T)[:, None], segments, 0)
        state = State(cache["values"], cache["keys"], segments[:, 0])
        o, total, state = self.weigh(q, leaving["k"], leaving["v"], segments, left, state)
        slots = ring.put(slots, {"k": k, "v": v}, now)
        near = band.of_ring(self.tempered(q), slots, ring.held(now, T) >= 0)
        o = self._join(near, o, total).astype(q.dtype)
        return self.write(o, ctx), {"values": state.values, "keys": state.keys, **slots}


def _near(rows, extended) -> tuple[band.Terms, tuple]:
    """The window's terms, and keys, values and segments as they leave it."""
    (q, segments), (k, v, around) = rows, extended
    leaving = tuple(x[:, : q.shape[1]] for x in extended)
    return band.terms(q, k, v, segments, around), leaving
