"""Look-ups in a divided table against float64 numpy, and what compiled programs move and hold."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from inference import generate
from launch.config import resolve
from models import lm
from parallel import mesh as meshes
from parallel.rules import spec
from parallel.vocab import look_up, numbers
from training import program
from training.loss import log_likelihood
from training.losses import cross_entropy

B, L, D = 8, 6, 4
MESHES = {
    "tensor": dict(tensor=8),
    "data-fsdp-tensor": dict(data=2, fsdp=2, tensor=2),
    "context-tensor": dict(context=2, tensor=4),
    "replica-tensor": dict(replica=4, tensor=2),
}


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _ids(W):
    """Every id at the borders of 8 shards, most of them several times, and one in every place."""
    borders = sorted({i for k in range(8) for i in (k * W // 8, (k + 1) * W // 8 - 1)})
    ids = np.random.default_rng(W).choice(borders, (B, L)).astype(np.int32)
    ids.flat[: len(borders)] = borders
    ids[-1] = W - 1
    return ids


def _put(W, dtype=np.float32):
    """Table, ids and a cotangent on the mesh at hand, and the same in numpy."""
    host = _normal(0, W, D).astype(dtype), _ids(W), _normal(1, B, L, D).astype(dtype)
    names = ("vocab", None), ("batch", "length"), ("batch", "length", None)
    return [jax.device_put(x, spec(*n)) for x, n in zip(host, names, strict=True)], host


def _sum(table, ids, c):
    y = look_up(table, ids, spec("batch", "length", None))
    return jnp.sum((y * c).astype(jnp.float32)), y


def _oracle(table, ids, c):
    gradient = np.zeros(table.shape)
    np.add.at(gradient, ids, c.astype(np.float64))
    return gradient


# 24 and 40 rows leave odd numbers a device, 8 rows one.
@pytest.mark.parametrize("W", [8, 24, 40])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_rows_and_their_gradient(sizes, W):
    with jax.set_mesh(meshes.make(**sizes)):
        placed, (table, ids, c) = _put(W)
        (_, y), gradient = jax.jit(jax.value_and_grad(_sum, has_aux=True))(*placed)
        assert jax.typeof(y).sharding.spec == spec("batch", "length", None)
        assert jax.typeof(gradient).sharding == jax.typeof(placed[0]).sharding
    np.testing.assert_array_equal(y, table[ids])
    # Float32 sums of up to a dozen numbers of size 1.
    np.testing.assert_allclose(gradient, _oracle(table, ids, c), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes", [dict(tensor=4, data=2), dict(data=2, fsdp=4), dict(fsdp=8)])
def test_bfloat16_is_exact_forward_and_summed_in_float32(sizes):
    """256 ones and more: in bfloat16 the sum would stay at 256, the next number being 258."""
    with jax.set_mesh(meshes.make(**sizes)):
        table = jax.device_put(_normal(0, 8, D).astype(jnp.bfloat16), spec("vocab", None))
        ids = jax.device_put(np.full((8, 400), 5, np.int32), spec("batch", "length"))
        ones = jax.device_put(np.ones((8, 400, D), jnp.bfloat16), spec("batch", "length", None))
        (_, y), gradient = jax.jit(jax.value_and_grad(_sum, has_aux=True))(table, ids, ones)
    assert y.dtype == gradient.dtype == jnp.bfloat16
    assert np.all(np.asarray(y) == np.asarray(table)[5])
    assert np.all(np.asarray(gradient)[5] == 3200)
    assert np.count_nonzero(np.asarray(gradient)) == D


def _within(check, wrap):
    """The loss and its gradient, taken inside and through a region over `data`."""

    def per_shard(table, ids, c):
        value = lambda table: wrap(_sum)(table, ids, c)[0]
        inside = jax.grad(value)(table)
        # A gradient by what is the same everywhere is summed already where types are checked.
        inside = inside if check else jax.lax.psum(inside, "data")
        return jax.lax.psum(value(table), "data"), inside

    return jax.shard_map(
        per_shard,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), P()),
        axis_names={"data"},
        check_vma=check,
    )


def _scanned(fn):
    """fn over the rows one after another."""

    def call(table, ids, c):
        one = lambda total, row: (total + fn(table, row[0][None], row[1][None])[0], None)
        rows = jax.tree.map(lambda x: jax.reshard(x, P()), (ids, c))
        return jax.lax.scan(one, 0 * jnp.sum(c), rows)[0], None

    return call


WRAPS = {"plain": lambda f: f, "remat": jax.checkpoint, "scan": _scanned}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_inside_another_region(check, wrap):
    sizes = dict(data=4, tensor=2) if wrap is _scanned else dict(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(meshes.make(**sizes)):
        placed, host = _put(24)
        region = _within(check, wrap)
        through = jax.jit(jax.grad(lambda *args: region(*args)[0]))(*placed)
        value, inside = jax.jit(region)(*placed)
    expected = _oracle(*host)
    np.testing.assert_allclose(through, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(inside, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(value, np.sum(host[0][host[1]] * host[2]), rtol=1e-5)


def test_a_table_in_one_piece_is_looked_up_as_it_is():
    trace = lambda *args: str(jax.make_jaxpr(jax.grad(lambda *a: _sum(*a)[0]))(*args))
    table, ids, c = _normal(0, 24, D), _ids(24), _normal(1, B, L, D)
    assert "shard_map" not in trace(table, ids, c)
    for sizes, entered in ((dict(data=2, fsdp=4), False), (dict(data=4, tensor=2), True)):
        with jax.set_mesh(meshes.make(**sizes)):
            placed, _ = _put(24)
            assert ("shard_map" in trace(*placed)) == entered, sizes
    np.testing.assert_array_equal(look_up(jnp.asarray(table), ids, None), table[ids])


def test_what_cannot_be_looked_up_is_a_sentence():
    with jax.set_mesh(meshes.make(fsdp=2, tensor=4)):
        ids = jax.device_put(_ids(8), P())
        table = jax.device_put(_normal(0, 8, D), P("tensor", "fsdp"))
        with pytest.raises(ValueError, match=r"Dimension 1 of the table \(8, 4\) .* 'fsdp'; gath"):
            look_up(table, ids, P(None, None, None))
        table = jax.device_put(_normal(0, 8, D), P("tensor", None))
        with pytest.raises(ValueError, match=r"both divided over \['tensor'\]"):
            look_up(table, ids, P("tensor", None, None))


def test_numbers():
    np.testing.assert_array_equal(numbers(jnp.zeros((2, 3, 5))), np.arange(5)[None, None])
    with jax.set_mesh(meshes.make(data=4, tensor=2)):
        logits = jax.device_put(np.zeros((4, 10), np.float32), spec("batch", "vocab"))
        ids = numbers(logits)
        assert jax.typeof(ids).sharding.spec == P(None, "tensor")
        assert ids.dtype == jnp.int32
        np.testing.assert_array_equal(ids, np.arange(10)[None])


# What compiled programs move and hold. The vocabulary alone has a factor of 5, the length alone
# one of 3, so an array that holds either is known by its size, however it is reshaped.
WIDTH, ROWS, LENGTH, VOCAB, PADDED = 32, 16, 12, 600, 640
SIZES = {"model.d_model": WIDTH, "model.layers": 1, "model.vocab": VOCAB}
SIZES |= {"model.ffns.swiglu.width": 32, "model.mixers.attention.heads": 8}
SIZES |= {"data.batch_size": ROWS, "data.length": LENGTH, "model.head": "linear"}
MOVES = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)")
ARRAY = re.compile(r"\b[a-z]\w*\[([\d,]+)\]")


def faults(text: str, tensor: int, rows: int, *, sampled: bool = False) -> set[str]:
    """What of a compiled program moves or holds more than a device's part of the vocabulary.

    rows: of the batch, a device.  sampled: the program draws tokens, from one whole row of logits
    a sequence.
    """
    part, found, shapes = PADDED // tensor, set(), {}
    for match in filter(None, map(INSTRUCTION.match, text.splitlines())):
        name, result, kind, operands = match.groups()
        shapes[name] = [tuple(map(int, dims.split(","))) for dims in ARRAY.findall(result)]
        moved = re.fullmatch(rf"({MOVES})(-start|-done)?", kind)
        given = [s for o in re.findall(r"%([\w.-]+)", operands) for s in shapes.get(o, ())]
        for shape in shapes[name] + (given if moved else []):
            size = math.prod(shape)
            of_words, of_tokens = size % 5 == 0, size % 3 == 0
            if moved and of_words and of_tokens:
                found.add(f"{kind} moves logits {shape}")
            if of_words and size > part * (rows * LENGTH if of_tokens else WIDTH):
                found.add(f"{kind} holds {shape}")
            drawn = sampled and size <= PADDED * ROWS and not of_tokens
            if PADDED in shape and not drawn:
                found.add(f"{kind} has the whole vocabulary {shape}")
    return found


def _config(own):
    return resolve("base", {name: str(value) for name, value in (SIZES | own).items()})


def _compiled(sizes, which, own):
    """The text of a model's compiled `step` or `evaluate`."""
    mesh = meshes.make(**sizes)
    with jax.set_mesh(mesh):
        built = program.build(_config(own), mesh, VOCAB)
        if which == "step":
            return built.step.lower(built.state, built.batch).compile().as_text()
        one = lambda x: jax.ShapeDtypeStruct(
            x.shape[1:], x.dtype, sharding=jax.NamedSharding(mesh, P(*x.sharding.spec[1:]))
        )
        rows = jax.tree.map(one, built.batch)
        return built.evaluate.lower(built.state.params, rows).compile().as_text()


Z = {"loss.losses.cross_entropy.z": 1e-4}
TIED, UNTIED, MLM = {"model.tied": True}, {"model.tied": False}, {"model.head": "mlm"}


@pytest.mark.parametrize("which", ["step", "evaluate"])
@pytest.mark.parametrize(
    ("sizes", "own"),
    [
        (dict(tensor=8), TIED | Z),
        (dict(data=4, tensor=2), UNTIED | MLM | Z),
        (dict(fsdp=4, tensor=2), TIED | MLM),
        (dict(data=2, fsdp=2, tensor=2), UNTIED | Z | {"model.softcap": 20.0}),
    ],
    ids=["tensor", "data-tensor", "fsdp-tensor", "data-fsdp-tensor"],
)
def test_no_device_holds_or_moves_more_than_its_part_of_the_vocabulary(sizes, own, which):
    text = _compiled(sizes, which, own)
    rows, part = ROWS * sizes["tensor"] // 8, PADDED // sizes["tensor"]
    assert faults(text, sizes["tensor"], rows) == set()
    assert f"[{part},{WIDTH // sizes.get('fsdp', 1)}]" in text  # The table is seen at all,
    assert f"[{rows},{LENGTH},{part}]" in text  # and the logits.


def _gathering_table(table, ids, out):
    return jax.reshard(table, P(None, None)).at[ids].get(out_sharding=out)


def _gathering_logits(logits, targets):
    whole = jax.reshard(logits, P(*jax.typeof(logits).sharding.spec[:2], None))
    return log_likelihood(whole, targets)


def _undivided_numbers(logits):
    return jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))


@pytest.mark.parametrize(
    ("which", "module", "name", "planted", "words"),
    [
        ("evaluate", lm, "look_up", _gathering_table, "all-gather has the whole vocabulary"),
        ("evaluate", lm, "numbers", _undivided_numbers, "iota has the whole vocabulary"),
        ("evaluate", program, "log_likelihood", _gathering_logits, "moves logits"),
        ("step", cross_entropy, "log_likelihood", _gathering_logits, "moves logits"),
    ],
)
def test_what_gathers_is_found(which, module, name, planted, words, monkeypatch):
    monkeypatch.setattr(module, name, planted)
    found = faults(_compiled(dict(data=4, tensor=2), which, {}), 2, ROWS // 4)
    assert any(words in fault for fault in found), found


def test_decoding_gathers_one_row_of_logits_a_sequence():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        built = program.build(_config({}), mesh, VOCAB)
        put = lambda *names: jax.NamedSharding(mesh, spec(*names))
        like = lambda shape, *names: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=put(*names))
        prompts, lengths = like((ROWS, LENGTH), "batch", "length"), like((ROWS,), "batch")
        context = tuple(sorted(built.context.items()))
        run = generate._compiled(built.model, 4, VOCAB - 1, None, context)
        args = built.state.params, prompts, lengths, jnp.uint32(0), dict(temperature=1.0, top_p=0.9)
        text = run.lower(*args).compile().as_text()
    assert faults(text, 2, ROWS // 4, sampled=True) == set()
    assert re.search(rf"all-gather\S* = f32\[{ROWS // 4},{PADDED}\]", text)
