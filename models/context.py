"""What a layer is told about the tokens it sees."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Key, UInt

from parallel.rules import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Everything beside x that a layer may read.

    positions: place of a token in its document.  segment_ids: document within the row, 0 padding.
    sample: row number as (high, low) words.  domain: number of each row's domain in the corpus.
    key: the run's key, None when nothing is random.  layer: number of this layer.
    totals: sums over the whole global batch that layers are `told`; a mixer or ffn sees those of
    its own layer, under the names it reported.
    token_types: sentence A or B (BERT), zeros when None.
    group: of each token, 0 to groups - 1; layers that route report their sums by group too.
    dtype: of the computation.  train: dropout is on.  causal: tokens do not see later ones.
    decoding: x holds one token a row, so its length is never split over devices.
    taps: names of intermediate sums that a study asked to see in aux.
    domains: K, the corpus's domains; a loss reports itself by domain where there are several.
    """

    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    sample: UInt[Array, "B 2"] | None = None
    domain: Int[Array, "B"] | None = None
    key: Key[Array, ""] | None = None
    layer: Int[Array, ""] | None = None
    totals: dict = dataclasses.field(default_factory=dict)
    token_types: Int[Array, "B L"] | None = None
    group: Int[Array, "B L"] | None = None
    groups: int = dataclasses.field(default=0, metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    decoding: bool = dataclasses.field(default=False, metadata={"static": True})
    taps: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    domains: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def valid(self) -> Bool[Array, "B L"]:
        """Tokens that are not padding."""
        return self.segment_ids > 0

    @property
    def stream(self) -> PartitionSpec | None:
        """The layout of the residual stream `[B L D]`, for out_sharding."""
        return spec("batch", None if self.decoding else "length", None)

    def totals_of(self, path: str) -> dict:
        """The totals below a path, named from there: of one layer, then of its mixer or ffn."""
        inside = f"{path}/"
        return {n.removeprefix(inside): t for n, t in self.totals.items() if n.startswith(inside)}

    def replace(self, **changes) -> "Context":
        return dataclasses.replace(self, **changes)


def of_batch(batch, **given) -> Context:
    """The context of a Batch with inputs `[B L]`."""
    return Context(
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        sample=batch.sample,
        domain=batch.domain,
        **given,
    )


def over_tokens(x: Array, ctx: Context) -> Array:
    """Float32 sum of x `[B L]` over valid tokens."""
    return jnp.sum(jnp.where(ctx.valid, x.astype(jnp.float32), 0.0))
