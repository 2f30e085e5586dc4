"""The calls of the TPU's backward kernels: what of each array a step of the grid has."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.tpu_backward_kernel import Plan, kernel, states_kernel

NAME = "linear_attention_backward"
STATES = f"{NAME}_states"
MOST = 16  # pieces of work a step: programs as long as the compiler takes in its stride
BIG = ("q", "k", "v", "g", "states")


def states(plan: Plan, given: dict) -> dict:
    """The keys' states before each chunk, [B G N F V] in v's dtype and [B G N 1 F]."""
    names = ["tokens"] * plan.masked + ["k", "v"] + ["k_map"] * plan.mapped
    names += ["k_bias"] * plan.biased + ["values", "keys"]
    (B, G, L, _), (F, V) = given["k"].shape, given["values"].shape[2:]
    outputs = {
        "states": jax.ShapeDtypeStruct((B, G, L // plan.C, F, V), given["v"].dtype),
        "counts": jax.ShapeDtypeStruct((B, G, L // plan.C, 1, F), jnp.float32),
    }
    plan = dataclasses.replace(plan, groups=1, T=states_step(plan.T, plan.C, L))
    return _call(plan, STATES, states_kernel, given, names, outputs, [(F, V), (1, F)])


def states_step(T: int, C: int, length: int) -> int:
    """Tokens a step of `states`: whole steps of T, of which some are one where they are short."""
    return T * max(n for n in range(1, max(1, MOST * C // T) + 1) if length // T % n == 0)


def gradients(plan: Plan, given: dict) -> dict:
    """The gradients by name, as the kernel writes them: of each group of heads where they share."""
    maps = ["q_map", "k_map"] * plan.mapped + ["q_bias", "k_bias"] * plan.biased
    names = ["tokens"] * plan.masked + ["q", "k", "v", "g", "e", *maps]
    names += ["states", "counts", "last_values", "last_keys"]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    n, outputs = plan.groups, {"dq": like(given["q"])}
    for name in ("k", "v"):
        B, G, *rest = given[name].shape
        dtype = given[name].dtype if n == 1 else jnp.float32  # of parts of a sum
        outputs[f"d{name}"] = jax.ShapeDtypeStruct((B, G * n, *rest), dtype)
    for name in maps:
        H, *rest = given[name].shape
        H = H * n if name[0] == "k" else H
        outputs[f"d{name}"] = jax.ShapeDtypeStruct((B, H, *rest), jnp.float32)
    last = given["last_values"], given["last_keys"]
    if plan.state:
        outputs |= {"dvalues": like(last[0]), "dkeys": like(last[1])}
    return _call(plan, NAME, kernel, given, names, outputs, [x.shape[2:] for x in last])


def _call(plan: Plan, name: str, body, given: dict, inputs, outputs: dict, sums) -> dict:
    B, G = given["k"].shape[:2]
    N = given["k"].shape[2] // plan.T
    varying = jax.typeof(given["k"]).manual_axis_type
    spec = functools.partial(_block, plan, G * plan.groups, N, body is kernel)
    # Copies of small arrays in VMEM would be moved by the vector unit.
    far = lambda n, x: pltpu.with_memory_space_constraint(x, pltpu.HBM) if n in BIG else x
    found = pl.pallas_call(
        functools.partial(body, plan, [*inputs, *outputs, "sum_values", "sum_keys"]),
        name=name,
        grid=(B * G * plan.groups, N),
        in_specs=[spec(n, given[n].shape) for n in inputs],
        out_specs=[spec(n, x.shape) for n, x in outputs.items()],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
            for x in outputs.values()
        ],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        cost_estimate=_cost(plan, given, inputs, outputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes,
        ),
    )(*(far(n, given[n]) for n in inputs))
    return dict(zip(outputs, found, strict=True))


def _cost(plan: Plan, given: dict, inputs, outputs: dict) -> pl.CostEstimate:
    """Of all products, those with what the masks leave out too."""
    (B, G, L, K), V, F = given["k"].shape, given["v"].shape[3], plan.F
    project, state, tokens = K * plan.f * plan.mapped, F * V, B * G * plan.groups * L
    products, features = project + state, F
    if "dq" in outputs:
        head = 3 * project + 2 * state
        products = head + plan.R * (head + plan.C * (3 * F + 2 * V))
        features = F * (1 + plan.R)
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize
    moved = sum(map(size, [*(given[n] for n in inputs), *outputs.values()]))
    return pl.CostEstimate(
        flops=2 * tokens * products, transcendentals=tokens * features, bytes_accessed=moved
    )


def _block(plan: Plan, heads: int, N: int, back: bool, name: str, shape) -> pl.BlockSpec:
    """What a step of the grid (batch and groups of heads, steps along the row) has of an array."""
    batch, group = (lambda i: jax.lax.div(i, heads)), lambda i: jax.lax.rem(i, heads)
    own = lambda i: jax.lax.div(group(i), plan.groups)  # the key head
    step = lambda n: N - 1 - n if back else n
    R, T, m = plan.R, plan.T, plan.m
    match name:
        case "tokens":
            return pl.BlockSpec((None, 8, T), lambda i, n: (batch(i), 0, step(n)))
        case "q" | "g" | "dq":
            at = lambda i, n: (batch(i), group(i), step(n), 0)
            return pl.BlockSpec((None, R, T, shape[3]), at)
        case "e":
            return pl.BlockSpec((None, R, 1, T), lambda i, n: (batch(i), group(i), 0, step(n)))
        case "k" | "v":
            at = lambda i, n: (batch(i), own(i), step(n), 0)
            return pl.BlockSpec((None, None, T, shape[3]), at)
        case "dk" | "dv":
            at = lambda i, n: (batch(i), group(i), step(n), 0)
            return pl.BlockSpec((None, None, T, shape[3]), at)
        case "states" | "counts":
            at = lambda i, n: (batch(i), own(i), step(n), 0, 0)
            return pl.BlockSpec((None, None, m, *shape[3:]), at)
        case "values" | "keys" | "dvalues" | "dkeys" | "last_values" | "last_keys":
            at = lambda i, n: (batch(i), group(i), 0, 0)
            return pl.BlockSpec((None, None, *shape[2:]), at)
        case "q_map" | "q_bias":
            return pl.BlockSpec((R, *shape[1:]), lambda i, n: (group(i), 0, 0))
        case "k_map" | "k_bias":
            return pl.BlockSpec((None, *shape[1:]), lambda i, n: (own(i), 0, 0))
    R = R if name in ("dq_map", "dq_bias") else None
    return pl.BlockSpec((None, R, *shape[2:]), lambda i, n: (batch(i), group(i), 0, 0))
