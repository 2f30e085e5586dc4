"""Mixture of experts: each token goes through the top k of E SwiGLU networks (arXiv 2101.03961).

y = sum_i g_i FFN_i(x) over the experts i that x's router chooses, plus shared experts that take
every token (DeepSeekMoE, arXiv 2401.06066). Routers, with logits x W in float32:

- 'topk_softmax': g is the softmax over the logits of the chosen (Mixtral, arXiv 2401.04088), which
  equals their probabilities made to sum to 1;
- 'softmax': g are the probabilities themselves, whose sum is below 1 (Switch, OLMoE);
- 'sigmoid': s = sigmoid(logits), g = s / sum of the chosen s (DeepSeek-V3, arXiv 2412.19437); with
  top_k 1, g = s.

Dropless unless `capacity` is given: then of a row of L tokens an expert takes the first
ceil(capacity L k / E) that choose it and the others lose it (GShard, arXiv 2006.16668, with a row
for its group), so that what is dropped depends on the row alone, not on how the batch is split,
its packed documents together. Evaluation drops as training does; a prompt is its own row, rounded
up in length, and decoding drops nothing, so that text is not written by quite the same function.

How the experts are kept equally busy is the training's decision, see training/balances. The bias
that one of its methods moves is added to the scores for the choice alone, and stays where a run
goes on, or another begins with it, under a method that moves none. A run may begin with the weights
of one whose layers have dense networks, see `FFN.adopt`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from models.context import Context
from models.param import Dims, param
from models.routing import ROUTERS, Route, route
from pallas_kernels.grouped_matmul import grouped_matmul
from parallel.expert import exchange
from parallel.manual import manual
from parallel.named import named
from parallel.rules import MESH_AXES, RULES, constrain, spec

CASES = (
    {"experts": 4, "top_k": 1, "router": "softmax", "shared": 1},
    {"router": "sigmoid", "scale": 2.5},
    {"capacity": 1.0},
)


class FFN(nnx.Module):
    """experts: E.  top_k: k, the experts a token goes to.

    width: F of one expert; None divides a dense SwiGLU's 8/3 D over a token's experts, shared ones
      included, rounded up to a multiple of 64: the FLOPs of a token are those of the dense layer.
      Fine-grained experts are many narrow ones.
    shared: experts that every token goes to.  scale: factor of the gates.
    capacity: see above, None is dropless.
    room: rows that a device may send to another for its experts, as a multiple of their number in
      perfect balance; None is enough for any routing, and takes most memory where experts are
      spread over devices. What finds no room is lost, which is counted with what is dropped.
    method: of exchange between devices, see parallel.expert.  implementation: of the products.

    Reports float32 sums over valid tokens: `selected [E]`, tokens that chose an expert;
    `probability [E]`; `z`, squares of the logits' logsumexp; `entropy`, nats, of the router;
    `dropped`, assignments lost. By ctx.group `group_selected [G E]` and `group_probability [G E]`.
    With the tap 'routing' `together [E E]`, tokens that chose both, and `domains [K E]`.
    """

    def __init__(
        self,
        dims: Dims,
        *,
        rngs: nnx.Rngs,
        experts: int = 8,
        top_k: int = 2,
        width: int | None = None,
        shared: int = 0,
        router: str = "topk_softmax",
        scale: float = 1.0,
        capacity: float | None = None,
        room: float | None = None,
        method: str | None = None,
        implementation: str | None = None,
    ):
        _check(experts, top_k, width, shared, router, capacity, room)
        D, E = dims.d_model, experts
        F = width or _multiple(8 * D / 3 / (top_k + shared))
        self.top_k, self.kind, self.scale, self.capacity = top_k, router, scale, capacity
        self.room, self.method, self.implementation = room, method, implementation
        fans = dict(fan_in=(0,), fan_out=(1,), group="router")
        self.router = param(rngs, (D, E), ("embed", None), init=dims.normal(D, few=True), **fans)
        self.bias = param(rngs, (E,), (None,), decay=False, group="state")
        up = dict(fan_in=(1,), fan_out=(3,), stack=(0, 2), init=dims.normal(D))
        self.up = param(rngs, (E, D, 2, F), ("experts", "embed", None, "ffn"), **up)
        down = dict(fan_in=(1,), fan_out=(2,), stack=(0,), init=dims.normal(F, residual=True))
        self.down = param(rngs, (E, F, D), ("experts", "ffn", "embed"), **down)
        S = shared * F
        up = dict(fan_in=(0,), fan_out=(2,), stack=(1,), init=dims.normal(D))
        down = dict(fan_in=(0,), fan_out=(1,), init=dims.normal(S or 1, residual=True))
        self.shared_up = param(rngs, (D, 2, S), ("embed", None, "ffn"), **up) if S else None
        self.shared_down = param(rngs, (S, D), ("ffn", "embed"), **down) if S else None

    @property
    def alone(self) -> bool:
        """Whether a token's output depends on that token alone."""
        return self.capacity is None and self.room is None

    def __call__(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L D"], dict]:
        E, (_, L, _) = self.router.shape[-1], x.shape
        most = self.capacity and math.ceil(self.capacity * L * self.top_k / E)
        own = dict(router=self.kind, top_k=self.top_k, scale=self.scale, capacity=most)
        logits = jnp.einsum(
            "bld,de->ble", x.astype(jnp.float32), self.router[...], precision="highest"
        )
        logits = named(logits, "router", "batch", "length", None)
        routed, aux = route(logits, self.bias[...], ctx, **own)
        y, lost = self._routed(x, routed, most, ctx)
        aux["dropped"] = aux["dropped"] + jnp.sum(lost.astype(jnp.float32))
        return y if self.shared_up is None else y + self._shared(x, ctx), aux

    def _shared(self, x, ctx):
        """What the experts of every token give, [B L D], as one wide SwiGLU."""
        up, down = (w[...].astype(x.dtype) for w in (self.shared_up, self.shared_down))
        h = jnp.einsum("bld,dsf->blsf", x, up)
        h = named(jax.nn.silu(h[:, :, 0]) * h[:, :, 1], "ffn_hidden", "batch", "length", "ffn")
        return jnp.einsum("blf,fd->bld", h, down, out_sharding=ctx.stream)

    def adopt(self, ffn: str, given: Mapping, own: Mapping) -> tuple[Callable, str]:
        """How experts begin as copies of a dense SwiGLU (arXiv 2212.05055), see training/start.py.

        Experts of its whole width are copies. Those of a G-th of it are copies of its G slices
        (fine-grained up-cycling, arXiv 2410.07524): the first `shared` mod G slices are the shared
        experts' alone, and the E experts form groups of one for each of the R other slices, whose
        router columns begin equal, so that a token goes to whole groups; R divides top_k and E.
        The router is drawn as usual, one column a group.

        All copies of a slice that a token goes to, shared ones included, count alike and 1
        together, by a factor on `down`. So the output is the dense network's where the sum of
        gates is fixed ('topk_softmax'; 'sigmoid' with top_k of 2 or more) and nothing is dropped.
        For other routers the factor is that of even gates, and the output roughly the same.
        """
        if ffn != "swiglu" or given.keys() != {"up", "down"}:
            biases = " with biases" if "up_bias" in given else ""
            raise ValueError(
                f"moe's experts begin as copies of a swiglu network without biases, and that run "
                f"has {ffn}{biases}; begin with such a run, or with one of moe of the same sizes"
            )
        (wide, D), (E, F, here) = given["down"], own["down"]
        if here != D:
            raise ValueError(f"d_model is {D} there and {here} here; make it the same")
        if wide % F:
            raise ValueError(
                f"moe's experts are {F} wide and cannot be slices of that run's networks, which "
                f"are {wide} wide; set model.ffns.moe.width to {wide} or to what divides it"
            )
        shared = own["shared_down"][0] // F if "shared_down" in own else 0
        cut = _Slices(wide // F, E, self.top_k, shared)
        fixed = self.kind == "topk_softmax" or (self.kind == "sigmoid" and self.top_k > 1)
        gates = self.scale * (1 if fixed else 0.5 if self.kind == "sigmoid" else self.top_k / E)
        make = lambda given, drawn: cut.experts(given, drawn["router"], gates) | cut.shares(given)
        same = "the same" if self.alone else "the same but for what is dropped"
        roughly = f"roughly the same, as gates of router {self.kind!r} have no fixed sum"
        return make, f"{cut.told}; the output stays {same if fixed else roughly}"

    def _routed(self, x, routed: Route, most: int | None, ctx):
        """What the chosen experts give together, [B L D], and which assignments were lost."""
        weights = [w[...].astype(x.dtype) for w in (self.up, self.down)]
        if jax.sharding.get_abstract_mesh().empty:
            return self._on_a_shard(x, *routed, *weights, most=most, axis=None)
        rows = P(RULES["batch"], None if ctx.decoding else RULES["length"], None)
        specs = rows, rows, rows, P("expert", None, None, "tensor"), P("expert", "tensor", None)
        run = functools.partial(self._on_a_shard, most=most, axis="expert")
        return manual(run, MESH_AXES, specs, (rows, rows))(x, *routed, *weights)

    def _on_a_shard(self, x, chosen, gates, up, down, *, most, axis):
        b, L, D = x.shape
        k, E = self.top_k, self.router.shape[-1]
        shards = 1 if axis is None else jax.lax.axis_size(axis)
        # With a capacity no more than that can be sent, which saves memory and loses nothing.
        room = most and b * E // shards * most
        room = math.ceil(self.room * b * L * k / shards) if self.room else room
        op = lambda rows, sizes: self._experts(rows, sizes, up, down)
        flat = chosen.reshape(b * L, k)
        y, lost = exchange(
            op, x.reshape(b * L, D), flat, E, axis=axis, room=room, method=self.method
        )
        gates = gates.reshape(b * L, k)
        # A TPU would round float32 gates to bfloat16.
        y = jnp.einsum("tkd,tk->td", y.astype(jnp.float32), gates, precision="highest")
        y = y.astype(x.dtype)
        y = y if axis is None else jax.lax.psum(y, "tensor")
        return y.reshape(b, L, D), lost.reshape(b, L, k)

    def _experts(self, rows, sizes, up, down):
        """rows [Q D] in the experts' order through their networks, [Q D]."""
        E, D, _, F = up.shape
        product = lambda x, w: grouped_matmul(x, w, sizes, implementation=self.implementation)
        h = product(rows, up.reshape(E, D, 2 * F)).reshape(-1, 2, F)
        return product(jax.nn.silu(h[:, 0]) * h[:, 1], down)


@dataclasses.dataclass(frozen=True)
class _Slices:
    """G slices of a dense network for E experts, of which a token goes to k, and s shared ones."""

    G: int
    E: int
    k: int
    s: int

    def __post_init__(self):
        if self.E % self.R or self.k % self.R:
            raise ValueError(
                f"moe's experts are slices of that run's networks, of {self.G} that there are the "
                f"{self.s} shared ones leave {self.R}, and for a token to go to each of these "
                f"experts ({self.E}) and top_k ({self.k}) must be multiples of {self.R}; change "
                "them, or shared or width, in model.ffns.moe"
            )

    @property
    def R(self) -> int:
        """Slices that routed experts have, the last ones."""
        return self.G - self.s % self.G

    @property
    def told(self) -> str:
        shared = f" and {self.s} shared" if self.s else ""
        return f"{self.E} experts{shared}, copies of it{f's {self.G} slices' * (self.G > 1)}"

    def _met(self) -> np.ndarray:
        """How often a token meets each slice, [G]."""
        routed = np.arange(self.G) >= self.G - self.R
        return self.s // self.G + np.where(routed, self.k // self.R, 1)

    def experts(self, given, router, gates: float) -> dict:
        """Weights of the routed ones, for gates with this sum."""
        each, first = self.E // self.R, self.G - self.R
        of = first + np.arange(self.E) % self.R
        up, down = self._cut(given)
        up = up.at[of].get(out_sharding=spec("experts", "embed", None, "ffn"))
        down = down.at[of].get(out_sharding=spec("experts", "ffn", "embed"))
        down = down * (self.k / (self._met()[-1] * gates))
        tied = {"router": jnp.repeat(router[:, :each], self.R, 1)} if self.R > 1 else {}
        return {"up": up, "down": down} | tied

    def shares(self, given) -> dict:
        """Weights of the shared ones, which stand side by side."""
        if not self.s:
            return {}
        (up, down), of = self._cut(given), np.arange(self.s) % self.G
        up = jnp.concatenate([up[j] for j in of], -1)
        down = jnp.concatenate([down[j] / self._met()[j] for j in of])
        return {"shared_up": up, "shared_down": down}

    def _cut(self, given) -> tuple[Array, Array]:
        """Slices of up, [G D 2 F], and of down, [G F D]."""
        up = constrain(given["up"], "embed", None, None)
        down = constrain(given["down"], None, "embed")
        D, _, width = up.shape
        up = jnp.moveaxis(up.reshape(D, 2, self.G, width // self.G), 2, 0)
        return up, down.reshape(self.G, width // self.G, D)


def _multiple(width: float, of: int = 64) -> int:
    return -(-math.ceil(width) // of) * of


def _check(experts, top_k, width, shared, router, capacity, room):
    if router not in ROUTERS:
        raise ValueError(f"moe's router is {router!r}; known: {', '.join(ROUTERS)}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"moe's top_k is {top_k}; it must be from 1 to its {experts} experts")
    if router == "topk_softmax" and top_k == 1:
        raise ValueError(
            "moe's router 'topk_softmax' gives one expert the constant weight 1, from which the "
            "router learns nothing; with top_k 1 take router 'softmax'"
        )
    if width is not None and width < 1:
        raise ValueError(f"moe's width is {width}; it must be at least 1, or none")
    if shared < 0:
        raise ValueError(f"moe's shared is {shared}; it must be 0 or more experts")
    for name, value in (("capacity", capacity), ("room", room)):
        if value is not None and value <= 0:
            raise ValueError(f"moe's {name} is {value}; it must be above 0, or none")
