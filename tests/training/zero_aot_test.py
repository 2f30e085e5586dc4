"""What a TPU's compiler makes of ZeRO-1 and ZeRO-2, for eight chips that are not there."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from launch.files import ROOT
from launch.platform import present
from tests import hlo

N, A = 8, 2
STAGES = ("none", "zero1", "zero2")
# Large enough that nothing that counts fits into a chip's vector memory.
SIZES = {"model.d_model": "1024", "model.layers": "8", "model.vocab": "128", "data.length": "128"}
SIZES |= {"data.batch_size": str(N * A), "data.micro_batches": str(A), "model.remat": "full"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compile_all():
    """Prints, by stage, what the compiler says of memory, and the program's text."""
    import jax
    from jax.experimental import topologies

    from launch.config import resolve
    from parallel import mesh as meshes
    from training import program

    chips = topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices
    mesh = meshes.make(chips, data=N)
    for stage in STAGES:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            built = program.build(resolve("base", SIZES | {"zero": stage}), mesh, 128)
            compiled = built.step.lower(built.state, built.batch).compile()
        memory, params = compiled.memory_analysis(), built.state.params
        kept = ("argument", "temp", "alias")
        found = {name: getattr(memory, f"{name}_size_in_bytes") for name in kept}
        found["psi"] = sum(x.size for x in params.values())
        found["shapes"] = [x.shape for p, x in params.items() if p[:6] == "blocks" and x.ndim > 2]
        print(json.dumps(found | {"stage": stage, "hlo": compiled.as_text()}))


@pytest.fixture(scope="module")
def found():
    """{stage: what `compile_all` printed}, from a process that may load libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: uv sync --extra aot")
    if "tpu" in present():
        pytest.skip("there is a TPU")
    chosen = ("JAX_", "XLA_", "TPU_", "LIBTPU_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(chosen)} | ENVIRONMENT
    command = [sys.executable, "-m", "tests.training.zero_aot_test"]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = map(json.loads, done.stdout.splitlines())
    return {row["stage"]: row for row in rows}


@pytest.mark.aot
def test_a_chip_holds_what_the_formulas_say(found):
    """Within 0.1 %: the counters, the batch and the rounding of small arrays to tiles."""
    psi = found["none"]["psi"]
    for stage, state in (("none", 12), ("zero1", 4 + 8 / N), ("zero2", 4 + 8 / N)):
        assert found[stage]["argument"] == pytest.approx(state * psi, rel=1e-3)
        assert found[stage]["alias"] == pytest.approx(state * psi, rel=1e-3)
    # Two gradients, what is added up and what a micro-batch adds, less a layer's room.
    saved = found["none"]["temp"] - found["zero2"]["temp"]
    assert saved > 4 * psi * (2 * (N - 1) / N - 1 / 8)
    held = [found[stage]["argument"] + found[stage]["temp"] for stage in STAGES]
    assert held == sorted(held, reverse=True)


@pytest.mark.aot
def test_a_chip_scatters_gradients_and_gathers_parameters(found):
    """A scatter's part may be padded to whole tiles, by less than a tenth here."""
    psi = found["none"]["psi"]
    for stage, layers in (("zero1", 1), ("zero2", 8)):
        sent = {kind: [] for kind in hlo.KINDS}
        for collective in hlo.collectives(found[stage]["hlo"]):
            sent[collective.kind].append(collective.bytes)
        for shape in found[stage]["shapes"]:
            part = 4 * math.prod(shape) / layers / N
            assert any(part <= size < 1.1 * part for size in sent["reduce-scatter"]), shape
        assert sum(sent["all-gather"]) == pytest.approx(4 * psi, rel=1e-3)
        assert sum(sent["all-reduce"]) < 0.001 * 4 * psi
        assert not sent["all-to-all"]
    kinds = {collective.kind for collective in hlo.collectives(found["none"]["hlo"])}
    assert kinds == {"all-reduce"}


@pytest.mark.aot
def test_no_loop_on_a_chip_carries_a_whole_gradient_under_zero2(found):
    for stage, copies in (("none", 2), ("zero1", 2), ("zero2", 1)):
        _, backward, micro_batches = hlo.loops(found[stage]["hlo"])
        for shape in map(tuple, found[stage]["shapes"]):
            assert backward.count(shape) == micro_batches.count(shape) == copies, (stage, shape)


if __name__ == "__main__":
    compile_all()
