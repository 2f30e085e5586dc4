"""What balance sends between devices, read from the compiled step."""

import functools

import jax

from launch.config import resolve
from parallel import mesh as meshes
from tests import hlo
from training import program

E, N, D, LENGTH, ROWS = 8, 2, 64, 16, 16
SIZES = {"data": 4, "expert": 2}
CONFIG = {
    "model.ffn": "moe",
    "model.ffns.moe.experts": str(E),
    "model.layers": str(N),
    "model.d_model": str(D),
    "data.batch_size": str(ROWS),
    "data.length": str(LENGTH),
    **{f"mesh.{axis}": str(size) for axis, size in SIZES.items()},
}


@functools.cache
def _sent(name, A=1, **own):
    """{kind of collective: bytes of its results, a step}."""
    texts = {f"balance.balances.{name}.{key}": str(value) for key, value in own.items()}
    config = resolve("base", CONFIG | texts | {"balance.name": name, "data.micro_batches": str(A)})
    mesh = meshes.make(**SIZES)
    with jax.set_mesh(mesh):
        built = program.build(config, mesh, 258)
        text = built.step.lower(built.state, built.batch).compile().as_text()
    found = {}
    for one in hlo.collectives(text):
        found[one.kind] = found.get(one.kind, 0) + one.bytes * one.times
    return found


def test_the_global_batch_costs_no_byte_beyond_what_is_counted_anyway():
    """With one micro-batch the counts of health are those of the loss."""
    assert _sent("global_batch") == _sent("aux_free")


def test_counting_by_rows_costs_more():
    """[G E] sums of choices and of probabilities cross devices where [E] do: G times as many."""
    more = _sent("micro_batch", rows=1)["all-reduce"] - _sent("global_batch")["all-reduce"]
    assert 0 < more <= 4 * 2 * N * ROWS * E + 64


def test_several_micro_batches_cost_a_forward_pass_more():
    """Against the running buffer: rows go to experts and back once more, and nothing else grows."""
    exact, running = _sent("global_batch", 2), _sent("buffer", 2)
    numbers = (
        2 * N * 4 * (SIZES["expert"] * E + 8)
    )  # of rows and sums, a pass over two micro-batches
    assert 0 <= exact["all-to-all"] - 1.5 * running["all-to-all"] <= numbers
    alone = N * ROWS * LENGTH * D * 4 // 8  # the sum over mesh.tensor, which is of one device here
    assert alone <= exact["all-reduce"] - running["all-reduce"] <= alone + numbers
