"""Each row by the matrix of its group, on a TensorCore: the forward pass, and the gradient of rows.

The grid is (tiles of columns, visits): a visit is a group and a tile of T rows with some of its
rows (`tpu_visits`). A group's matrix stays in VMEM for all of its visits, since the sum over the
matrix's depth is never cut, and only those parts of a tile that hold the group's rows are computed.

Source: MegaBlocks, arXiv 2211.15841, section 5, whose blocks end where groups end; here a tile of
rows may hold several groups, and each writes its own rows.
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
from pallas_kernels.products import NN, NT, dot

FORWARD, BACKWARD = "grouped_matmul_forward", "grouped_matmul_backward_inputs"
TILES = (512, 256, 128)  # rows, those to try first first
# Entries of a matrix that are one piece of the program where the matrix unit has 128 columns: more
# hide a piece's ends, and take longer to compile.
PIECE = 2**22


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the kernel is cut.

    T: rows a tile.  part: rows at once, which divide T.
    C: columns of the result a tile.  piece: columns at once, which divide C.
    All are multiples of 128.
    """

    T: int
    part: int
    C: int
    piece: int

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 1 or size % LANES:
                raise ValueError(f"{name} {size} is no multiple of {LANES}: choose one.")
        if self.T % self.part or self.C % self.piece:
            raise ValueError(
                f"part {self.part} must divide T {self.T} and piece {self.piece} C {self.C}: "
                f"choose divisors."
            )


def heuristic(M: int, D: int, C: int, dtype, transposed: bool) -> Rows:
    """The least work for each core, then the fewest tiles of columns, for each reads all rows.

    Args:
      M, D, C: rows, their width, and columns of the result.
      transposed: whether matrices are, which matrix units of 256 columns take in so slowly that 256
        rows at once must make up for it.

    Raises:
      NotImplementedError: rows are so wide that not even the smallest tiles fit.
    """
    info, size = pltpu.get_tpu_info(), jnp.dtype(dtype).itemsize
    unit = min(info.mxu_column_size, whole(C, LANES))
    columns, room = math.ceil(C / unit), info.vmem_capacity_bytes * 3 // 4
    part = info.mxu_column_size if transposed else LANES
    found = []
    for T in dict.fromkeys(min(T, whole(M, min(T, part))) for T in TILES):
        # Of all blocks there are two: the next one is on its way.
        most = (room // (2 * size) - T * whole(D, LANES)) // ((whole(D, LANES) + T) * unit)
        for n in range(1, min(most, columns) + 1):
            tiles = math.ceil(columns / n)
            work = math.ceil(tiles / info.num_cores) * n
            found.append((max(part - T, 0), work, tiles, -T, n))
    if not found:
        raise NotImplementedError(
            f"pallas_tpu sums over {D} at once, and of {dtype} no tile so deep fits into VMEM: use "
            f"xla."
        )
    *_, T, n = min(found)
    # A product of float32 is six of bfloat16.
    fit = max(2 * PIECE // (LANES * whole(D, LANES) * size), 1)
    piece = max(x for x in range(1, n + 1) if n % x == 0 and x <= fit)
    return Rows(-T, min(part, -T), n * unit, piece * unit)


def product(x, w, sizes, config: Rows, transposed: bool):
    """y [M C] in x's dtype: row m of x times the matrix of its group, 0 for a row of none.

    Args:
      x: [M D].
      w: [G D C], or [G C D] if transposed.
      sizes: int32 [G].
    """
    (M, D), (G, C) = x.shape, (w.shape[0], w.shape[1 if transposed else 2])
    tpu_visits.check_scalars(M, config.T, G)
    x, w, sizes = dispatch.vary(x, w, sizes)
    table = tpu_visits.visits(sizes, M, config.T, rest=True)
    # Small arrays might else be placed in VMEM whole, and the vector unit move their blocks.
    x, w = (pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in (x, w))
    block, at = (None, D, config.C), lambda c, v, t: (t.group[v], 0, c)
    if transposed:
        block, at = (None, config.C, D), lambda c, v, t: (t.group[v], c, 0)
    spec = lambda block, at: pl.BlockSpec(block, lambda c, v, *t: at(c, v, Visits(*t)))
    return pl.pallas_call(
        functools.partial(_kernel, config, transposed),
        name=BACKWARD if transposed else FORWARD,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(math.ceil(C / config.C), table.group.shape[0]),
            in_specs=[
                spec((config.T, D), lambda c, v, t: (t.source[v], 0)),
                spec(block, at),
            ],
            out_specs=spec((config.T, config.C), lambda c, v, t: (t.target[v], c)),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (M, C), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * D * C,
            transcendentals=0,
            bytes_accessed=(M * (D * math.ceil(C / config.C) + C)) * x.dtype.itemsize + w.nbytes,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8,
        ),
    )(*table, x, w)


def executions(counts, M: int, C: int, config: Rows) -> list[float]:
    """Runs of the program's heavy pieces in one call, in its order, cores together."""
    own, rest = tpu_visits.parts(counts, M, config.part)
    tiles = math.ceil(C / config.C)
    return [float(own * tiles * (config.C // config.piece)), float(rest * tiles)]


def _kernel(config: Rows, transposed: bool, *refs):
    """A part's rows of earlier groups are kept; those of later ones are written by these."""
    table, (x, w, y) = Visits(*refs[:-3]), refs[-3:]
    v = pl.program_id(1)
    first, begin = table.first[v], table.first[v] // config.part
    end = (table.last[v] + config.part - 1) // config.part
    wide = min(pltpu.get_tpu_info().mxu_column_size, config.piece)

    def write(rows, columns, value):
        row = jax.lax.broadcasted_iota(jnp.int32, (config.part, 1), 0) + rows.start
        y[rows, columns] = jnp.where(row >= first, value.astype(y.dtype), y[rows, columns])

    def multiply(rows, start):
        for c in range(0, config.piece, wide):
            columns = pl.ds(start + c, min(wide, config.piece - c))
            product = (
                dot(x[rows], w[columns], NT) if transposed else dot(x[rows], w[:, columns], NN)
            )
            write(rows, columns, product)

    def own(i):
        rows, pieces = _at(i, config.part), config.C // config.piece
        if pieces == 1:
            multiply(rows, 0)
        else:
            pl.loop(0, pieces)(lambda c: multiply(rows, _at(c, config.piece).start))

    def rest(i):
        write(_at(i, config.part), slice(None), jnp.zeros((config.part, config.C), y.dtype))

    of_group = v < table.counts[0]
    pl.loop(begin, jnp.where(of_group, end, begin))(own)
    pl.loop(begin, jnp.where(~of_group & (v < table.counts[1]), end, begin))(rest)


def _at(i, size: int):
    return pl.ds(pl.multiple_of(i * size, LANES), size)
