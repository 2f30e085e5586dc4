"""What is compiled and counted, without a compiler: gradients, calls of kernels, a peer's runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from launch.kernels import child, tpu
from launch.kernels.peers.flash_attention import splash
from launch.kernels.program import Piece, Program
from launch.kernels.targets import TARGETS
from pallas_kernels.flash_attention import specs

SPEC = next(spec for spec in specs.SPECS if spec.name == "packed")


def test_the_program_gives_results_and_gradients():
    call = SPEC.call("xla")
    abstract = SPEC.abstract("float32")
    with child.mesh(TARGETS["v5p"]):
        both, arguments = child.differentiated(call, abstract, SPEC.differentiable)
    arrays, cotangents = arguments
    assert {name: x.shape for name, x in arrays.items()} == {n: s for n, (s, _) in abstract.items()}
    inputs = jax.tree.map(jnp.asarray, SPEC.inputs())
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), cotangents)
    out, (gradients,) = both(inputs, ones)
    rest = {name: x for name, x in inputs.items() if name not in SPEC.differentiable}
    loss = lambda own: sum(jnp.sum(x, where=jnp.isfinite(x)) for x in call(**own, **rest))
    own = {name: inputs[name] for name in SPEC.differentiable}
    assert gradients.keys() == own.keys()
    for name, expected in jax.grad(loss)(own).items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(out[0], call(**inputs)[0])


def test_calls_are_counted_through_loops():
    def kernel(x, o):
        o[...] = x[...]

    def copy(x, name, grid):
        whole = pl.BlockSpec((8, 128), lambda *_: (0, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call = functools.partial(pl.pallas_call, kernel, grid=grid, name=name, interpret=True)
        return call(in_specs=[whole], out_specs=whole, out_shape=shape)(x)

    def program(x):
        x = copy(x, "once", (2, 3))
        twice = lambda x, _: (copy(x, "looped", (4,)), None)
        return jax.jit(lambda x: jax.lax.scan(twice, x, length=2)[0])(x)

    jaxpr = jax.make_jaxpr(program)(jnp.zeros((8, 128)))
    assert list(tpu._calls(jaxpr.jaxpr)) == [("once", 6), ("looped", 4), ("looped", 4)]


def test_programs_get_their_calls_names():
    programs = {"jvp_op_forward_": [1], "transpose_jvp_op_backward_dq__": [2], "other": [3]}
    names = {"op_forward", "op_backward", "op_backward_dq"}
    found = dict(tpu._named(programs, names))
    assert found == {"op_forward": [1], "op_backward_dq": [2], "other": [3]}


def piece(start, inside, matmuls=0):
    return Piece(start, start + 100, 1, inside, 100, {"MXU": 0, "VALU": 100}, matmuls, 0)


@pytest.mark.parametrize("changes", [{}, {"causal": False}, {"window": 300}])
@pytest.mark.parametrize("backward", [False, True])
def test_runs_of_splash_are_those_of_its_blocks(changes, backward):
    spec = specs.Spec("test", "", B=2, L=1024, H=3, K=128)
    spec = dataclasses.replace(spec, **changes)
    config = splash.Config(256, 128, 128, 128, 256, 256)
    T, C = (128, 256) if backward else (256, 128)
    pieces = piece(0, (7, 8)), piece(100, (7,)), piece(200, (7, 9), 4), piece(300, (7, 10))
    program = Program("kernel", pieces, {"MXU": 4, "VALU": 4}, 10, False, 0, {})
    name = "splash_mha_dkv" if backward else "splash_mha_fwd"
    i, j = np.arange(1024)[:, None], np.arange(1024)
    seen = np.ones((1024, 1024), bool)
    if spec.causal:
        seen &= j <= i
    if spec.window:
        seen &= j > i - spec.window
    tiles = seen.reshape(1024 // T, T, 1024 // C, C).any((1, 3))
    rows = 1024 // C if backward else 1024 // T
    expected = [6 * rows, 999, 6 * tiles.sum(), 6 * rows]
    assert splash.runs(spec, config, name, program, 999) == expected


def test_splash_says_what_it_cannot():
    spec = specs.Spec("test", "", B=1, L=256, H=2, K=128, sinks=True)
    assert not splash.can(spec)
    with pytest.raises(NotImplementedError, match="sinks"):
        splash.call(spec, splash.Config())


@pytest.mark.parametrize("target", ["v5p", "v6e"])
def test_chosen_config(target):
    own = child.Job("flash_attention", dataclasses.asdict(SPEC), target, "splash")
    with child.mesh(TARGETS[target]):
        assert child.chosen(own) == splash.best()
    with pytest.raises(child.UsageError, match="takes no config"):
        child.chosen(dataclasses.replace(own, implementation="xla", dtype="float32"))
    with pytest.raises(child.UsageError, match="no implementation 'none'"):
        child.module(dataclasses.replace(own, implementation="none"))
