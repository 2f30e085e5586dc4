"""A way to compute an op: its results, its seconds, its memory; written in JAX or in torch.

Times are of the device: n calls in one dispatch, each of which waits for the one before, and the
whole divided by n. In JAX that is a loop inside one program whose arguments and results pass
through an optimization barrier, so that no pass of the compiler can lift, drop or merge a call; the
clock runs until the last result is ready. In torch it is n calls between two CUDA events, or on the
CPU by the clock.

A torch call is dispatched from Python, which shows where a kernel takes less than that.

The backward pass alone is timed: what it needs of the forward pass is kept beforehand.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FEW = 4  # calls
PASSES = ("forward", "backward", "both")
# Of the dtype's eps: rounding of probabilities, of the order of sums and of the result gives half
# of one; gradients go through twice as many rounded products.
ALLOWED = {"forward": 2.0, "backward": 4.0, "both": 4.0}


class Declined(Exception):
    """One sentence: why a contender does not take part."""


def imported(name: str):
    """A contender's package. Raises Declined where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Declined(f"{error.name or name} is not installed") from None


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: its spec, the dtype's name, float32 arrays, cotangent of the first result.

    differentiable: names of the arrays that get a gradient, each cast to the dtype.  rows: where a
    result counts, as padding is each contender's own affair; broadcasts against the cotangent.
    """

    spec: Any
    dtype: str
    arrays: Mapping[str, np.ndarray]
    cotangent: np.ndarray
    differentiable: Sequence[str]
    rows: np.ndarray

    @classmethod
    def of(cls, spec, dtype: str) -> "Case":
        """The spec's inputs of seed 0, and a normal cotangent that is 0 where nothing counts."""
        arrays = spec.inputs()
        run = spec.call("xla")
        like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()}
        shape = jax.eval_shape(lambda x: run(**x), like)[0].shape
        rows = np.ones(shape[:1] + (1,) * (len(shape) - 1), bool)
        if "q_segments" in arrays:
            rows = np.reshape(arrays["q_segments"] != 0, shape[:2] + (1,) * (len(shape) - 2))
        cotangent = np.random.default_rng(1).standard_normal(shape, np.float32) * rows
        return cls(spec, dtype, arrays, cotangent, spec.differentiable, rows)

    def error(self, kind: str, ours: Sequence, theirs: Sequence) -> float:
        """The greatest error of a result, root mean square over that of the reference."""
        worst = 0.0
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            if i == 0 and kind != "backward":
                x, y = np.where(self.rows, x, 0.0), np.where(self.rows, y, 0.0)
            size = max(_rms(y), np.finfo(np.float32).tiny)
            worst = max(worst, _rms(x - y) / size) if np.isfinite(x).all() else np.inf
        return worst

    @property
    def allowed(self) -> dict[str, float]:
        """Of `error`, a pass."""
        eps = float(jnp.finfo(self.dtype).eps)
        # Matrix units multiply float32 as TF32 or bfloat16 parts; what is compared is not eps.
        eps = max(eps, 2.0**-10)
        return {kind: factor * eps for kind, factor in ALLOWED.items()}


def _rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


class Jax:
    """A function of arrays by name in JAX, that returns the op's first result."""

    def __init__(self, function: Callable, case: Case):
        moving = {n: case.arrays[n] for n in case.differentiable}
        dtypes = {n: dtype for n, (_, dtype) in case.spec.abstract(case.dtype).items()}
        put = lambda arrays: {n: jnp.asarray(x, dtypes[n]) for n, x in arrays.items()}
        self._fixed = put({n: x for n, x in case.arrays.items() if n not in moving})
        self._moving = put(moving)
        self._do = jnp.asarray(case.cotangent, case.dtype)
        self._function, self._programs, self._loops = function, {}, {}

    def _program(self, kind: str):
        """(function, its arguments, the compiled function) of a pass."""
        if kind not in self._programs:
            function, arguments = self._definition(kind)
            compiled = jax.jit(function).lower(*arguments).compile()
            self._programs[kind] = function, arguments, compiled
        return self._programs[kind]

    def _definition(self, kind: str) -> tuple[Callable, tuple]:
        call = lambda moving, fixed: self._function(**moving, **fixed)
        ordered = lambda gradients: [gradients[n] for n in self._moving]
        if kind == "forward":
            return call, (self._moving, self._fixed)

        def split(moving, fixed):
            return jax.vjp(lambda moving: call(moving, fixed), moving)

        if kind == "backward":
            _, pull = jax.jit(split)(self._moving, self._fixed)
            return lambda pull, do: ordered(pull(do)[0]), (pull, self._do)

        def both(moving, fixed, do):
            o, pull = split(moving, fixed)
            return o, ordered(pull(do)[0])

        return both, (self._moving, self._fixed, self._do)

    def results(self, kind: str) -> list[np.ndarray]:
        """float32: the result, the gradients in the order of their names, or both."""
        _, arguments, compiled = self._program(kind)
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(compiled(*arguments))]

    def memory(self, kind: str) -> int | None:
        """Bytes beside the arguments: temporaries and results."""
        found = self._program(kind)[2].memory_analysis()
        return None if found is None else found.temp_size_in_bytes + found.output_size_in_bytes

    def roughly(self, kind: str) -> float:
        """Seconds of one call, from a few that are dispatched one by one."""
        _, arguments, compiled = self._program(kind)
        jax.block_until_ready(compiled(*arguments))
        calls = lambda: jax.block_until_ready([compiled(*arguments) for _ in range(FEW)])
        return _clock(calls) / FEW

    def seconds(self, kind: str, count: int) -> float:
        """Of one call, from `count` in a chain."""
        arguments = self._program(kind)[1]
        if (kind, count) not in self._loops:
            self._loops[kind, count] = self._loop(kind, count)
            jax.block_until_ready(self._loops[kind, count](*arguments))
        loop = self._loops[kind, count]
        return _clock(lambda: jax.block_until_ready(loop(*arguments))) / count

    def _loop(self, kind: str, count: int):
        function, arguments, _ = self._program(kind)
        return jax.jit(chained(function, count)).lower(*arguments).compile()

    def close(self) -> None:
        """Lets go of arrays and programs."""
        self._programs, self._loops, self._moving, self._fixed = {}, {}, {}, {}


class Torch:
    """The same in torch, on jax's GPU where that has one; `function` is made for a case's tensors.

    function: (spec, tensors by name) -> a function of the differentiable ones by name.
    """

    def __init__(self, function: Callable, case: Case):
        import torch

        self._torch, self._cuda = torch, jax.default_backend() == "gpu"
        device = "cuda" if self._cuda else "cpu"
        dtype = getattr(torch, case.dtype)
        put = lambda x, to=None: torch.as_tensor(np.array(x)).to(device, to)
        moving = [put(case.arrays[n], dtype) for n in case.differentiable]
        self._leaves = [x.requires_grad_() for x in moving]
        fixed = {n: put(x) for n, x in case.arrays.items() if n not in case.differentiable}
        self._named = dict(zip(case.differentiable, self._leaves, strict=True))
        self._without = {n: x.detach() for n, x in self._named.items()}
        self._run = function(case.spec, {**self._without, **fixed})
        self._do, self._kept = put(case.cotangent, dtype), None

    def _call(self, kind: str):
        if kind == "forward":
            return (self._run(**self._without),)
        if kind == "both":
            o = self._run(**self._named)
            return (o, *self._gradients(o, keep=False))
        if self._kept is None:
            self._kept = self._run(**self._named)
        return self._gradients(self._kept, keep=True)

    def _gradients(self, o, keep: bool):
        return self._torch.autograd.grad(o, self._leaves, self._do, retain_graph=keep)

    def results(self, kind: str) -> list[np.ndarray]:
        return [x.detach().float().cpu().numpy() for x in self._call(kind)]

    def memory(self, kind: str) -> int | None:
        if not self._cuda:
            return None
        cuda = self._torch.cuda
        if kind == "backward":
            self._call(kind)  # So that what is kept of the forward pass is not counted.
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        self._call(kind)
        return cuda.max_memory_allocated() - before

    def roughly(self, kind: str) -> float:
        self._call(kind)
        return self.seconds(kind, FEW)

    def seconds(self, kind: str, count: int) -> float:
        calls = lambda: [self._call(kind) and None for _ in range(count)]
        if not self._cuda:
            return _clock(calls) / count
        cuda = self._torch.cuda
        began, ended = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda.synchronize()
        began.record()
        calls()
        ended.record()
        cuda.synchronize()
        return began.elapsed_time(ended) / 1e3 / count

    def close(self) -> None:
        self._kept = self._run = self._leaves = self._named = self._without = self._do = None
        if self._cuda:
            self._torch.cuda.empty_cache()


def chained(function: Callable, count: int) -> Callable:
    """A function like this one that calls it `count` times, none before the one before is done."""

    def chain(*arguments):
        def body(_, carry):
            arguments, _ = carry
            return jax.lax.optimization_barrier((arguments, function(*arguments)))

        shapes = jax.eval_shape(function, *arguments)
        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (arguments, first))[1]

    return chain


def _clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
