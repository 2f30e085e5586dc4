"""LoRA against float64 matrices, and runs that train with it."""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.generate import generate
from launch import explain, setup, train
from launch.config import resolve
from parallel import mesh as meshes
from tests import tiny
from tests.contracts.adapters_test import TABLE, draw
from tests.models.built import close
from training import adapter as adapters
from training import loop, program
from training.evaluate import held_out
from training.feed import feed

ADAPTED = [p for p, e in TABLE.items() if e.is_matrix and p != "tokens"]


def lora(table, **own):
    return adapters.make({"name": "lora", "lora": own}, table)


def matrices(path):
    """(its place in W, in A, in B, rows, columns) of every matrix that a weight holds."""
    entry = TABLE[path]
    of = lambda part: [entry.layers + i for i in part]
    stack, rows, columns = map(of, (entry.weight.stack, entry.weight.fan_in, entry.weight.fan_out))
    for at in itertools.product(*(range(entry.shape[i]) for i in (*range(entry.layers), *stack))):
        given = dict(zip((*range(entry.layers), *stack), at, strict=True))
        whole = [given.get(i, slice(None)) for i in range(len(entry.shape))]
        a = [whole[i] for i in range(len(entry.shape)) if i not in columns]
        sizes = [math.prod(entry.shape[i] for i in part) for part in (rows, columns)]
        yield tuple(whole), tuple(a), at, *sizes


RANK, ALPHA = 3, 5.0


@functools.cache
def computed():
    """(parameters, gradient of the merged weights, these weights, gradient of the parameters)."""
    adapter = lora(TABLE, rank=RANK, alpha=ALPHA, targets=".*")
    params, given = draw(TABLE | adapter.table), draw(TABLE, 1)

    def run(params, given):
        weights, pull = jax.vjp(adapter.merged, params)
        return weights, pull(given)[0]

    return params, given, *jax.jit(run)(params, given)


@pytest.mark.parametrize("path", ADAPTED)
def test_values_and_gradients_of_every_kind_of_weight(path):
    """One matrix at a time, in float64: W + alpha / r A B, dA = alpha / r dW B^T, dB likewise."""
    params, given, weights, gradient = computed()
    A, B = f"{path}/lora_a", f"{path}/lora_b"
    expected, dA, dB = (np.float64(params[p]) for p in (path, A, B))
    count = 0
    for whole, a, b, rows, columns in matrices(path):
        factors = params[A][a].reshape(rows, RANK), params[B][b].reshape(RANK, columns)
        first, second = map(np.float64, factors)
        expected[whole] += (ALPHA / RANK * first @ second).reshape(expected[whole].shape)
        G = np.float64(given[path][whole].reshape(rows, columns))
        dA[a] = (ALPHA / RANK * G @ second.T).reshape(dA[a].shape)
        dB[b] = (ALPHA / RANK * first.T @ G).reshape(dB[b].shape)
        count += RANK * (rows + columns)
    assert params[A].size + params[B].size == count
    for got, want in ((weights[path], expected), (gradient[A], dA), (gradient[B], dB)):
        close(got, want, 1e-6)  # float32 sums of a few dozen products
    np.testing.assert_array_equal(gradient[path], given[path])


def test_declarations():
    """Factors lie as their weight does, and start as the paper's."""
    added = lora(TABLE, rank=3, targets=".*").table
    assert set(added) == {f"{path}/lora_{name}" for path in ADAPTED for name in "ab"}
    kv = added["blocks/0/mixer/kv/lora_a"], added["blocks/0/mixer/kv/lora_b"]
    assert [entry.shape for entry in kv] == [(2, 8, 2, 3), (2, 2, 3, 2, 4)]
    assert [entry.axes for entry in kv] == [
        ("layers", "embed", None, None), ("layers", None, None, "heads", None)
    ]  # fmt: skip
    assert [entry.stack_axes for entry in kv] == [(0, 2), (0, 1)]
    out = added["blocks/0/mixer/out/lora_a"]
    assert (out.weight.fan_in, out.weight.fan_out) == ((0, 1), (2,))
    assert out.weight.init == ("normal", 1 / math.sqrt(4 * 4))
    assert added["blocks/0/mixer/q_map/lora_b"].weight.axes == ("heads", None, None)
    assert {e.weight.init for p, e in added.items() if p.endswith("b")} == {("zeros",)}
    assert added["head/kernel/lora_b"].weight.group == "head"


def test_alpha_over_rank_is_the_scale():
    """Columns of zeros change nothing but the scale, and alpha multiplies what is added."""
    path = "suffix/0/ffn/down"
    own = draw({path: TABLE[path]})
    factors = draw(lora(TABLE, rank=2, targets=path).table)
    wide = {p: np.pad(x, [(0, 2 * (n == 2)) for n in x.shape]) for p, x in factors.items()}
    change = lambda added, **options: (
        lora(TABLE, targets=path, **options).merged(own | added)[path] - own[path]
    )
    once = change(factors, rank=2, alpha=2.0)
    close(change(factors, rank=2, alpha=6.0), 3 * once, 1e-6)
    close(change(wide, rank=4, alpha=4.0), once, 1e-6)
    close(change(wide, rank=4, alpha=2.0), once / 2, 1e-6)


STEPS = 4
# Beside the adapter, base weights of which one has factors of its own, as its checkpoint must tell.
OWN = dict(adapter__name="lora", adapter__lora__rank=2, adapter__lora__targets=".*/(q|kv|down)")
OWN |= dict(trainable=".*(mixer/q|norms/./scale)", ema=0.9, optim__name="sgd", optim__lr=0.1)
OWN |= dict(data__batch_size=8, model__layers=2)
BESIDE = {"blocks/0/mixer/q", "blocks/0/norms/0/scale", "blocks/0/norms/1/scale"}
ADDED = {f"blocks/0/{at}/lora_{n}" for at in ("mixer/q", "mixer/kv", "ffn/down") for n in "ab"}


@dataclasses.dataclass
class Ran:
    """first, last: the states before and after training, on the host."""

    built: setup.Setup
    first: program.TrainState
    last: program.TrainState
    losses: np.ndarray


def run(built):
    own = built.program
    with jax.set_mesh(built.mesh), feed(built.data, own.batch, 0) as batches:
        state, losses = own.init(), []
        first = jax.device_get(state)
        for batch in itertools.islice(batches, STEPS):
            state, metrics = own.step(state, batch)
            losses.append(metrics["loss"])
    return Ran(built, first, jax.device_get(state), np.array(losses))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def one(root):
    return run(tiny.setup(root, **OWN))


@pytest.fixture(scope="module")
def eight(root):
    sizes = dict(devices=8, zero="zero2", mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    return run(tiny.setup(root, **OWN, **sizes))


def test_only_what_is_chosen_is_trained(one):
    table, first, last = one.built.program.table, one.first, one.last
    assert set(one.built.program.adapter.table) == ADDED
    assert set(first.params) == set(first.aux["ema"]) == BESIDE | ADDED
    assert set(first.aux["frozen"]) == set(table) - BESIDE - ADDED
    for path, value in first.aux["frozen"].items():
        np.testing.assert_array_equal(last.aux["frozen"][path], value)
    for path, value in first.params.items():
        assert np.any(last.params[path] != value), path
    moments = {path: math.prod(table[path].shape) for path in BESIDE | ADDED}
    assert sum(x.size for x in jax.tree.leaves(last.opt)) == sum(moments.values())


def test_the_start_is_that_of_the_model_alone(one, root):
    """The same parameters under the same names, bit for bit."""
    own = {key: value for key, value in OWN.items() if "adapter" not in key and key != "trainable"}
    alone = tiny.setup(root, **own)
    with jax.set_mesh(alone.mesh):
        params = alone.program.init().params
    found = program.parameters(one.first)
    assert found.keys() == params.keys() | ADDED
    for path, value in params.items():
        np.testing.assert_array_equal(found[path], value)


def test_eight_devices_train_as_one(one, eight):
    """Over data, fsdp and tensor, gradients and moments split over data (ZeRO-2).

    1e-6 of the largest value: float32 sums in another order; moments are of what cancels.
    """
    jax.tree.map(np.testing.assert_array_equal, eight.first, one.first)
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-6)
    assert one.losses[-1] < one.losses[0]
    for part, tolerance in (("params", 1e-6), ("aux", 1e-6), ("opt", 1e-5)):
        found, expected = (getattr(each.last, part) for each in (eight, one))
        jax.tree.map(functools.partial(close, tolerance=tolerance), found, expected)


def test_every_array_lies_as_it_is_declared(eight):
    rows = explain.read(eight.built.program, eight.built.mesh.abstract_mesh, "zero2")
    assert not rows.faults
    held = {row.name: row.held for row in rows.parameters}
    assert held["blocks/0/mixer/kv/lora_a"] == (2, 16, 2, 2)  # of 2 32 2 2, the rank whole
    assert held["blocks/0/mixer/kv/lora_b"] == (2, 2, 2, 2, 8)  # of 2 2 2 4 8
    assert held["blocks/0/ffn/down/lora_a"] == (2, 24, 2)


def test_a_resumed_run_is_the_uninterrupted_one(one, tmp_path):
    """Bit for bit; and what is reopened is the parameters with their average."""
    with jax.set_mesh(one.built.mesh):
        loop.run(tiny.run(one.built, tmp_path, steps=STEPS // 2))
        state = loop.run(tiny.run(one.built, tmp_path, steps=STEPS)).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), one.last)
    with jax.set_mesh(None):
        again, params, step = setup.reopen(tmp_path)
    expected = program.parameters(one.last)
    assert (step, again.program.adapter.table) == (STEPS, one.built.program.adapter.table)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_evaluation_and_text_are_those_of_the_merged_weights(one):
    """Merged into the base, beside factors that add nothing, they give the same."""
    built, drawn = one.built, dict(tokens=6, eos=-1, temperature=0.0)
    with jax.set_mesh(built.mesh):
        params = jax.tree.map(jnp.asarray, program.parameters(one.last))
        nothing = {path: jnp.zeros_like(params[path]) for path in ADDED}
        merged = built.program.adapter.merged(params) | nothing
        prompt = built.data.tokenizer.encode_prompt("def")
        scores, texts = [], []
        for weights in (params, merged, params | nothing):
            scores.append(held_out(built.program, weights, built.data, built.mesh, rows=8).loss)
            given = built.program.model, weights, [prompt]
            texts.append(generate(*given, context={"dtype": "float32"}, **drawn)[0].tolist())
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)
    assert texts[0] == texts[1]
    assert abs(scores[2] - scores[0]) > 1e-3


@pytest.mark.parametrize(
    ("trainable", "beside"),
    [(None, "nothing"), (".*mixer/q", "blocks/0/mixer/q"), (".*", ".*")],
)
def test_the_base_is_trained_where_a_pattern_names_it(trainable, beside):
    config = resolve("base", {"adapter.name": "lora"}) | {"trainable": trainable}
    built = program.build(config, meshes.make(jax.devices()[:1]), 258)
    added = set(built.adapter.table)
    own = {path for path in built.table if re.fullmatch(beside, path)}
    assert set(built.state.params) == added | own
    assert set(built.state.aux.get("frozen", {})) == set(built.table) - added - own


def test_the_state_of_seven_billion_parameters():
    """Rank 8 of queries, keys, values and outputs is 8,388,608 trained parameters of Llama 7B."""
    config = resolve("llama_7b", {"adapter.name": "lora"})
    built = program.build(config, meshes.make(jax.devices()[:1]), config["model"]["vocab"])
    trained = sum(math.prod(x.shape) for x in built.state.params.values())
    assert trained == 32 * 4 * 8 * (4096 + 4096)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(built.state.opt)) == 2 * trained + 1
    frozen = built.state.aux["frozen"]
    assert sum(math.prod(x.shape) for x in frozen.values()) == 6_738_415_616


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ("name=lora lora.rank=0", "adapter.lora.rank is 0 and must be at least 1"),
        ("name=lora lora.alpha=0", "adapter.lora.alpha is 0.0 and must be greater than 0"),
        ("name=lora lora.targets=no/such", "adapter.lora.targets 'no/such' matches no matrix"),
        ("name=lora lora.targets=.*scale", "adapter.lora.targets '.*scale' matches no matrix"),
        ("name=lora lora.targets=(", "adapter.lora.targets is not a regular expression: "),
        ("name=lorra", "adapter.name names 'lorra', and training/adapters has no lorra.py"),
        ("name=lora lora.rnk=3", "--config.adapter.lora.rnk is not a key; did you mean adapter.l"),
        ("lora.rank=3", "--config.adapter.lora.rank has no effect, because the configuration does"),
    ],
)
def test_mistakes_are_one_sentence(overrides, why):
    out, err = io.StringIO(), io.StringIO()
    flags = [f"--config.adapter.{each}" for each in overrides.split()]
    with (
        mock.patch.object(sys, "argv", ["train", "--config", "base", *flags, "--explain"]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        train.main()
    assert (stop.value.code, out.getvalue(), err.getvalue().count("\n")) == (2, "", 1)
    assert err.getvalue().startswith(f"train: {why}")


def test_help_lists_its_keys(capsys):
    argv = ["train", "--config", "base", "--config.adapter.name=lora", "--help"]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit, match="0"):
        train.main()
    assert "adapter.lora.rank = 8" in (out := capsys.readouterr().out)
    assert "  adapter: lora\n" in out
