"""Shapes of real models, by tags: 'bench' to tune and time, 'aot' to compile in CI; 'ci' to test,
'interpreted' also in interpreters.

What a harness asks of an op's specs: `name`, `tag`, `abstract`, `inputs`, `call`, `differentiable`,
`flops`, `backward_flops`, `hbm_bytes`, and `tagged` of the module.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.flash_attention import flash_attention


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call of `flash_attention`; letters as there. documents: segments a row, 0 for none."""

    name: str
    tag: str  # one or more, with a space between
    B: int
    L: int
    H: int
    K: int
    G: int | None = None  # H unless given
    S: int | None = None  # L
    V: int | None = None  # K
    causal: bool = True
    window: int | None = None
    first: int = 0
    softcap: float | None = None
    sinks: bool = False
    documents: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of q, k and v, and of sinks where there are any."""
        S, G, V = self.S or self.L, self.G or self.H, self.V or self.K
        q, k, v = (self.L, self.H, self.K), (S, G, self.K), (S, G, V)
        shapes = {"q": (self.B, *q), "k": (self.B, *k), "v": (self.B, *v)}
        return shapes | ({"sinks": (self.H,)} if self.sinks else {})

    @property
    def options(self) -> dict:
        """Keyword arguments of `flash_attention` that are no arrays."""
        names = "causal", "window", "first", "softcap"
        return {name: getattr(self, name) for name in names}

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arrays that have a gradient."""
        return tuple(self.shapes)

    def abstract(self, dtype: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every array argument of `call`, for q, k and v of this dtype."""
        dtypes = {"sinks": np.float32}
        arrays = {n: (s, np.dtype(dtypes.get(n, dtype))) for n, s in self.shapes.items()}
        if self.documents:
            rows = {"q_segments": self.L, "kv_segments": self.S or self.L}
            arrays |= {n: ((self.B, size), np.dtype(np.int32)) for n, size in rows.items()}
        return arrays

    def segments(self, seed: int = 0) -> dict[str, np.ndarray]:
        """q_segments and kv_segments, int32: documents of random lengths, then padding (0)."""
        if not self.documents:
            return {}
        rng = np.random.default_rng(seed)
        S = self.S or self.L
        fill = lambda length: np.stack(
            [_packed(rng, length, self.documents) for _ in range(self.B)]
        )
        kv = fill(S)
        return {"q_segments": kv if S == self.L else fill(self.L), "kv_segments": kv}

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Normal q, k, v and sinks in float32, with the segments."""
        rng = np.random.default_rng(seed)
        draw = lambda shape: rng.standard_normal(shape, np.float32)
        return {name: draw(shape) for name, shape in self.shapes.items()} | self.segments(seed)

    def call(self, implementation: str | None, config: Any = None) -> Callable[..., tuple]:
        """A function of the arrays by name that gives o [B L H V] and lse [B L H]."""
        own = {"implementation": implementation, "config": config, "return_lse": True}
        return lambda **arrays: flash_attention(**arrays, **self.options, **own)

    @property
    def pairs(self) -> int:
        """Query-key pairs that are seen, of a head, over the batch; documents as in seed 0."""
        i = np.arange(self.L) + (self.S or self.L) - self.L
        segments = self.segments()
        if not segments:
            return self.B * self._pairs(i, 0, self.S or self.L)
        total = 0
        for q, kv in zip(segments["q_segments"], segments["kv_segments"], strict=True):
            ids = np.where(kv == 0, np.iinfo(np.int32).max, kv)  # sorted, with the padding last
            starts, stops = np.searchsorted(ids, q), np.searchsorted(ids, q, side="right")
            total += self._pairs(i, starts, np.where(q == 0, starts, stops))
        return total

    def _pairs(self, i, start, stop) -> int:
        """Of queries at positions i whose documents are the keys [start, stop)."""
        size = lambda start, stop: np.maximum(stop - start, 0)
        stop = np.minimum(stop, i + 1) if self.causal else stop + 0 * i
        if self.window is None:
            return int(size(start, stop).sum())
        near = np.maximum(start, i - self.window + 1), np.minimum(stop, i + self.window)
        leading = start, np.minimum(stop, start + self.first)
        both = np.maximum(near[0], leading[0]), np.minimum(near[1], leading[1])
        return int((size(*near) + size(*leading) - size(*both)).sum())

    @property
    def flops(self) -> int:
        """Of the forward pass, over pairs that are seen."""
        return 2 * self.H * (self.K + (self.V or self.K)) * self.pairs

    @property
    def backward_flops(self) -> int:
        """Of the backward pass: scores again, dP, dQ, dK, dV; 2.5 x forward where V = K."""
        return 2 * self.H * (3 * self.K + 2 * (self.V or self.K)) * self.pairs

    def hbm_bytes(self, dtype: Any, backward: bool = False) -> int:
        """The least to move: every argument read once, every result written once."""
        size = lambda shape, dtype: math.prod(shape) * np.dtype(dtype).itemsize
        inputs = {n: size(*array) for n, array in self.abstract(dtype).items()}
        B, L, H, _ = self.shapes["q"]
        out = size((B, L, H, self.V or self.K), dtype) + size((B, L, H), np.float32)
        if not backward:
            return sum(inputs.values()) + out
        # In also o, lse, do; out the gradients. A gradient of lse is mostly not asked for.
        gradients = sum(inputs[n] for n in self.differentiable)
        return sum(inputs.values()) + gradients + out + size((B, L, H, self.V or self.K), dtype)


def _packed(rng, length: int, documents: int) -> np.ndarray:
    padding = length // 10
    cuts = np.sort(rng.integers(0, length - padding + 1, documents - 1))
    row = np.searchsorted(cuts, np.arange(length), side="right") + 1
    row[length - padding :] = 0
    return row.astype(np.int32)


SPECS = (
    Spec("plain", "ci", B=2, L=37, H=2, K=8),
    Spec("packed", "ci", B=2, L=61, H=4, K=8, documents=3),
    Spec("bert", "ci", B=2, L=33, H=2, K=16, causal=False, documents=2),
    Spec("unmasked", "ci interpreted", B=1, L=19, H=2, K=8, S=45, causal=False),
    Spec("llama", "ci", B=2, L=50, H=6, K=8, G=2, documents=2),
    Spec("mqa", "ci", B=1, L=29, H=3, K=8, G=1, V=4),
    Spec(
        "gemma2", "ci interpreted", B=2, L=67, H=4, K=16, G=2, window=13, softcap=2.0, documents=2
    ),
    Spec("both_sides", "ci", B=1, L=41, H=2, K=8, causal=False, window=6),
    Spec("more_keys", "ci", B=2, L=17, H=2, K=8, S=58, window=20, documents=2),
    Spec("more_queries", "ci", B=1, L=53, H=2, K=8, S=21),
    Spec("one_token", "ci", B=3, L=1, H=4, K=8, G=2, S=39),
    Spec("lambda", "ci", B=1, L=71, H=2, K=8, window=9, first=5),
    Spec("lambda_packed", "ci interpreted", B=2, L=64, H=2, K=8, window=7, first=3, documents=3),
    Spec("lambda_both_sides", "ci", B=2, L=43, H=2, K=8, S=52, causal=False, window=5, first=2),
    Spec("sinks", "ci", B=2, L=47, H=4, K=8, G=2, window=11, sinks=True, documents=2),
    Spec("head_80", "ci", B=1, L=34, H=2, K=80),
    Spec("head_96", "ci", B=1, L=34, H=2, K=96, G=1, V=80),
    Spec("quickstart", "bench", B=8, L=256, H=4, K=32, documents=4),
    Spec("gpt2-124m", "bench aot", B=16, L=1024, H=12, K=64),
    Spec("gpt2-124m-packed", "bench", B=16, L=1024, H=12, K=64, documents=4),
    Spec("bert-base", "bench", B=32, L=512, H=12, K=64, causal=False, documents=2),
    Spec("llama-1b", "bench", B=4, L=4096, H=32, K=64, G=8),
    Spec("llama-7b", "bench", B=4, L=4096, H=32, K=128),
    Spec("llama-7b-packed", "bench", B=4, L=4096, H=32, K=128, documents=8),
    Spec("llama-7b-8k", "bench aot", B=2, L=8192, H=16, K=128),
    Spec("llama-7b-8k-single", "aot", B=1, L=8192, H=16, K=128),
    Spec("full-8k", "bench aot", B=2, L=8192, H=16, K=128, causal=False),
    Spec("llama-7b-16k", "bench", B=1, L=16384, H=32, K=128),
    Spec("llama-7b-16k-packed", "bench aot", B=1, L=16384, H=16, K=128, documents=8),
    Spec("mistral-7b-16k", "bench aot", B=1, L=16384, H=32, K=128, G=8, window=4096),
    Spec("lm-infinite-16k", "bench", B=1, L=16384, H=16, K=128, window=4096, first=10),
    Spec("gpt-oss-local", "bench aot", B=1, L=8192, H=64, K=64, G=8, window=128, sinks=True),
    Spec("gpt-oss-global", "bench", B=1, L=8192, H=64, K=64, G=8, sinks=True),
    Spec("gemma2-9b-global", "bench", B=1, L=8192, H=16, K=256, G=8, softcap=50.0),
    Spec("gemma2-9b-local", "bench aot", B=1, L=8192, H=16, K=256, G=8, window=4096, softcap=50.0),
)


def tagged(tag: str) -> tuple[Spec, ...]:
    """The specs of a tag: 'ci', 'interpreted', 'bench' or 'aot'."""
    return tuple(spec for spec in SPECS if tag in spec.tag.split())
