"""Calls of linear attention with real shapes, for tests, tuning, compilation and benchmarks.

What the harness reads: `name`, `tag`, `abstract(dtype)`, `call(...)`, `differentiable`, `inputs()`,
`flops`, `backward_flops`, `hbm_bytes`, and `tagged` of the module.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.linear_attention import State, linear_attention
from pallas_kernels.linear_attention import features as maps

PRODUCTS = ("q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call of `linear_attention`; letters as there.

    f: width of the maps, 0 for none. documents: segments a row, 0 for none. lag: tokens that keys
    come later. state: whether one is given. holes: whether padding lies inside documents too.
    """

    name: str
    tag: str  # one or more, with a space between
    B: int
    L: int
    H: int
    K: int
    features: str = "softmax"
    f: int = 0
    bias: bool = False
    G: int | None = None  # H unless given
    V: int | None = None  # K
    documents: int = 0
    lag: int = 0
    state: bool = False
    holes: bool = False

    @property
    def F(self) -> int:
        return maps.count(self.features, self.f or self.K)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that have a gradient."""
        B, L, H, K, F = self.B, self.L, self.H, self.K, self.F
        G, V, f = self.G or H, self.V or K, self.f
        shapes = {"q": (B, L, H, K), "k": (B, L, G, K), "v": (B, L, G, V)}
        if f:
            shapes |= {"q_map": (H, K, f), "k_map": (G, K, f)}
        if self.bias:
            shapes |= {"q_bias": (H, f), "k_bias": (G, f)}
        return shapes | ({"values": (B, G, F, V), "keys": (B, G, F)} if self.state else {})

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arrays that have a gradient."""
        return tuple(self.shapes)

    def abstract(self, dtype: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every array argument of `call`, for q, k and v of this dtype."""
        of = lambda name: np.dtype(dtype if name in PRODUCTS else np.float32)
        arrays = {n: (shape, of(n)) for n, shape in self.shapes.items()}
        if self.documents:
            rows = "q_segments", "kv_segments"
            arrays |= {n: ((self.B, self.L), np.dtype(np.int32)) for n in rows}
        return arrays | ({"segment": ((self.B,), np.dtype(np.int32))} if self.state else {})

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Arrays by name: q, k, v normal in float32, positive where they are features already."""
        rng = np.random.default_rng(seed)
        arrays = {n: rng.standard_normal(shape, np.float32) for n, shape in self.shapes.items()}
        for name in ("q_map", "k_map"):
            if name in arrays:
                arrays[name] *= self.K**-0.5
        positive = ("q", "k") if self.features == "identity" else ()
        for name in (*positive, "values", "keys"):
            if name in arrays:
                arrays[name] = np.abs(arrays[name])
        if self.documents:
            q = np.stack([_packed(rng, self.L, self.documents) for _ in range(self.B)])
            if self.holes:
                q = np.where(rng.random(q.shape) < 0.25, 0, q).astype(np.int32)
            kv = np.pad(q, ((0, 0), (self.lag, 0)))[:, : self.L]
            arrays |= {"q_segments": q, "kv_segments": kv}
        if self.state:  # of the first document in some rows, and of another before it in others
            arrays["segment"] = np.where(np.arange(self.B) % 2, 9, 1).astype(np.int32)
        return arrays

    def call(self, implementation: str | None, config: Any = None) -> Callable[..., tuple]:
        """A function of the arrays by name: o [B L H V], total [B L H], values and keys."""

        def call(values=None, keys=None, segment=None, **arrays):
            state = None if values is None else State(values, keys, segment)
            own = {"implementation": implementation, "config": config, "state": state}
            o, total, state = linear_attention(**arrays, **own, features=self.features)
            return o, total, state.values, state.keys

        return call

    @property
    def flops(self) -> int:
        """Of the recurrent form, the fewest: maps, the state's update, and its readout."""
        H, G, F, V = self.H, self.G or self.H, self.F, self.V or self.K
        return 2 * self.B * self.L * (H + G) * (self.K * self.f + F * (V + 1))

    @property
    def backward_flops(self) -> int:
        """Maps again and twice; the state again, and the gradients of queries, keys and values."""
        H, G, F, V = self.H, self.G or self.H, self.F, self.V or self.K
        maps, state = 3 * (H + G) * self.K * self.f, (2 * H + 3 * G) * F * (V + 1)
        return 2 * self.B * self.L * (maps + state)

    def hbm_bytes(self, dtype: Any, backward: bool = False) -> int:
        """The least to move: every argument read once, every result written once."""
        size = lambda shape, dtype: math.prod(shape) * np.dtype(dtype).itemsize
        inputs = {n: size(*array) for n, array in self.abstract(dtype).items()}
        B, L, H, G, V = self.B, self.L, self.H, self.G or self.H, self.V or self.K
        rows = size((B, L, H, V), dtype) + size((B, L, H), np.float32)
        state = size((B, G, self.F, V + 1), np.float32)
        if not backward:
            return sum(inputs.values()) + rows + state
        # In also o, total and do; out the gradients. Others' gradients are mostly not asked for.
        gradients = sum(inputs[n] for n in self.differentiable)
        return sum(inputs.values()) + gradients + rows + size((B, L, H, V), dtype)


def _packed(rng, length: int, documents: int) -> np.ndarray:
    padding = length // 10
    cuts = np.sort(rng.integers(0, length - padding + 1, documents - 1))
    row = np.searchsorted(cuts, np.arange(length), side="right") + 1
    row[length - padding :] = 0
    return row.astype(np.int32)


SPECS = (
    Spec("plain", "ci interpreted", B=2, L=150, H=2, K=8, f=8),
    Spec("features", "ci", B=2, L=70, H=2, K=8, features="identity", V=16),
    Spec("elu", "ci", B=1, L=131, H=2, K=8, features="elu"),
    Spec("relu", "ci", B=1, L=64, H=2, K=8, features="relu", f=8),
    Spec("exp", "ci interpreted", B=2, L=130, H=2, K=8, features="exp", f=8),
    Spec("joint", "ci interpreted", B=1, L=90, H=2, K=8, features="joint", f=8, bias=True),
    Spec("taylor", "ci", B=1, L=75, H=2, K=4, features="taylor", V=8),
    Spec("grouped", "ci interpreted", B=2, L=97, H=6, K=8, G=2, f=8, documents=3),
    Spec("one_head", "ci", B=1, L=80, H=3, K=8, G=1, f=4, V=16),
    Spec("packed", "ci interpreted", B=3, L=200, H=2, K=8, f=8, documents=5),
    Spec("holes", "ci interpreted", B=1, L=140, H=2, K=8, features="elu", documents=3, holes=True),
    Spec("lagging", "ci", B=2, L=140, H=2, K=8, f=8, documents=3, lag=20),
    Spec("going_on", "ci interpreted", B=2, L=129, H=2, K=8, f=8, state=True),
    Spec(
        "going_on_packed", "ci interpreted", B=2, L=150, H=4, K=8, G=2, f=8, documents=3, state=True
    ),
    Spec("one_token", "ci", B=3, L=1, H=4, K=8, G=2, f=8, state=True),
    Spec("quickstart", "bench", B=8, L=256, H=4, K=32, f=32, documents=4),
    Spec("gpt2-124m", "bench aot", B=16, L=1024, H=12, K=64, f=64),
    Spec("llama-7b-4k", "bench aot", B=4, L=4096, H=32, K=128, f=128),
    Spec("llama-7b-4k-64", "bench aot", B=4, L=4096, H=32, K=128, f=64),
    Spec("llama-7b-16k", "bench aot", B=2, L=16384, H=16, K=128, f=128),
    Spec("llama-7b-16k-packed", "bench aot", B=2, L=16384, H=16, K=128, f=128, documents=8),
    Spec("llama-8b-16k", "bench", B=2, L=16384, H=32, K=128, G=8, f=64),
    Spec("llama-7b-64k", "bench", B=1, L=65536, H=16, K=128, f=128),
    Spec("elu-16k", "bench aot", B=2, L=16384, H=16, K=128, features="elu"),
)


def tagged(tag: str) -> tuple[Spec, ...]:
    """The specs of a tag: 'ci', 'interpreted', 'bench' or 'aot'."""
    return tuple(spec for spec in SPECS if tag in spec.tag.split())
