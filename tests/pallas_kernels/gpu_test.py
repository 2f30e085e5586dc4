"""On a GPU: what every implementation there gives, against float64, and that it gives it always.

    python -m pytest --noconftest -m gpu tests/pallas_kernels/gpu_test.py

--noconftest, since the other tests' setup keeps jax on the CPU and needs more packages.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import IMPLEMENTATIONS
from pallas_kernels.flash_attention.specs import Spec, tagged
from tests.pallas_kernels.attention_oracle import cotangents, oracle

pytestmark = pytest.mark.gpu

EPS = float(jnp.finfo(jnp.bfloat16).eps)
CI = {spec.name: spec for spec in tagged("ci")}
HERE = [name for name, platform in IMPLEMENTATIONS.items() if platform in (None, "gpu")]
# Several tiles in each direction, none of which divides the lengths.
LARGE = {
    spec.name: spec
    for spec in (
        Spec("causal_64", "", B=2, L=1000, H=4, K=64),
        Spec("causal_128", "", B=2, L=1500, H=8, K=128, G=2),
        Spec("causal_256", "", B=1, L=900, H=2, K=256),
        Spec("full_128", "", B=1, L=1100, H=4, K=128, causal=False),
        Spec("more_keys_128", "", B=1, L=600, H=4, K=128, S=1400),
        Spec("more_queries_64", "", B=1, L=1400, H=4, K=64, S=600),
        Spec("window_128", "", B=1, L=2000, H=4, K=128, window=300),
        Spec("both_sides_64", "", B=1, L=1300, H=4, K=64, causal=False, window=200),
        Spec("packed_128", "", B=2, L=2000, H=4, K=128, G=1, documents=7),
        Spec("lambda_128", "", B=1, L=2000, H=2, K=128, window=256, first=5, documents=3),
        Spec("softcap_256", "", B=1, L=1000, H=4, K=256, G=2, window=400, softcap=20.0),
        Spec("sinks_64", "", B=1, L=1500, H=8, K=64, G=1, window=128, sinks=True),
    )
}


@pytest.fixture(autouse=True)
def gpu():
    if dispatch.platform() != "gpu":
        pytest.skip("there is no GPU")


@functools.cache
def compiled(implementation, spec):
    """(inputs, do, dlse) -> o, lse and gradients by name."""
    call = spec.call(implementation)

    def run(inputs, do, dlse):
        rest = {n: x for n, x in inputs.items() if n not in spec.differentiable}
        own = {n: inputs[n] for n in spec.differentiable}
        out, pull = jax.vjp(lambda own: call(**own, **rest), own)
        return dict(zip(("o", "lse"), out, strict=True)) | pull((do.astype(out[0].dtype), dlse))[0]

    return jax.jit(run)


def results(implementation, spec, args):
    """As float32 numpy; skips what the implementation declines."""
    try:
        found = compiled(implementation, spec)(*args)
    except NotImplementedError as refusal:
        pytest.skip(f"{implementation} declines: {refusal}")
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def arguments(spec):
    """bfloat16 inputs and do, and dlse in float32."""
    do, dlse = cotangents(spec)
    inputs = {n: jnp.asarray(x, spec.abstract("bfloat16")[n][1]) for n, x in spec.inputs().items()}
    return inputs, jnp.asarray(do, jnp.bfloat16), jnp.asarray(dlse)


def exact(args):
    """The same numbers in float64, integers as they are."""
    double = lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(lambda x: np.asarray(double(x)), args)


def assert_close(ours, true):
    """Probabilities, dS and results are each rounded to bfloat16, by half an eps: o within 2 eps of
    the largest, gradients, which are sums of products of two rounded ones, within 4. lse is float32
    throughout; its matrix products are exact in it, its exponentials are good to 2^-22.
    """
    for name, expected in true.items():
        blind = np.isinf(expected)
        np.testing.assert_array_equal(ours[name][blind], expected[blind])
        size = max(1.0, np.abs(expected[~blind]).max())
        allowed = {"o": 2 * EPS, "lse": 1e-4}.get(name, 4 * EPS)
        np.testing.assert_allclose(
            ours[name][~blind], expected[~blind], rtol=0, atol=allowed * size, err_msg=name
        )


@pytest.mark.parametrize("name", CI)
@pytest.mark.parametrize("implementation", HERE)
def test_outputs_and_gradients_equal_the_oracle(implementation, name):
    args = arguments(CI[name])
    assert_close(results(implementation, CI[name], args), oracle(CI[name], *exact(args)))


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("implementation", HERE)
def test_many_tiles_equal_the_definition(implementation, name):
    if implementation == "reference":
        pytest.skip("it is the definition")
    args = arguments(LARGE[name])
    found = results(implementation, LARGE[name], args)
    with jax.default_matmul_precision("highest"):
        single = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args
        )
        assert_close(found, results("reference", LARGE[name], single))


@pytest.mark.parametrize("name", ["causal_128", "packed_128", "window_128", "causal_64"])
def test_a_hundred_runs_are_one(name):
    """A race or a barrier too few shows as another result now and then, at full occupancy.

    The forward pass must repeat itself to the bit. Gradients may be sums in any order of float32
    parts, which moves a bfloat16 by its last place.
    """
    spec = dataclasses.replace(LARGE[name], B=8)
    args = arguments(spec)
    first = results("pallas_gpu", spec, args)
    for _ in range(100):
        again = results("pallas_gpu", spec, args)
        for which, x in again.items():
            if which in ("o", "lse"):
                np.testing.assert_array_equal(x, first[which], err_msg=which)
            else:
                size = np.abs(first[which]).max()
                np.testing.assert_allclose(x, first[which], rtol=0, atol=EPS * size, err_msg=which)
