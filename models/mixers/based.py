"""Based's linear attention: the second-order Taylor expansion of exp as a kernel.

Based (arXiv 2402.18668): phi(q).phi(k) = 1 + s + s^2 / 2 with s = q.k / sqrt(f) for queries and
keys of a small size f, so that features number 1 + f + f^2; weights are positive, but fall with s
where s < -1. Its hybrid of short convolutions, windows and these layers is a `pattern`. Deviation:
rotary positions may be had, which Based leaves to its sliding windows.
"""

from flax import nnx

from models.param import Dims
from models.projections import Heads
from models.recurrent import LinearMixer

CASES = ({"heads": 2, "feature_dim": 6, "rope": True}, {"heads": 4, "kv_heads": 2, "head_dim": 16})


class Mixer(LinearMixer):
    """heads: H query heads over kv_heads (G, H when None), of values of head_dim (D / H when None).

    feature_dim: f, the size of queries and keys.  implementation: of the kernel, None lets the
    platform decide.
    """

    def __init__(
        self,
        dims: Dims,
        *,
        rngs: nnx.Rngs,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_dim: int = 16,
        rope: bool = False,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        implementation: str | None = None,
    ):
        if feature_dim < 1:
            raise ValueError(f"feature_dim is {feature_dim} and must be at least 1")
        usual = Heads.of(dims, heads, kv_heads, head_dim)
        sizes = Heads(usual.H, usual.G, feature_dim, usual.V)
        scaling = (rope_base, "none", 1.0, 0) if rope else None
        super().__init__(dims, sizes, rngs=rngs, scaling=scaling, qk_norm=qk_norm, bias=False)
        self.form, self.f, self.implementation = "taylor", feature_dim, implementation
