"""What `train --explain` lists, against the program's own arrays.

`UPDATE_GOLDEN=1 uv run pytest tests/launch/explain_test.py` writes its golden text anew.
"""

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
import pytest

import data.pipeline
from launch import explain, train
from launch.config import resolve
from models import layers
from parallel import mesh as meshes
from parallel import named
from training import program

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "explain" / "quickstart.txt"
CUBE = {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"}
SCANNED = CUBE | {"data.micro_batches": "2", "model.layers": "3"}


def read(name, overrides):
    """(program on the devices here, its rows)."""
    config = resolve(name, overrides)
    mesh = meshes.make(**config["mesh"])
    with jax.set_mesh(mesh):
        built = program.build(config, mesh, config["model"]["vocab"] or 258)
    return built, explain.read(built, mesh.abstract_mesh, config["zero"])


@pytest.fixture(scope="module")
def base():
    return read("base", SCANNED)


def flags(overrides):
    return [f"--config.{key}={text}" for key, text in overrides.items()]


def call(*argv):
    """(exit status, stdout, stderr) of `train ARGV --explain`."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["train", *argv, "--explain"]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            train.main()
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def arrays(state, batch):
    """What a program holds, by section: parameters, optimizer, other state, batch."""
    rest = {"step": state.step, "position": state.position, "tokens": state.tokens} | state.aux
    frozen = rest.pop("frozen", {})
    parameters = {path: (frozen | state.params)[path] for path in (*frozen, *state.params)}
    return parameters, state.opt, rest, batch._asdict()


def paired(rows, state, batch):
    """(row, array) of everything but activations."""
    sections = (rows.parameters, rows.optimizer, rows.rest, rows.batch)
    for section, tree in zip(sections, arrays(state, batch), strict=True):
        by_name = {row.name: row for row in section}
        found = jax.tree_util.tree_leaves_with_path(tree)
        assert len(by_name) == len(section) == len(found)
        for path, leaf in found:
            yield by_name[jax.tree_util.keystr(path, simple=True, separator="/")], leaf


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("quickstart", {"zero": "zero2", "ema": "0.9", "trainable": "blocks/.*|tokens"}),
        ("gpt2_124m", {"zero": "zero1"}),
        ("llama_1b", {"optim.name": "sgd"}),
        ("bert_base", {}),
    ],
)
def test_every_array_is_listed_as_it_lies(name, changes):
    """Shapes on a device and numbers of copies, as JAX itself counts them."""
    built, rows = read(name, CUBE | changes)
    assert rows.faults == []
    assert [row.name for row in rows.parameters if row.axes != built.table[row.name].axes] == []
    for row, leaf in paired(rows, built.state, built.batch):
        assert (row.shape, row.dtype) == (leaf.shape, leaf.dtype), row.name
        assert row.held == leaf.sharding.shard_shape(leaf.shape), row.name
        places = leaf.sharding.devices_indices_map(leaf.shape).values()
        copies = math.prod(row.mesh.shape[axis] for axis in row.repeated)
        assert copies * len(set(map(str, places))) == len(places) == 8, row.name


def test_bytes_are_those_of_the_shards():
    built, rows = read("base", CUBE | {"zero": "zero1", "ema": "0.9"})
    zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    state, batch = jax.tree.map(zeros, (built.state, built.batch))
    held = 0
    for row, leaf in paired(rows, state, batch):
        here = [shard.data.nbytes for shard in leaf.addressable_shards]
        assert here == [row.bytes] * 8, row.name
        held += sum(here) if row in rows.optimizer else 0
    total = sum(row.bytes for row in rows.optimizer)
    assert 8 * total == held
    assert sum(row.bytes for row in rows.gradients) == sum(row.bytes for row in rows.parameters)
    assert f"optimizer state  {total:,} (" in explain.text(rows, rows.parameters[0].mesh)


def test_gradients_are_counted_as_they_are_added_up():
    """Every weight of the base model divides by the two devices along data."""
    size = lambda section: sum(row.bytes for row in section)
    _, rows = read("base", CUBE | {"zero": "zero2"})
    assert size(rows.gradients) == size(rows.parameters) // 2


def test_activations_lie_as_in_the_compiled_step(base, monkeypatch):
    """The types that were traced against what the compiler made of each value."""
    seen = {}

    def record(x, tag):
        keep = lambda sharding: seen.setdefault(tag, set()).add(
            (x.shape, sharding.shard_shape(x.shape), str(x.dtype))
        )
        jax.debug.inspect_array_sharding(x, callback=keep)
        return x

    built, rows = base
    listed = {}
    for row in rows.activations:
        listed.setdefault(row.name, set()).add((row.shape, row.held, str(row.dtype)))
    monkeypatch.setattr(named, "checkpoint_name", record)
    mesh = built.state.step.sharding.mesh
    with jax.set_mesh(mesh):
        other = program.build(resolve("base", SCANNED), mesh, 258)
        other.step.lower(other.state, other.batch).compile()
    listed.pop("attention")  # Named by the kernel, which does so where there is a gradient.
    assert listed == seen
    assert set(seen) == {
        "embedded", "queries", "keys", "values", "mixer", "residual", "ffn_hidden", "ffn", "logits"
    }  # fmt: skip


def test_a_bare_name_is_listed_by_the_rules_that_fit(base):
    _, rows = base
    output, normaliser = (row for row in rows.activations if row.name == "attention")
    assert output.names == ("batch", "length", "heads|ffn|vocab", "")
    assert (output.held, normaliser.held) == ((1, 128, 2, 16), (1, 128, 2))


def test_scans_are_told(base):
    _, rows = base
    assert rows.loops == {"micro-batches": 2, "layers": 3}
    scans = {row.name: row.scans for row in rows.activations}
    assert (scans["embedded"], scans["mixer"], scans["logits"]) == ((2,), (2, 3), (2,))


def test_nothing_is_compiled_and_no_corpus_is_read(caplog):
    refuse = mock.Mock(side_effect=AssertionError("the corpus is read"))
    with mock.patch.object(data.pipeline, "build", refuse), jax.log_compiles():
        status, out, _ = call("--config", "quickstart", *flags(CUBE))
        assert "XLA compilation" not in caplog.text
        jax.jit(lambda x: x + 1)(1)
        assert "XLA compilation" in caplog.text
    assert status == 0
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(out)
    assert out == GOLDEN.read_text()


def test_a_mesh_larger_than_the_machine():
    sizes = {"mesh.data": "2", "mesh.fsdp": "16", "mesh.tensor": "4"}
    status, out, err = call("--config", "llama_7b", *flags(sizes))
    assert (status, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [
        "blocks/0/mixer/q", "layers 32, embed 4096 -> fsdp=16, heads 32 -> tensor=4, 128",
        "float32[32 256 8 128]", "33,554,432", "data=2",
    ] in cells  # fmt: skip
    assert [
        "queries", "batch 64 -> data=2 fsdp=16, length 4096, heads 32 -> tensor=4, 128",
        "bfloat16[2 4096 8 128]", "16,777,216", "-", "16 x 32",
    ] in cells  # fmt: skip
    # All but 65 norms of 4,096 lie over fsdp and tensor.
    held = 4 * ((6_738_415_616 - 65 * 4096) // 64 + 65 * 4096)
    assert f"  parameters       {held:,} ({held / 2**30:.3f} GiB)" in out.splitlines()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"mesh.tensor": "3"}, "8 devices do not divide into the 3 of data=-1 x tensor=3"),
        ({"mesh.data": "1", "mesh.tensor": "3"}, "dimension 'heads' of blocks/0/mixer/kv has"),
        ({"mesh.data": "16"}, "8 rows in 1 micro-batches leave 8 a micro-batch, which do not"),
        ({"mesh.data": "1", "mesh.expert": "2"}, "mesh.expert is 2 and nothing in this model"),
    ],
)
def test_a_mesh_that_does_not_fit_is_a_sentence(sizes, why):
    status, out, err = call("--config", "quickstart", *flags(sizes))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"train: {why}")


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        (("heads", "ffn"), "dimensions 0 ('heads') and 1 ('ffn') would both be split over mesh"),
        (("heads", "depth"), "logical axis 'depth' of dimension 1 is not in parallel/rules.py;"),
    ],
)
def test_axes_that_cannot_be_are_a_sentence(axes, why, monkeypatch):
    declare = layers.param

    def other(rngs, shape, *own, **declared):
        own = (axes,) if len(shape) == 2 else own
        return declare(rngs, shape, *own, **declared)

    monkeypatch.setattr(layers, "param", other)
    status, out, err = call("--config", "base", "--config.model.ffn=gelu")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"blocks/0/ffn/down: {why}" in err


def test_a_wrong_name_is_told_beside_the_whole_listing(monkeypatch):
    wrong = lambda x, name, *axes: named.named(x, name, "batch", "length", None)
    monkeypatch.setattr(layers, "named", wrong)
    status, out, err = call("--config", "base", "--config.model.ffn=gelu", *flags(CUBE))
    assert status == 2
    assert "bytes a device" in out
    assert err == (
        "train: ffn_hidden: rule says (replica data fsdp expert, context, -), "
        "program has (replica data fsdp expert, context, tensor)\n"
    )


def test_optimizer_state_that_lost_its_layout_is_told(base):
    built, _ = base
    mesh = built.state.step.sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lose = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
    lost = built.state._replace(opt=jax.tree.map(lose, built.state.opt))
    rows = explain.read(dataclasses.replace(built, state=lost), mesh.abstract_mesh, "none")
    assert "0/mu/tokens: rule says (tensor, fsdp), program has (-, -)" in rows.faults
