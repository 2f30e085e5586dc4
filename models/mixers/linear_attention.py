"""Linear attention with a fixed feature map, or T2R's learned one.

Transformers are RNNs (arXiv 2006.16236): `o_i = sum_{j <= i} phi(q_i).phi(k_j) v_j / sum_{j <= i}
phi(q_i).phi(k_j)` with phi = 1 + elu. T2R (arXiv 2103.13076) has phi(x) = relu(x W + b), W a
head's. Deviations: rotary positions before the map, as the other mixers here; T2R's W starts as the
identity, and a key head has one map for its group of queries.
"""

from flax import nnx

from models.param import Dims, param
from models.projections import Heads
from models.recurrent import LinearMixer

CASES = (
    {"features": "relu", "learned": True},
    {"heads": 4, "kv_heads": 2, "qk_norm": True},
    {"heads": 2, "rope": False, "bias": True},
)


class Mixer(LinearMixer):
    """heads: H query heads over kv_heads (G, H when None) of head_dim (K, D / H when None).

    features: 'elu' or 'relu'.  learned: whether z = x W + b goes into them, and not x itself.
    implementation: of the kernel, None lets the platform decide.
    """

    def __init__(
        self,
        dims: Dims,
        *,
        rngs: nnx.Rngs,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        features: str = "elu",
        learned: bool = False,
        rope: bool = True,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        bias: bool = False,
        implementation: str | None = None,
    ):
        if features not in ("elu", "relu"):
            raise ValueError(f"features {features!r} are not fixed ones; known: elu, relu")
        sizes = Heads.of(dims, heads, kv_heads, head_dim)
        scaling = (rope_base, "none", 1.0, 0) if rope else None
        super().__init__(dims, sizes, rngs=rngs, scaling=scaling, qk_norm=qk_norm, bias=bias)
        self.form, self.f, self.implementation = features, sizes.K, implementation
        self.learned, (H, G, K) = learned, (sizes.H, sizes.G, sizes.K)
        if learned:
            square = dict(fan_in=(1,), fan_out=(2,), stack=(0,), init=("identity",), decay=False)
            self.q_map = param(rngs, (H, K, K), ("heads", None, None), **square)
            self.k_map = param(rngs, (G, K, K), ("heads", None, None), **square)
            vector = dict(decay=False, group="bias")
            self.q_map_bias = param(rngs, (H, K), ("heads", None), **vector)
            self.k_map_bias = param(rngs, (G, K), ("heads", None), **vector)

    def maps(self) -> dict:
        if not self.learned:
            return {}
        biases = dict(q_bias=self.q_map_bias[...], k_bias=self.k_map_bias[...])
        return dict(q_map=self.q_map[...], k_map=self.k_map[...], **biases)
