"""What linear attention's mixers share: the parallel form, the state to decode with, its size, and
how the weights are taught to be those of softmax attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import transfer
from models.context import Context, over_tokens
from models.projections import Projections
from pallas_kernels import dispatch
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.linear_attention import State, features, linear_attention, merge
from pallas_kernels.linear_attention.summary import state_of
from parallel import prefix
from parallel.rules import spec

TAUGHT = {"attention_transfer", "output_transfer", "attention_weights"}


class LinearMixer(Projections):
    """Linear attention over projections; a mixer's file says which features, and their maps.

    form: of the features, see `pallas_kernels.linear_attention.features`.  f: width of the maps, K
    without.  implementation: of the kernel, None lets the platform decide.
    """

    modes = frozenset({"causal"})
    context = "prefix"
    form: str
    f: int
    implementation: str | None

    def maps(self) -> dict:
        """The maps' weights, as `linear_attention` names them."""
        return {}

    def __call__(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L D"], dict]:
        q, k, v = self.project(x, ctx)
        if TAUGHT & set(ctx.taps):
            return self._imitate(q, k, v, ctx)
        return self.write(self.attend(q, k, v, ctx)[0], ctx), {}

    def _imitate(self, q, k, v, ctx: Context) -> tuple[Float[Array, "B L D"], dict]:
        """What softmax attention gives, and in aux how far from it this mixer is, as ctx.taps ask.

        Each layer learns from what the teacher's layers before it give (teacher forcing), whose
        queries and keys are not to bend.
        """
        if dispatch.split(q, 1):
            raise ValueError(
                "softmax attention, to be imitated, needs whole rows: set mesh.context to 1"
            )
        q, k, v = map(jax.lax.stop_gradient, (q, k, v))
        rows = dict(q_segments=ctx.segment_ids, kv_segments=ctx.segment_ids)
        asked = self.tempered(q)
        taught, aux = flash_attention(asked, k, v, **rows), {}
        if "attention_transfer" in ctx.taps:
            sums = transfer.cross_entropy(asked, k, self.weights(q, k), ctx)
            aux |= dict(zip(("attention_transfer", "teacher_entropy"), sums, strict=True))
        if "attention_weights" in ctx.taps:
            both = transfer.weights(asked, k, self.weights(q, k), ctx.segment_ids)
            aux |= dict(zip(("teacher_weights", "student_weights"), both, strict=True))
        if "output_transfer" in ctx.taps:
            error = self.attend(q, k, v, ctx)[0].astype(jnp.float32) - taught.astype(jnp.float32)
            aux["output_transfer"] = over_tokens(jnp.mean(jnp.square(error), (2, 3)), ctx)
        return self.write(taught, ctx), aux

    def weights(self, q, k) -> transfer.Student:
        """The unnormalised weights, as `models.transfer` asks for them."""
        maps = self.maps()
        phi = lambda x, name: features.of(
            self.form, features.project(x, maps.get(f"{name}_map"), maps.get(f"{name}_bias"))
        )
        phi_k = phi(k, "k")
        phi_q = transfer.grouped(phi(q, "q"), phi_k)
        return lambda s, distance, rows: jnp.einsum("bigrf,bjgf->bgrij", rows(phi_q), phi_k)

    def attend(self, q, k, v, ctx: Context, state: State | None = None) -> tuple[Array, State]:
        """o [B L H V] and the state after the row, of tokens that go on from `state`'s."""
        o, _, state = self.weigh(q, k, v, ctx.segment_ids, ctx.segment_ids, state)
        return o, state

    def weigh(self, q, k, v, q_segments, kv_segments, state: State | None = None):
        """o [B L H V], total [B L H] and the state after, as `linear_attention` gives them."""
        rows = dict(q_segments=q_segments, kv_segments=kv_segments, state=state)
        own = dict(features=self.form, implementation=self.implementation)
        run = prefix.linear(linear_attention, state_of, merge)
        return run(q, k, v, **self.maps(), **rows, **own)

    def masked_flops(self, length: int) -> float:
        """Forward FLOPs a token of the reference beyond those of the recurrent form.

        The reference weighs L keys a query and sums the state once; the recurrent form updates
        the state and reads it, 2 F V each. Negative for rows so short that squares are cheaper.
        """
        H, V, F = self.heads.H, self.heads.V, features.count(self.form, self.f)
        return 2.0 * H * (length * (F + V) - F * V)

    def state_size(self, length: int) -> int:
        """Elements of the decoding state of one sequence, however long it is."""
        return self.heads.G * features.count(self.form, self.f) * (self.heads.V + 1)

    def init_cache(self, B: int, length: int, dtype: str) -> dict[str, Array]:
        """The state before the first token; float32 whatever the computation's dtype."""
        G, V, F = self.heads.G, self.heads.V, features.count(self.form, self.f)
        zeros = lambda *shape: jnp.zeros(
            shape, jnp.float32, out_sharding=spec("batch", "heads", *[None] * (len(shape) - 2))
        )
        return {"values": zeros(B, G, F, V), "keys": zeros(B, G, F)}

    def prefill(self, x: Float[Array, "B L D"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        """As `__call__` on right-padded prompts that start at position 0, filling the cache."""
        o, state = self.attend(*self.project(x, ctx), ctx)
        return self.write(o, ctx), {"values": state.values, "keys": state.keys}

    def decode(self, x: Float[Array, "B 1 D"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        """One token a row at ctx.positions `[B 1]`, against the cache."""
        state = State(**cache, segment=ctx.segment_ids[:, 0])
        o, state = self.attend(*self.project(x, ctx), ctx, state)
        return self.write(o, ctx), {"values": state.values, "keys": state.keys}
