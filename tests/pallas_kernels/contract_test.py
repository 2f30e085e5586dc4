"""What every implementation of every op must hold; a new folder is tested by being there.

An op offers IMPLEMENTATIONS, specs, and a `reference` that computes in float64 if its inputs are.
"""

import contextlib
import functools
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels
from tests.pallas_kernels.interpreted import KINDS, interpreted

ROOM = pathlib.Path(pallas_kernels.__file__).parent
OPS = sorted(path.parent.name for path in ROOM.glob("*/specs.py"))
# Errors relative to the largest value, which is at least 1. Sums of at most 200 terms of order 1,
# rounded at random, err by 32 eps; 16-bit kernels round probabilities and scores' gradients too.
TOLERANCE = {"float32": 32 * 2.0**-23, "bfloat16": 4 * 2.0**-8}


def module(op, part=None):
    return importlib.import_module(f"pallas_kernels.{op}" + (f".{part}" if part else ""))


def runnable():
    """(op, implementation, platform, spec): those for a platform on few specs, in an interpreter.

    Not the reference, which the op's own tests hold to its equation, and not what calls a library
    of a platform (a name without 'pallas'), for which there is no interpreter.
    """
    for op in OPS:
        tagged = module(op, "specs").tagged
        for name, platform in module(op).IMPLEMENTATIONS.items():
            if name != "reference" and (platform is None or name.startswith("pallas")):
                for spec in tagged("ci" if platform is None else "interpreted"):
                    yield pytest.param(op, name, platform, spec, id=f"{op}-{name}-{spec.name}")


def rounded(spec, dtype):
    """Inputs of the spec, floats as this dtype has them."""
    floats = {n for n, (_, kind) in spec.abstract(dtype).items() if kind == np.dtype(dtype)}
    cast = lambda n, x: jnp.asarray(x, dtype) if n in floats else jnp.asarray(x)
    return {n: cast(n, x) for n, x in spec.inputs().items()}


def evaluate(call, spec, arrays):
    """Outputs, and gradients by name for normal cotangents."""

    @jax.jit
    def run(arrays, rng):
        others = {n: x for n, x in arrays.items() if n not in spec.differentiable}
        of = {n: arrays[n] for n in spec.differentiable}
        out, pull = jax.vjp(lambda of: call(**of, **others), of)
        return out, pull(jax.tree.map(lambda x, ct: ct.astype(x.dtype), out, rng))[0]

    out = jax.eval_shape(call, **arrays)
    rng = np.random.default_rng(1)
    draw = lambda x: np.float32(jnp.bfloat16(rng.standard_normal(x.shape)))
    out, gradients = run(arrays, jax.tree.map(draw, out))
    parts = jax.tree.leaves(out), *([gradients[n]] for n in spec.differentiable)
    return [np.float64(x) for part in parts for x in part]


@functools.cache
def expected(op, spec, dtype):
    arrays = rounded(spec, dtype)
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x, jnp.float64 if jnp.issubdtype(x.dtype, float) else x.dtype)
        return evaluate(spec.call("reference"), spec, jax.tree.map(wide, arrays))


@pytest.mark.parametrize(("op", "implementation", "platform", "spec"), list(runnable()))
def test_values_and_gradients_are_those_of_float64(op, implementation, platform, spec):
    with interpreted(platform) if platform else contextlib.nullcontext():
        dtype, found = first_taken(spec, implementation)
    for ours, exact in zip(found, expected(op, spec, dtype), strict=True):
        infinite = np.isinf(exact)
        np.testing.assert_array_equal(ours[infinite], exact[infinite])
        error = np.abs(ours[~infinite] - exact[~infinite]).max()
        assert error <= TOLERANCE[dtype] * max(1.0, np.abs(exact[~infinite]).max())


def first_taken(spec, implementation):
    """The widest dtype that the implementation takes, and what it gives."""
    for dtype in TOLERANCE:
        with contextlib.suppress(NotImplementedError):
            return dtype, evaluate(spec.call(implementation), spec, rounded(spec, dtype))
    raise AssertionError(f"{implementation} takes none of {', '.join(TOLERANCE)}")


def lowered():
    """(op, implementation, platform, spec) of kernels for a platform, on two specs."""
    for case in runnable():
        op, _, platform, spec = case.values
        if platform and spec in module(op, "specs").tagged("interpreted")[:2]:
            yield case


@pytest.mark.parametrize(("op", "implementation", "platform", "spec"), list(lowered()))
def test_kernels_lower_for_the_chip_at_any_length(op, implementation, platform, spec):
    """An interpreter takes sizes that a chip's own lowering refuses."""
    kind, cores = KINDS[platform]
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    assert any(size % 8 for name, size in vars(spec).items() if name in "LSM" and size)
    arrays = {n: jax.ShapeDtypeStruct(*x) for n, x in spec.abstract(jnp.bfloat16).items()}

    def both(arrays):
        of = {n: arrays[n] for n in spec.differentiable}
        out, pull = jax.vjp(lambda of: spec.call(implementation)(**arrays | of), of)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        name = {"gpu": "cuda"}.get(platform, platform)
        assert jax.jit(both).trace(arrays).lower(lowering_platforms=(name,))


@pytest.mark.parametrize("op", OPS)
def test_none_gives_what_a_platform_without_kernels_can(op):
    spec = module(op, "specs").tagged("ci")[0]
    for name in module(op).IMPLEMENTATIONS:
        if module(op).IMPLEMENTATIONS[name] is not None:
            with pytest.raises(NotImplementedError, match=f"^{name} is for a (tpu|gpu), not a cpu"):
                jax.eval_shape(spec.call(name), **rounded(spec, "float32"))
    jax.eval_shape(spec.call(None), **rounded(spec, "float32"))


@pytest.mark.parametrize("op", OPS)
def test_specs_say_what_a_harness_asks(op):
    specs = module(op, "specs")
    assert len({spec.name for spec in specs.SPECS}) == len(specs.SPECS)
    assert specs.tagged("aot")
    for spec in specs.SPECS:
        assert re.fullmatch(r"[\w-]+", spec.name)
        arrays = spec.abstract(jnp.bfloat16)
        assert set(spec.differentiable) <= set(arrays)
        assert 0 < spec.flops < spec.backward_flops
        assert 0 < spec.hbm_bytes(jnp.bfloat16) < spec.hbm_bytes(jnp.bfloat16, backward=True)
        given = {n: jax.ShapeDtypeStruct(*array) for n, array in arrays.items()}
        jax.eval_shape(spec.call(None), **given)
    for spec in specs.tagged("ci"):
        shapes = {n: (x.shape, x.dtype) for n, x in spec.inputs().items()}
        assert shapes == spec.abstract(np.float32)
