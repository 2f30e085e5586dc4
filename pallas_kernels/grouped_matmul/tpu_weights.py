"""The gradient of the groups' matrices on a TensorCore: `dw_g = x_g^T dy_g`.

The grid is (tiles of dw, visits): a visit is a group and a tile of T rows with some of its rows
(`tpu_visits`). A tile of a group's dw is summed up in VMEM over the group's visits; parts of the
tile of rows that hold none of the group's rows are left out, and other groups' rows in a part are
put to 0 on both sides, since they may be NaN.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import tpu_visits
from pallas_kernels.grouped_matmul.tpu_visits import LANES, Visits, whole
from pallas_kernels.products import NN, dot

NAME = "grouped_matmul_backward_weights"
ROWS = 512
PIECE = 2**22  # entries of dw a tile: more would take longer to compile


@dataclasses.dataclass(frozen=True)
class Weights:
    """How the kernel is cut.

    T: rows a tile.  part: rows at once, which divide T.  K, N: rows and columns of dw a tile.
    All are multiples of 128.
    """

    T: int
    part: int
    K: int
    N: int

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 1 or size % LANES:
                raise ValueError(f"{name} {size} is no multiple of {LANES}: choose one.")
        if self.T % self.part:
            raise ValueError(f"part {self.part} must divide T {self.T}: choose a divisor.")


def heuristic(M: int, K: int, N: int, dtype) -> Weights:
    """The least work for each core, then the fewest bytes: each row of tiles of dw reads all x."""
    info, size = pltpu.get_tpu_info(), jnp.dtype(dtype).itemsize
    part = info.mxu_column_size
    T, units = min(ROWS, whole(M, part)), (LANES, min(part, whole(N, LANES)))
    across = [math.ceil(x / unit) for x, unit in zip((K, N), units, strict=True)]
    found = []
    for k, n in _pairs(*across, most=PIECE // math.prod(units)):
        tile = k * units[0], n * units[1]
        if _memory(T, part, *tile, size) <= info.vmem_capacity_bytes * 3 // 4:
            down, right = math.ceil(across[0] / k), math.ceil(across[1] / n)
            work = math.ceil(down * right / info.num_cores) * math.prod(tile)
            found.append((work, K * right + N * down, -n, tile))
    return Weights(T, part, *min(found)[-1])


def _pairs(rows: int, columns: int, most: int):
    return ((k, n) for k in range(1, rows + 1) for n in range(1, min(columns, most // k) + 1))


def _memory(T: int, part: int, K: int, N: int, size: int) -> int:
    """Bytes of VMEM: blocks twice, for the copies on their way, and scratch."""
    return 2 * size * (T * (K + N) + K * N) + 4 * K * N + size * part * K


def gradient(x, dy, sizes, config: Weights):
    """dw [G K N] in x's dtype, from x [M K], dy [M N] and sizes, int32 [G]."""
    (M, K), N, G = x.shape, dy.shape[1], sizes.shape[0]
    tpu_visits.check_scalars(M, config.T, G)
    x, dy, sizes = dispatch.vary(x, dy, sizes)
    table = tpu_visits.visits(sizes, M, config.T, rest=False)
    # Small arrays might else be placed in VMEM whole, and the vector unit move their blocks.
    x, dy = (pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in (x, dy))
    down, right = math.ceil(K / config.K), math.ceil(N / config.N)
    row, column = lambda i: jax.lax.div(i, right), lambda i: jax.lax.rem(i, right)
    spec = lambda block, at: pl.BlockSpec(block, lambda i, v, *t: at(i, v, Visits(*t)))
    return pl.pallas_call(
        functools.partial(_kernel, config),
        name=NAME,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(down * right, table.group.shape[0]),
            in_specs=[
                spec((config.T, config.K), lambda i, v, t: (t.source[v], row(i))),
                spec((config.T, config.N), lambda i, v, t: (t.source[v], column(i))),
            ],
            out_specs=spec(
                (None, config.K, config.N), lambda i, v, t: (t.group[v], row(i), column(i))
            ),
            scratch_shapes=[
                pltpu.VMEM((config.K, config.N), jnp.float32),
                pltpu.VMEM((config.K, config.part), x.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (G, K, N), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * K * N,
            transcendentals=0,
            bytes_accessed=(M * (K * right + N * down) + G * K * N) * x.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8,
        ),
    )(*table, x, dy)


def executions(counts, M: int, K: int, N: int, config: Weights) -> list[float]:
    """Runs of the program's heavy pieces in one call, in its order, cores together."""
    tiles = math.ceil(K / config.K) * math.ceil(N / config.N)
    own, _ = tpu_visits.parts(counts, M, config.part)
    return [float(own * tiles), float(counts.shape[0] * tiles)]


def _kernel(config: Weights, *refs):
    """x of a part stands turned in scratch, so that each tile of it is turned once."""
    table, (x, dy, dw, total, turned) = Visits(*refs[:-5]), refs[-5:]
    v, V = pl.program_id(1), pl.num_programs(1)
    first, last, group = table.first[v], table.last[v], table.group[v]
    begins = (v == 0) | (table.group[jnp.maximum(v - 1, 0)] != group)
    ends = (v == V - 1) | (table.group[jnp.minimum(v + 1, V - 1)] != group)
    start, stop = first // config.part, (last + config.part - 1) // config.part
    wide = min(pltpu.get_tpu_info().mxu_column_size, config.N)

    def add(i):
        rows = pl.ds(pl.multiple_of(i * config.part, LANES), config.part)
        row = jax.lax.broadcasted_iota(jnp.int32, (config.part, 1), 0) + rows.start
        own, fresh = (row >= first) & (row < last), begins & (i == start)
        for k in range(0, config.K, LANES):
            turned[k : k + LANES] = jnp.where(own, x[rows, k : k + LANES], 0).T
        for n in range(0, config.N, wide):
            n = slice(n, min(n + wide, config.N))
            more = dot(turned[...], jnp.where(own, dy[rows, n], 0), NN)
            total[:, n] = jnp.where(fresh, more, total[:, n] + more)

    pl.loop(start, jnp.where(v < table.counts[0], stop, start))(add)

    @pl.when(ends)
    def _():
        # Without rows nothing has been summed up.
        dw[...] = jnp.where(last > first, total[...], 0.0).astype(dw.dtype)
