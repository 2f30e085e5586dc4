"""The forward pass on Hopper: one kernel, and before it one for the states between pieces of rows.

Where batch and heads are fewer than multiprocessors, rows are cut into pieces. A first pass sums up
the keys of each, XLA adds these sums to each other, and the pieces start with what came before.
Source: the chunked form of arXiv 2006.16236 with its feature maps inside, as ThunderKittens
(arXiv 2410.20399) has it for one form.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.linear_attention import gpu_maps
from pallas_kernels.linear_attention.gpu_forward_block import KEPT, MIXED, C, Shape
from pallas_kernels.linear_attention.gpu_forward_chunk import Forward
from pallas_kernels.linear_attention.gpu_forward_keys import States
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.state import held

WITH_QUERIES = ("q", "q_map", "q_bias", "values_before", "keys_before")


def forward(arrays: Arrays, options: Options, config):
    """o, total, values and keys, as `reference.forward`; `config` as `pallas_gpu.Config`.

    Raises:
      ValueError: the configuration does not fit shared memory.
    """
    shape = sizes(arrays, options, config.stages, config.pieces)
    need = Forward.shared(shape)
    if need > gpu_tiles.SHARED:
        raise ValueError(
            f"{shape.stages} stages of keys of {shape.K} columns, with maps to {shape.F} features, "
            f"take {need} bytes of shared memory, of which there are {gpu_tiles.SHARED}: use fewer "
            f"stages, or smaller heads or maps."
        )
    inputs = _inputs(shape, arrays)
    if shape.pieces > 1:
        inputs |= _between(shape, inputs, arrays)
        shape = dataclasses.replace(shape, started=True)
    o, total, values, keys = _call(Forward, shape, inputs)
    values, keys = narrow(shape, values)[:, :, : arrays.v.shape[3]], narrow(shape, keys)
    total = total[:, :, : shape.L].swapaxes(1, 2)
    return o[:, : shape.L, :, : arrays.v.shape[3]], total, values.swapaxes(2, 3), keys


def sizes(arrays: Arrays, options: Options, stages: int, pieces: int) -> Shape:
    """The kernel's sizes for these arguments."""
    (B, L, H, K), (G, V) = arrays.q.shape, arrays.v.shape[2:]
    mapped = arrays.q_map is not None
    width = arrays.q_map.shape[-1] if mapped else K
    f = up(width)
    # Beside a state of more features there are registers for the maps of one array, not of both.
    V = up(V, 128 if f * gpu_maps.HALVES.get(options.features, 1) > 128 else 64)
    W = 2 if V % 128 == 0 else 1
    # Two heads of one warpgroup each, where shared memory has room for both.
    make = lambda teams: Shape(
        B=B, L=L, H=H, G=G, K=up(K), V=V, f=f, width=width, form=options.features,
        W=W, teams=teams, pieces=pieces, stages=stages, mapped=mapped,
        biased=arrays.q_bias is not None, started=arrays.values is not None,
        segments=arrays.q_segments is not None, dtype=arrays.q.dtype,
    )  # fmt: skip
    both = make(2)
    fits = W == 1 and H % 2 == 0 and Forward.shared(both) <= gpu_tiles.SHARED
    shape = both if fits else make(1)
    return dataclasses.replace(shape, pieces=-(-shape.N // shape.chunks))


def up(size: int, unit: int = 64) -> int:
    """Rounded up to the columns of a tile; TMA takes rows in eights."""
    return -(-size // unit) * unit


def widen(shape: Shape, x):
    """[.. F] with the features of padding, 0, behind each half."""
    halves = x.reshape(*x.shape[:-1], shape.F // shape.f, shape.width)
    return pad(halves, -1, shape.f).reshape(*x.shape[:-1], shape.F)


def narrow(shape: Shape, x):
    """[.. F] without the features of padding."""
    halves = x.reshape(*x.shape[:-1], shape.F // shape.f, shape.f)
    return halves[..., : shape.width].reshape(*x.shape[:-1], -1)


def pad(x, axis: int, size: int):
    width = [(0, 0)] * x.ndim
    width[axis] = 0, size - x.shape[axis]
    return x if width[axis][1] == 0 else jnp.pad(x, width)


def _inputs(shape: Shape, arrays: Arrays) -> dict:
    """The kernel's arguments by name."""
    inputs = dict(zip("qkv", map(gpu_tiles.pad, arrays[:3]), strict=True))
    inputs["v"] = pad(inputs["v"], 3, shape.V)
    for name in "qk":
        if shape.mapped:
            weight = getattr(arrays, f"{name}_map").astype(shape.dtype)
            inputs[f"{name}_map"] = pad(pad(weight, 1, shape.K), 2, shape.f)
        if shape.biased:
            bias = getattr(arrays, f"{name}_bias").astype(jnp.float32)
            inputs[f"{name}_bias"] = pad(bias, 1, shape.f)
    inputs |= _segments(shape, arrays) if shape.segments else _ends(shape)
    if shape.started:
        values = pad(widen(shape, arrays.values.swapaxes(2, 3)), 2, shape.V)
        keys = widen(shape, arrays.keys)
        inputs |= dict(values_before=values[:, :, None], keys_before=keys[:, :, None])
    return inputs


def _ends(shape: Shape) -> dict:
    """Keys that are added to the state: of every chunk, and of the last; [1 2 8 C]."""
    last = jnp.arange(C) < shape.L - (shape.N - 1) * C
    adds = jnp.stack([jnp.ones_like(last), last])[None, :, None]
    return dict(adds=jnp.broadcast_to(adds, (1, 2, 8, C)).astype(shape.dtype))


def _segments(shape: Shape, arrays: Arrays) -> dict:
    """Segments, doubled, and 1 more for queries that see the state and keys that are added to it.

    flags [B N]: KEPT and MIXED.  adds [B N 8 C]: 1 for the keys that are added.
    """
    q, kv = (gpu_tiles.lengthen(x, C) for x in (arrays.q_segments, arrays.kv_segments))
    has, q, kv = _held(shape, arrays), _chunks(shape, q), _chunks(shape, kv)
    uses = (q == has[:, :-1, None]) & (q != 0)
    adds = (kv == has[:, 1:, None]) & (kv != 0)
    rows = lambda x: x.reshape(shape.B, -1)
    flags = KEPT * (has[:, 1:] == has[:, :-1]) + MIXED * ~adds.all(2)
    wide = jnp.broadcast_to(adds[:, :, None], (shape.B, shape.N, 8, C))
    return dict(
        q_segments=rows(2 * q + uses),
        kv_segments=rows(2 * kv + adds),
        flags=flags,
        adds=wide.astype(shape.dtype),
    )


def _held(shape: Shape, arrays: Arrays):
    before = jnp.zeros(shape.B, jnp.int32) if arrays.segment is None else arrays.segment
    return held(gpu_tiles.lengthen(arrays.kv_segments, C), before, C)


def _chunks(shape: Shape, x):
    return x.reshape(shape.B, shape.N, C)


def _between(shape: Shape, inputs: dict, arrays: Arrays) -> dict:
    """values_before [B G P V F] and keys_before [B G P F], the states that pieces begin with."""
    own = {n: x for n, x in inputs.items() if n not in WITH_QUERIES}
    own_shape = dataclasses.replace(shape, H=shape.G, teams=1 if shape.G % 2 else shape.teams)
    sums = _call(States, own_shape, own)
    B, P = shape.B, shape.pieces
    keeps = jnp.ones((B, P), bool)
    if shape.segments:
        at = jnp.minimum(jnp.arange(P + 1) * shape.chunks, shape.N)
        has = _held(shape, arrays)[:, at]
        keeps = has[:, 1:] == has[:, :-1]
    before = []
    for name, x in zip(("values_before", "keys_before"), sums, strict=True):
        states = [inputs[name][:, :, 0] if shape.started else jnp.zeros_like(x[:, :, 0])]
        for p in range(P - 1):
            keep = keeps[:, p].reshape(B, *(1,) * (states[-1].ndim - 1))
            states.append(x[:, :, p] + jnp.where(keep, states[-1], 0))
        before.append((name, jnp.stack(states, 2)))
    return dict(before)


def _call(form, shape: Shape, inputs: dict):
    """Runs `Forward` or `States`."""
    float32 = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    B, G, V, F, pieces = shape.B, shape.G, shape.V, shape.F, shape.pieces
    if form is Forward:
        o = jax.ShapeDtypeStruct((B, up(shape.L, 8), shape.H, V), shape.dtype)
        out = dict(o=o, total=float32(B, shape.H, shape.N * C))
        out |= dict(values=float32(B, G, V, F), keys=float32(B, G, F))
    else:
        pieces -= 1  # nothing begins after the last
        out = dict(values=float32(B, G, pieces, V, F), keys=float32(B, G, pieces, F))
    names = (*inputs, *out)

    def body(*refs, **scratch):
        form(shape, **dict(zip(names, refs, strict=True)), **scratch).run()

    kernel = plgpu.kernel(
        body,
        out_type=list(out.values()),
        grid=(shape.H // shape.teams, B, pieces, V // (64 * shape.W)),
        grid_names=("head", "batch", "piece", "values"),
        num_threads=shape.W * shape.teams + 1,
        thread_name="group",
        kernel_name="linear_attention_forward" + ("" if form is Forward else "_states"),
        scratch_types=form.scratch(shape),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(*inputs.values())
