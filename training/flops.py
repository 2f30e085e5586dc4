"""Floating-point operations, counted on the jaxpr, and what share of a chip's peak they use.

XLA's own cost analysis counts a scan's body once and knows nothing of kernels; a jaxpr names the
lengths. Shapes in a jaxpr are global, so counts are of the whole program, not of one device.
Only matrix multiplications enter the utilisation (MFU); elementwise work is given beside them.

Model FLOPs per token are three times the matmul FLOPs of a forward pass: one forward, two
backward, nothing for rematerialisation (PaLM, arXiv:2204.02311, appendix B). Two conventions
differ by whether the part of the attention square that the mask forbids is counted. `ModelFlops`
names both: `full_square` (PaLM, and MaxText before its change) and `visible`, without the
forbidden pairs, the causal half. MFU here means `visible`: work that a better kernel may skip is
not useful work, and a run must not score higher for doing it. Quote `full_square` only to compare
with numbers published in that convention.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

# Dense bfloat16 peak of one JAX device, FLOP/s, by the exact `device_kind`. TPUs: Google Cloud's
# page of each generation (docs.cloud.google.com/tpu/docs), per chip; a TPU7x chip (2307e12) shows
# itself as two devices. NVIDIA: data sheets, without sparsity, at full power. Variants that are
# slower or cut (PCIe, NVL, MIG slices) have other names and are not guessed.
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}
_ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma "
    "div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p "
    "logistic lt max min mul ne neg nextafter not or pow rem round rsqrt select_n sign sin sinh "
    "sqrt square sub tan tanh xor"
)
_REDUCTIONS = (
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min "
    "reduce_or reduce_prod reduce_sum reduce_xor"
)
# Work that no formula here covers: named in `unknown` rather than passed over in silence.
_OPAQUE = "cholesky core_map custom_call eig eigh ffi_call lu qr schur svd triangular_solve"
_KIND = {
    name: kind
    for kind, names in (("map", _ELEMENTWISE), ("reduce", _REDUCTIONS), ("opaque", _OPAQUE))
    for name in names.split()
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """matmul, elementwise: operations. unknown: what was counted once or as nothing, in words."""

    matmul: int = 0
    elementwise: int = 0
    unknown: tuple[str, ...] = ()

    def __add__(self, other):
        unknown = tuple(sorted({*self.unknown, *other.unknown}))
        return Flops(self.matmul + other.matmul, self.elementwise + other.elementwise, unknown)

    def __mul__(self, times):
        return Flops(self.matmul * times, self.elementwise * times, self.unknown)


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Of one token. forward: matmul FLOPs of a forward pass that computes full attention squares;
    masked: those of them spent on pairs that the mask forbids (mixers know theirs)."""

    forward: float
    masked: float = 0.0

    @property
    def full_square(self) -> float:
        """Training FLOPs of a token, every pair of the attention square counted."""
        return 3 * self.forward

    @property
    def visible(self) -> float:
        """Training FLOPs of a token without the masked pairs (the causal half): MFU's numerator."""
        return 3 * (self.forward - self.masked)


def count(fn, *args, trips: int | None = None) -> Flops:
    """The FLOPs of fn(*args), counted on its jaxpr; nothing is computed and no array is made.

    args: arrays or ShapeDtypeStructs, with their shardings. trips: how often each while loop runs
    whose trip count the jaxpr does not say; without it such a loop counts once and is named in
    `unknown`.

    A scan counts length times its body; a cond its dearest branch; a shard_map all its shards; a
    Pallas call what its CostEstimate says, otherwise nothing and it is named in `unknown`. Work
    whose result nobody uses is not counted, as the compiler drops it. Convolutions do not count
    padding; FFTs count 5 n log2 n, under elementwise.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr(jaxpr, trips)


def model(forward, *args, tokens: int, masked: float = 0.0) -> ModelFlops:
    """The model FLOPs of a token, from a forward pass over `tokens` tokens.

    forward: without remat, and with the implementation that computes full attention squares (the
    reference one): a kernel's estimate may have left the masked pairs out already.
    masked: FLOPs a token spent on forbidden pairs, summed over the attention layers.
    Raises ValueError when part of the forward pass cannot be counted.
    """
    flops = count(forward, *args)
    if flops.unknown:
        raise ValueError(
            f"The model's FLOPs are not known, because of: {'; '.join(flops.unknown)}."
        )
    return ModelFlops(flops.matmul / tokens, masked)


def peak(device_kind: str, dtype="bfloat16") -> float | None:
    """Dense peak FLOP/s of one JAX device, or None where it is not in the table: never a guess."""
    return _PEAK.get(device_kind) if np.dtype(dtype) == jax.numpy.bfloat16 else None


def mfu(
    flops_per_token: float, tokens_per_second: float, device_kind: str, devices: int
) -> float | None:
    """Model FLOPs utilisation: a share of the bfloat16 peak of all devices, None if it is unknown.

    flops_per_token: `ModelFlops.visible`. tokens_per_second: of the whole run, over all devices.
    """
    each = peak(device_kind)
    return None if each is None else flops_per_token * tokens_per_second / (each * devices)


def _jaxpr(jaxpr, trips) -> Flops:
    return sum((_equation(e, trips) for e in jaxpr.eqns), Flops())


def _equation(eqn, trips) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    walk = functools.partial(_jaxpr, trips=trips)
    if name in _MATMULS:
        return Flops(matmul=_MATMULS[name](eqn))
    if _KIND.get(name) == "map":
        return Flops(elementwise=_size(eqn.outvars[0]))
    if _KIND.get(name) == "reduce":
        return Flops(elementwise=_size(eqn.invars[0]))
    if name == "fft":
        n = math.prod(params["fft_lengths"])
        size = max(_size(eqn.invars[0]), _size(eqn.outvars[0]))
        return Flops(elementwise=round(5 * size * math.log2(max(n, 2))))
    if name == "scan":
        return walk(_open(params["jaxpr"])) * params["length"]
    if name == "cond":
        branches = [walk(_open(b)) for b in params["branches"]]
        return max(branches, key=lambda f: (f.matmul, f.elementwise))
    if name == "while":
        return _while(eqn, trips)
    if name == "shard_map":
        shards = math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"])
        return walk(_open(params["jaxpr"])) * shards
    if name == "pallas_call":
        return _pallas(params)
    if _KIND.get(name) == "opaque":
        return Flops(unknown=(f"{name}, counted as nothing",))
    if name.startswith(("scatter", "reduce", "select_and_")):
        return Flops(elementwise=_size(eqn.invars[-1]))  # their jaxprs are of scalars
    if name == "linear_call":
        return walk(_open(params["callee"]))  # its other jaxpr is the transpose
    return sum((walk(_open(p)) for p in params.values() if _is_jaxpr(p)), Flops())


def _is_jaxpr(x) -> bool:
    return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))


def _open(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _size(var) -> int:
    return math.prod(var.aval.shape)


def _dot(eqn) -> int:
    """2 * batch * M * N * K."""
    (contract, _), _ = eqn.params["dimension_numbers"]
    return 2 * _size(eqn.outvars[0]) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)


def _ragged_dot(eqn) -> int:
    """Every row meets one group's matrix; with a ragged contraction, every group its own rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    flops = 2 * _size(eqn.outvars[0]) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
    if set(numbers.lhs_ragged_dimensions) & set(contract):
        flops //= eqn.invars[2].aval.shape[-1]
    return flops


def _conv(eqn) -> int:
    """2 * batch * channels out * channels in a group * (output, tap) pairs that meet an input."""
    numbers = eqn.params["dimension_numbers"]
    x, kernel, out = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    flops = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    for i, window in enumerate(zip(*(eqn.params[k] for k in keys), strict=True), start=2):
        sizes = x[numbers.lhs_spec[i]], kernel[numbers.rhs_spec[i]], out[numbers.out_spec[i]]
        flops *= _pairs(*sizes, *window)
    return flops


def _pairs(inputs, taps, outputs, stride, pad, hole, spread) -> int:
    """How many (output, tap) pairs of one dimension fall on an input, not on padding or a hole."""
    few, many = sorted(((taps, spread), (outputs, stride)))
    total = 0
    for i in range(few[0]):
        at = i * few[1] + np.arange(many[0]) * many[1] - pad[0]
        total += int(np.sum((at >= 0) & (at <= (inputs - 1) * hole) & (at % hole == 0)))
    return total


_MATMULS = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}


def _pallas(params) -> Flops:
    estimate = params.get("cost_estimate")
    if estimate is None:
        kernel = params.get("name") or "without a name"
        return Flops(unknown=(f"Pallas kernel {kernel} gives no CostEstimate, counted as nothing",))
    return Flops(matmul=int(estimate.flops), elementwise=int(estimate.transcendentals))


def _while(eqn, trips) -> Flops:
    body, condition = (_jaxpr(_open(eqn.params[k]), trips) for k in ("body_jaxpr", "cond_jaxpr"))
    times = _trip_count(eqn)
    times = trips if times is None else times
    if times is not None:
        return (body + condition) * times
    return body + condition + Flops(unknown=("a while loop of unknown trip count, counted once",))


def _trip_count(eqn) -> int | None:
    """Trips of `while i < n: i += step` with constants all around, None for any other loop."""
    consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    start = eqn.invars[sum(consts) :]
    seen, inside = condition.invars[consts[0] :], body.invars[consts[1] :]
    if [e.primitive.name for e in condition.eqns] != ["lt"]:
        return None
    i, n = condition.eqns[0].invars
    if isinstance(i, core.Literal) or i not in seen:
        return None
    k = seen.index(i)
    if not isinstance(n, core.Literal):
        if n not in seen or body.outvars[seen.index(n)] is not inside[seen.index(n)]:
            return None
        n = start[seen.index(n)]
    made = [e for e in body.eqns if body.outvars[k] in e.outvars]
    if len(made) != 1 or made[0].primitive.name != "add" or made[0].invars[0] is not inside[k]:
        return None
    values = (start[k], n, made[0].invars[1])
    if not all(isinstance(v, core.Literal) for v in values):
        return None
    first, last, step = (int(v.val) for v in values)
    return max(0, -(-(last - first) // step)) if step > 0 else None
