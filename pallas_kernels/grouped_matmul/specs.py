"""Calls of grouped products with real shapes, for tests, tuning, compilation and benchmarks.

What the harness reads: `name`, `tag`, `abstract(dtype)`, `call(...)`, `differentiable`, `inputs()`,
`flops`, `backward_flops`, `hbm_bytes`, and `tagged` of the module.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call of `grouped_matmul`; letters as there.

    sizes: how rows spread over groups. 'even'; 'skewed', by Zipf's law, the groups in no order;
    'holes', every third group empty and an eighth of the rows in none.
    """

    name: str
    tag: str  # one or more, with a space between
    M: int
    K: int
    N: int
    G: int
    sizes: str = "even"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arrays that have a gradient."""
        return ("x", "w")

    @property
    def counts(self) -> np.ndarray:
        """Rows of each group, [G] int32."""
        if self.sizes == "even":
            return _divided(self.M, np.ones(self.G))
        if self.sizes == "skewed":
            return _divided(self.M, 1 / np.random.default_rng(0).permutation(np.arange(self.G) + 1))
        if self.sizes == "holes":
            return _divided(self.M - self.M // 8, np.float64(np.arange(self.G) % 3 != 1))
        raise ValueError(f"Rows spread 'even', 'skewed' or with 'holes', not {self.sizes!r}.")

    def abstract(self, dtype: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every array argument of `call`, for x and w of this dtype."""
        shapes = {"x": (self.M, self.K), "w": (self.G, self.K, self.N)}
        arrays = {n: (shape, np.dtype(dtype)) for n, shape in shapes.items()}
        return arrays | {"sizes": ((self.G,), np.dtype(np.int32))}

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Arrays by name: x normal and w of variance 1/K, in float32; rows of no group are NaN."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.M, self.K), np.float32)
        x[self.counts.sum() :] = np.nan
        w = rng.standard_normal((self.G, self.K, self.N), np.float32)
        w *= np.float32(self.K**-0.5)
        return {"x": x, "w": w, "sizes": self.counts}

    def call(self, implementation: str | None, config: Any = None) -> Callable[..., tuple]:
        """A function of the arrays by name: y [M N] alone in a tuple."""
        own = {"implementation": implementation, "config": config}
        return lambda x, w, sizes: (grouped_matmul(x, w, sizes, **own),)

    @property
    def flops(self) -> int:
        """Of the rows that are of a group."""
        return 2 * int(self.counts.sum()) * self.K * self.N

    @property
    def backward_flops(self) -> int:
        """As many for the gradient of x and as many for that of w."""
        return 2 * self.flops

    def hbm_bytes(self, dtype: Any, backward: bool = False) -> int:
        """The least to move: what groups hold is read once, every result written once."""
        rows, groups = int(self.counts.sum()), int(np.count_nonzero(self.counts))
        matrix = self.K * self.N
        read = rows * self.K + groups * matrix + (rows * self.N if backward else 0)
        written = self.M * self.K + self.G * matrix if backward else self.M * self.N
        return (read + written) * np.dtype(dtype).itemsize + 4 * self.G


def _divided(rows: int, shares: np.ndarray) -> np.ndarray:
    """Rows by share, [G] int32: rounded down, and what is left to the first that have a share."""
    counts = np.floor(rows * (shares / shares.sum())).astype(np.int32)
    counts[np.flatnonzero(shares)[: rows - counts.sum()]] += 1
    return counts


SPECS = (
    Spec("even", "ci interpreted", M=150, K=40, N=72, G=4),
    Spec("skewed", "ci interpreted", M=197, K=24, N=40, G=7, sizes="skewed"),
    Spec("holes", "ci interpreted", M=171, K=33, N=17, G=5, sizes="holes"),
    Spec("one_group", "ci", M=60, K=16, N=24, G=1),
    Spec("more_groups_than_rows", "ci", M=20, K=8, N=16, G=48, sizes="skewed"),
    Spec("wide", "ci interpreted", M=130, K=136, N=264, G=3, sizes="holes"),
    Spec("deep", "ci", M=90, K=200, N=8, G=6, sizes="skewed"),
    Spec("laptop", "bench", M=4096, K=64, N=128, G=8, sizes="skewed"),
    Spec("laptop-64", "bench", M=4096, K=64, N=128, G=64, sizes="skewed"),
    Spec("laptop-wide", "bench", M=2048, K=256, N=512, G=16, sizes="skewed"),
    Spec("moonshot", "bench aot", M=131072, K=4096, N=1536, G=128),
    Spec("moonshot-skewed", "bench", M=131072, K=4096, N=1536, G=128, sizes="skewed"),
    Spec("mixtral-up", "bench aot", M=16384, K=4096, N=28672, G=8),
    Spec("mixtral-down", "bench aot", M=16384, K=14336, N=4096, G=8),
    Spec("fine-up", "bench aot", M=65536, K=2048, N=2816, G=64),
    Spec("fine-down", "bench aot", M=65536, K=1408, N=2048, G=64),
    Spec("fine-up-holes", "bench", M=65536, K=2048, N=2816, G=64, sizes="holes"),
)


def tagged(tag: str) -> tuple[Spec, ...]:
    """The specs of a tag: 'ci', 'interpreted', 'bench' or 'aot'."""
    return tuple(spec for spec in SPECS if tag in spec.tag.split())
