"""Linear attention's forward pass on a TensorCore.

The rows of tokens of all heads are one sequence of blocks of T tokens, or one for each core. Step m
of a sequence makes the features of block m and attends with those of block m - 1, which it finds in
scratch; the state stays in VMEM from step to step, as the block of the result that it is at last.

Source: the chunked form of Transformers are RNNs, arXiv 2006.16236, section 3.3.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import tpu_tiles
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.tpu_forward_kernel import Shape, kernel, names
from pallas_kernels.linear_attention.tpu_tiles import LANES, ROWS, whole

NAME = "linear_attention_forward"


def forward(arrays: Arrays, options: Options, config):
    """o, total, values and keys, as `reference.forward`; `config` as `pallas_tpu.Config`."""
    B, L, H, _ = arrays.q.shape
    G, length = arrays.k.shape[2], whole(L, config.T)
    tokens = tpu_tiles.tokens(arrays, config.C, length)
    shape = _shape(arrays, options, config, tokens is not None)
    given = {"tokens": tokens, "tokens_before": tokens}
    given |= {"before": _state(shape, arrays) if shape.state else None}
    given |= {n: _by_head(getattr(arrays, n), length) for n in "qkv"}
    given |= {n: _map(getattr(arrays, n), arrays.q.dtype) for n in ("q_map", "k_map")}
    given |= {n: _bias(getattr(arrays, n)) for n in ("q_bias", "k_bias")}
    operands = dispatch.vary(*(given[n] for n in names(shape)))
    operands = dict(zip(names(shape), operands, strict=True))
    o, total, state = _call(shape, _Grid(shape, B, H, G), operands)
    values, keys = _taken(shape, state[:, :: H // G // shape.R])
    return o[:, :, :L].swapaxes(1, 2), total[:, :, 0, :L].swapaxes(1, 2), values, keys


def executions(arrays: Arrays, options: Options, config) -> list[float]:
    """Runs of the program's heavy pieces in one call, in its order, cores together.

    The second piece makes a block's features again; for |z| below 41 it never runs.
    """
    (B, _, H, _), G = arrays.q.shape, arrays.k.shape[2]
    grid = _Grid(_shape(arrays, options, config, False), B, H, G)
    steps = float(grid.parts * (grid.length + 1))
    return [steps, 0.0] if options.features in ("softmax", "joint") else [steps]


def _shape(arrays: Arrays, options: Options, config, masked: bool) -> Shape:
    mapped, (L, _, K) = arrays.q_map is not None, arrays.q.shape[1:]
    return Shape(
        *(options.features, config.T, config.C, config.heads, config.R),
        f=arrays.q_map.shape[2] if mapped else K,
        V=arrays.v.shape[3],
        steps=whole(L, config.T) // config.T,
        masked=masked,
        mapped=mapped,
        biased=arrays.q_bias is not None,
        state=arrays.values is not None,
    )


class _Grid:
    """Where step m of part p is: which rows of which heads.

    A row of blocks is that of `heads` key heads with R query heads each; where a key head has more
    query heads than that, it has more rows, and each sums up its state.
    """

    def __init__(self, shape: Shape, B: int, H: int, G: int):
        self.shape, self.groups = shape, H // G // shape.R
        self.across = G // shape.heads * self.groups
        cores = pltpu.get_tpu_info().num_cores
        self.parts = cores if B * self.across % cores == 0 else 1
        self.rows = B * self.across // self.parts
        self.length = self.rows * shape.steps

    def spec(self, size, place, before: bool = False):
        """Of a block whose indices are `place(batch, row across heads, block of tokens)`."""
        steps = self.shape.steps

        def at(p, m):
            m = jnp.maximum(m - 1, 0) if before else jnp.minimum(m, self.length - 1)
            row = p * self.rows + jax.lax.div(m, steps)
            b, x = jax.lax.div(row, self.across), jax.lax.rem(row, self.across)
            return place(b, x, jax.lax.rem(m, steps))

        return pl.BlockSpec(size, at)

    def tokens(self, name: str, x):
        """Of an operand."""
        shape, groups, queries = self.shape, self.groups, name[0] == "q"
        heads = shape.heads * (shape.R if queries else 1)
        own = lambda x: x if queries else jax.lax.div(x, groups)
        if name.startswith("tokens"):
            at = lambda b, x, t: (b, 0, t)
            return self.spec((None, x.shape[1], shape.T), at, name == "tokens_before")
        if name == "before":
            at = lambda b, x, t: (b, own(x), 0, 0)
            return self.spec((None, heads, *x.shape[2:]), at, True)
        if name in "qkv":
            at = lambda b, x, t: (b, own(x), t, 0)
            return self.spec((None, heads, shape.T, x.shape[3]), at)
        return self.spec((heads, *x.shape[1:]), lambda b, x, t: (own(x), 0, 0))


def _call(shape: Shape, grid: _Grid, operands):
    (B, H, length, K), dtype = operands["q"].shape, operands["q"].dtype
    heads, rows, n = shape.heads * shape.R, shape.values + ROWS, shape.items
    token = lambda b, x, t: (b, x, t, 0)
    # Small arrays might else be placed in VMEM whole, and the vector unit move their blocks.
    place = lambda name, x: pltpu.with_memory_space_constraint(x, pltpu.HBM) if name in "qkv" else x
    pairs = B * length * grid.across * (heads + shape.heads)
    return pl.pallas_call(
        functools.partial(kernel, shape=shape),
        name=NAME,
        grid=(grid.parts, grid.length + 1),
        in_specs=[grid.tokens(name, x) for name, x in operands.items()],
        out_specs=[
            grid.spec((None, heads, shape.T, shape.V), token, True),
            grid.spec((None, heads, 1, shape.T), lambda b, x, t: (b, x, 0, t), True),
            grid.spec((None, shape.heads, rows, shape.F), lambda b, x, t: (b, x, 0, 0), True),
        ],
        out_shape=[
            pltpu.HBM((B, H, length, shape.V), dtype),
            pltpu.HBM((B, H, 1, length), jnp.float32),
            pltpu.HBM((B, shape.heads * grid.across, rows, shape.F), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((n, shape.R, shape.F, shape.C), dtype),
            pltpu.VMEM((n, shape.C, shape.F), dtype),
            pltpu.VMEM((n, shape.values, shape.C), dtype),
        ],
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (K * shape.f * shape.mapped + shape.F * (shape.V + 1)),
            transcendentals=pairs * shape.F,
            bytes_accessed=sum(x.nbytes for x in operands.values()) + operands["q"].nbytes,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8,
        ),
    )(*(place(name, x) for name, x in operands.items()))


def _by_head(x, length: int):
    """[B L H K] -> [B H length K]: XLA's projections can write this order as they are."""
    return _filled(x, length, 1).swapaxes(1, 2)


def _map(weight, dtype):
    """[H K f] -> [H f K], filled up to whole tiles of features."""
    return None if weight is None else _filled(weight.astype(dtype).swapaxes(1, 2), ROWS, 1)


def _bias(bias):
    """[H f] -> [H f 128], float32, every lane alike."""
    if bias is None:
        return None
    bias = bias.astype(jnp.float32)[:, :, None]
    return _filled(jnp.broadcast_to(bias, (*bias.shape[:2], LANES)), ROWS, 1)


def _filled(x, unit: int, dim: int):
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % unit)
    return jnp.pad(x, widths) if widths[dim][1] else x


def _state(shape: Shape, arrays: Arrays):
    """values [B G F V] and keys [B G F] as the kernel holds them, [B G V + ROWS, F]."""
    values = _filled(arrays.values.swapaxes(2, 3), ROWS, 2)
    keys = jnp.repeat(arrays.keys[:, :, None], ROWS, 2)
    state = jnp.concatenate([values, keys], 2).astype(jnp.float32)
    return jnp.concatenate([_filled(x, ROWS, 3) for x in _halves(shape, state)], 3)


def _taken(shape: Shape, state):
    """values [B G F V] and keys [B G F] of what the kernel holds."""
    state = jnp.concatenate([x[..., : shape.f] for x in _halves(shape, state)], 3)
    return state[:, :, : shape.V].swapaxes(2, 3), state[:, :, shape.values]


def _halves(shape: Shape, state):
    return jnp.split(state, shape.F // whole(shape.f, ROWS), 3)
