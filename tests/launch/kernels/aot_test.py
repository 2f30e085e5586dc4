"""Kernels compiled for hardware that is not here, against the committed record of them.

A program may change with its source only; then `uv run kernels --all` makes a new record, and a
reader sees in the difference what the change did.
"""

import importlib.util

import pytest

from launch.kernels import rows, table
from launch.kernels.__main__ import RECORD, recorded

# A spec of each op on several kinds of chip, and on two what masks, groups or packs.
CHIPS = {
    ("flash_attention", "llama-7b-8k"): ("v5e", "v5p", "v6e", "tpu7x", "h200"),
    ("flash_attention", "mistral-7b-16k"): ("v5p", "h200"),
    ("flash_attention", "gpt-oss-local"): ("v5p", "h200"),
    ("linear_attention", "llama-7b-4k"): ("v5p", "v6e", "h200"),
    ("linear_attention", "llama-7b-16k-packed"): ("v5p", "h200"),
    ("grouped_matmul", "moonshot"): ("v5p", "h200"),
}
WITHIN = 0.02  # of predicted times and sizes: what a compiler's tie-breaking may change


def chosen():
    own = [case for case in recorded() if case.implementation.startswith("pallas_")]
    for case in own:
        if case.target.name in CHIPS.get((case.op, case.spec.name), ()):
            yield pytest.param(case, id=case.key.replace(" ", "-"))


@pytest.mark.aot
@pytest.mark.parametrize("case", list(chosen()))
def test_compiles_to_what_is_on_record(case):
    package = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}[case.target.platform]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: uv sync --extra aot")
    record = table.load(RECORD)
    assert case.key in record, f"{case.key} is not on record: uv run kernels --all"
    expected, (found, _) = record[case.key], rows.rows(case)
    assert [row.get("error") for row in found] == [None] * len(found)
    assert [row["pass"] for row in found] == [row["pass"] for row in expected]
    for row, old in zip(found, expected, strict=True):
        assert row["temporaries"] <= old["temporaries"] * (1 + WITHIN)
        if case.target.platform == "tpu":
            assert row["counted"]
            assert row["spills"] <= old["spills"] * (1 + WITHIN)
            for name in ("ms", "cycles", "bundles"):
                assert row[name] == pytest.approx(old[name], rel=WITHIN), name
        else:
            for name in ("spill_stores", "spill_loads", "shared", "registers"):
                assert row[name] <= old[name], name
