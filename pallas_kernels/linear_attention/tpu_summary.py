"""The state of a piece of a row on a TensorCore: key features and one product, and back.

Tokens are lanes, as in the kernels of the whole operation, so that features [F, T] are what the
state's product with values [T, V] takes, and a mask is one row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import tpu_tiles
from pallas_kernels.linear_attention.tpu_tiles import LANES, ROWS, folded, whole
from pallas_kernels.products import NN, NT, dot

TOKENS = 512  # a step of the grid


def forward(form: str, k, v, k_map, k_bias, adds):
    """values [B G F V] and keys [B G F], as `summary.forward`."""
    operands, sizes = _operands(form, k, v, k_map, k_bias, adds)
    B, G, length, T, F = sizes
    V = v.shape[3]
    state = lambda width: pl.BlockSpec((None, None, F, width), lambda b, g, t: (b, g, 0, 0))
    values, keys = pl.pallas_call(
        functools.partial(_forward, form=form, names=tuple(operands)),
        name="linear_attention_summary",
        grid=(B, G, length // T),
        in_specs=_specs(operands, T, lambda b, g, t: (b, g, t)),
        out_specs=[state(V), state(LANES)],
        out_shape=[jax.ShapeDtypeStruct((B, G, F, w), jnp.float32) for w in (V, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
    )(*operands.values())
    return values, jnp.sum(keys, -1)


def backward(form: str, k, v, k_map, k_bias, adds, dvalues, dkeys):
    """Gradients of k, v, k_map and k_bias, as `summary.backward`."""
    operands, (B, G, length, T, _) = _operands(form, k, v, k_map, k_bias, adds)
    operands |= dict(dvalues=dvalues.astype(v.dtype), dkeys=dkeys[..., None].astype(jnp.float32))
    L, K = k.shape[1], k.shape[3]
    at = lambda g, b, t: (b, g, t)
    outputs = {n: operands[n] for n in ("k", "v")}
    if k_map is not None:
        outputs["k_map"] = jax.ShapeDtypeStruct((G, k_map.shape[2], K), jnp.float32)
    if k_bias is not None:
        outputs["k_bias"] = jax.ShapeDtypeStruct((G, k_bias.shape[1], LANES), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_backward, form=form, names=tuple(operands), outputs=tuple(outputs)),
        name="linear_attention_summary_back",
        grid=(G, B, length // T),
        in_specs=_specs(operands, T, at),
        out_specs=_specs(outputs, T, at),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
    )(*operands.values())
    found = dict(zip(outputs, found, strict=True))
    dk, dv = (found[n][:, :, :L].swapaxes(1, 2) for n in ("k", "v"))
    dmap = None if k_map is None else found["k_map"].swapaxes(1, 2)
    return dk, dv, dmap, None if k_bias is None else jnp.sum(found["k_bias"], -1)


def _operands(form: str, k, v, k_map, k_bias, adds):
    """The kernels' arguments by name, and B, G, length, T and F.

    Raises NotImplementedError for what they are not made for.
    """
    (B, L, G), f = k.shape[:3], k.shape[3] if k_map is None else k_map.shape[2]
    if form not in tpu_tiles.FORMS or k.dtype not in (jnp.float32, jnp.bfloat16) or f % ROWS:
        raise NotImplementedError(
            f"tpu_summary has features {', '.join(tpu_tiles.FORMS)}, a multiple of {ROWS} of them, "
            f"of float32 or bfloat16, and not {form} of width {f} of {k.dtype}."
        )
    T = min(TOKENS, whole(L, LANES))
    length = whole(L, T)
    if length > L and adds is None:
        adds = jnp.ones((B, L), bool)
    fill = lambda x: jnp.pad(x, [(0, 0), (0, length - L)] + [(0, 0)] * (x.ndim - 2))
    operands = {"k": fill(k).swapaxes(1, 2), "v": fill(v).swapaxes(1, 2)}
    if adds is not None:
        operands["adds"] = fill(adds)[:, None].astype(jnp.float32)
    if k_map is not None:
        operands["k_map"] = k_map.swapaxes(1, 2).astype(k.dtype)
    if k_bias is not None:
        operands["k_bias"] = k_bias[:, :, None].astype(jnp.float32)
    return operands, (B, G, length, T, tpu_tiles.width(form, f))


def _specs(arrays, T: int, at):
    """at: of the grid's indices, batch, head and step."""

    def spec(name, x):
        if name in ("k", "v"):
            return pl.BlockSpec((None, None, T, x.shape[3]), lambda *i: (*at(*i), 0))
        if name == "adds":
            return pl.BlockSpec((None, 1, T), lambda *i: (at(*i)[0], 0, at(*i)[2]))
        if x.ndim == 3:
            return pl.BlockSpec((None, *x.shape[1:]), lambda *i: (at(*i)[1], 0, 0))
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda *i: (*at(*i)[:2], 0, 0))

    return [spec(name, x) for name, x in arrays.items()]


def _forward(*refs, form: str, names):
    given, (values, keys) = dict(zip(names, refs, strict=False)), refs[len(names) :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        values[...] = jnp.zeros_like(values)
        keys[...] = jnp.zeros_like(keys)

    _, phi = _features(form, given)
    phi = phi.astype(given["k"].dtype)
    values[...] += dot(phi, given["v"][...], NN)
    keys[...] += folded(phi.astype(jnp.float32))


def _backward(*refs, form: str, names, outputs):
    given = dict(zip(names, refs, strict=False))
    out = dict(zip(outputs, refs[len(names) :], strict=True))

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        for name in outputs[2:]:
            out[name][...] = jnp.zeros_like(out[name])

    k, dvalues = given["k"][...], given["dvalues"][...]
    z, phi = _features(form, given)
    dphi = dot(dvalues, given["v"][...], NT) + given["dkeys"][...]
    dphi = dphi * given["adds"][...] if "adds" in given else dphi
    dz = tpu_tiles.features_back(form, z, phi, dphi, z.shape[0])
    out["v"][...] = dot(phi.T.astype(k.dtype), dvalues, NN).astype(k.dtype)
    if "k_map" not in given:
        out["k"][...] = dz.T.astype(k.dtype)
        return
    out["k"][...] = dot(dz.T.astype(k.dtype), given["k_map"][...], NN).astype(k.dtype)
    out["k_map"][...] += dot(dz.astype(k.dtype), k, NN)
    if "k_bias" in given:
        out["k_bias"][...] += folded(dz)


def _features(form: str, given):
    """z [f, T] and features [F, T], float32, 0 for tokens that do not count."""
    k = given["k"][...]
    z = dot(given["k_map"][...], k, NT) if "k_map" in given else k.T.astype(jnp.float32)
    z = z + given["k_bias"][...] if "k_bias" in given else z
    real = given["adds"][...] if "adds" in given else None
    return z, tpu_tiles.features(form, z, z.shape[0], real)
