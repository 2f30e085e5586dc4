"""Shapes of real models, for tests ('ci'), and for tuning and benchmarks ('bench')."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call of `flash_attention`; letters as there. documents: segments a row, 0 for none."""

    name: str
    tag: str
    B: int
    L: int
    H: int
    K: int
    G: int | None = None  # H unless given
    S: int | None = None  # L
    V: int | None = None  # K
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    documents: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of q, k and v."""
        S, G, V = self.S or self.L, self.G or self.H, self.V or self.K
        q, k, v = (self.L, self.H, self.K), (S, G, self.K), (S, G, V)
        return {"q": (self.B, *q), "k": (self.B, *k), "v": (self.B, *v)}

    @property
    def options(self) -> dict:
        """Keyword arguments of `flash_attention` besides the segments."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap}

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
        """Normal q, k, v in float32, with the segments."""
        rng = np.random.default_rng(seed)
        draw = lambda shape: rng.standard_normal(shape, np.float32)
        return {name: draw(shape) for name, shape in self.shapes.items()} | self.segments(seed)

    @property
    def flops(self) -> int:
        """Of the forward pass, over pairs that causality and window leave; backward has 2.5 x."""
        S, V = self.S or self.L, self.V or self.K
        i = np.arange(self.L) + S - self.L
        last = np.minimum(i, S - 1) if self.causal else np.full(self.L, S - 1)
        first = np.zeros(self.L, np.int64)
        if self.window is not None:
            first = np.maximum(i - self.window + 1, 0)
            last = np.minimum(last, i + self.window - 1)
        pairs = int(np.maximum(last - first + 1, 0).sum())
        return 2 * self.B * self.H * (self.K + V) * pairs


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
    Spec("unmasked", "ci", B=1, L=19, H=2, K=8, S=45, causal=False),
    Spec("llama", "ci", B=2, L=50, H=6, K=8, G=2, documents=2),
    Spec("mqa", "ci", B=1, L=29, H=3, K=8, G=1, V=4),
    Spec("gemma2", "ci", B=2, L=67, H=4, K=16, G=2, window=13, softcap=2.0, documents=2),
    Spec("both_sides", "ci", B=1, L=41, H=2, K=8, causal=False, window=6),
    Spec("more_keys", "ci", B=2, L=17, H=2, K=8, S=58, window=20, documents=2),
    Spec("more_queries", "ci", B=1, L=53, H=2, K=8, S=21),
    Spec("one_token", "ci", B=3, L=1, H=4, K=8, G=2, S=39),
    Spec("quickstart", "bench", B=8, L=256, H=4, K=32, documents=4),
    Spec("gpt2-124m", "bench", B=16, L=1024, H=12, K=64),
    Spec("gpt2-124m-packed", "bench", B=16, L=1024, H=12, K=64, documents=4),
    Spec("bert-base", "bench", B=32, L=512, H=12, K=64, causal=False, documents=2),
    Spec("llama-1b", "bench", B=4, L=4096, H=32, K=64, G=8),
    Spec("llama-7b", "bench", B=4, L=4096, H=32, K=128),
    Spec("llama-7b-packed", "bench", B=4, L=4096, H=32, K=128, documents=8),
    Spec("llama-7b-16k", "bench", B=1, L=16384, H=32, K=128),
    Spec("gemma2-9b-global", "bench", B=1, L=8192, H=16, K=256, G=8, softcap=50.0),
    Spec("gemma2-9b-local", "bench", B=1, L=8192, H=16, K=256, G=8, window=4096, softcap=50.0),
)


def tagged(tag: str) -> tuple[Spec, ...]:
    """The specs of a tag, 'ci' or 'bench'."""
    return tuple(spec for spec in SPECS if spec.tag == tag)
