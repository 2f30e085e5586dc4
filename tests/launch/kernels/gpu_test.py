"""Compiling for a GPU that is not there."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from launch.files import ROOT
from launch.kernels import gpu
from launch.kernels.targets import TARGETS
from launch.schema import UsageError

SCRIPT = """
import json, os, sys
from launch.kernels import gpu, targets
from tests.launch.kernels import hopper

def twice(x, y):
    return hopper.product(x, y) + hopper.product(x + x, y)

print("before")
for name in ("h100", "h200"):
    found = gpu.compile(twice, hopper.ARGUMENTS, targets.target(name), sys.argv[1] + name)
    print(json.dumps(found))
print(json.dumps({n: os.environ.get(n) for n in gpu.PRINTS}))
"""


CHAIN = """
from launch.bench.contender import chained
from launch.kernels import gpu, targets
from tests.launch.kernels import hopper

lowered = gpu.lower(chained(hopper.product, 9), hopper.ARGUMENTS, targets.target("h200"))
print(lowered.compile().as_text())
"""


def test_without_the_compiler_one_sentence_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    hidden = lambda name, *rest: None if "cuda" in name else found(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(UsageError, match="uv sync --extra aot"):
        gpu.lower(lambda x: x, (), TARGETS["h200"])


def child(script, *arguments):
    """Standard output of a script in a process of its own, whose standard error stays empty."""
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("jax's CUDA plugin is not installed: uv sync --extra aot")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "MOSAIC_"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.aot
def test_kernels_compile_for_hopper_without_one(tmp_path):
    before, *found, variables = child(SCRIPT, f"{tmp_path}/").splitlines()
    assert before == "before"
    assert json.loads(variables) == dict.fromkeys(gpu.PRINTS)
    for kernels, name in zip(map(json.loads, found), ("h100", "h200"), strict=True):
        assert sorted(kernels) == ["product", "product.2"]
        for kernel, facts in kernels.items():
            assert facts["spill_stores"] == facts["spill_loads"] == 0
            assert facts["wgmma"] == {"m64n64k16.bf16": 4}
            assert facts["tma_loads"] == 8
            assert facts["grid"] == [2, 1, 1]
            assert facts["threads"] == 256
            # Three tiles of 64 x 64, two mbarriers, and what Mosaic GPU adds.
            assert 0 <= facts["shared"] - (3 * 64 * 64 * 2 + 2 * 8) <= 64
            assert facts["warnings"] == []
            # The sum's first operand waits in memory for the second: [128 64] of bfloat16.
            assert 128 * 64 * 2 <= facts["temporaries"] <= 8 * 128 * 64 * 2
            assert (tmp_path / name / f"{kernel}.ptx").read_text().count("wgmma.mma_async") == 4
            assert "Used" in (tmp_path / name / f"{kernel}.ptxas").read_text()


@pytest.mark.aot
def test_what_is_timed_on_a_gpu_is_the_kernel_alone():
    """The benchmark's loop holds one call and the counter, and copies nothing."""
    text = child(CHAIN)
    (body,) = (part for part in text.split("\n\n") if 'custom_call_target="mosaic_gpu_v2"' in part)
    operations = re.findall(r" = (?:\(.*?\)|\S+) ([a-z-]+)\(", body)
    free = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}
    assert sorted(set(operations) - free) == ["custom-call", "fusion"]
    assert operations.count("custom-call") == operations.count("fusion") == 1
    assert "s32[] fusion(" in body
    assert '"known_trip_count":{"n":"9"}' in text
