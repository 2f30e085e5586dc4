"""Which layers are converted, how the model is then spelled, and what the two runs are."""

import itertools

import pytest

from launch.conversion import FLAGS, MAPS, plan
from launch.convert_layers import chosen, entries_of, shortest
from launch.schema import UsageError

GIVEN = {name: key.default for name, key in FLAGS.items()}


def layers(pattern="aaaa", prefix="", suffix="", **attention):
    """A teacher's config of layers a (attention), g (the same with another ffn), b (another).

    h and t have learned maps already.
    """
    entries = {"a": "attention", "g": "gated", "b": "based", "h": "hedgehog", "t": "t2r"}
    spelled = lambda text: tuple(entries[letter] for letter in text)
    own = {"heads": 4, "kv_heads": 2, "rope": False, "window": None, "softcap": None, **attention}
    model = dict(prefix=spelled(prefix), pattern=spelled(pattern), suffix=spelled(suffix))
    model |= dict(layers=len(prefix + pattern + suffix), causal=True, ffn="swiglu", dropout=0.1)
    blocks = {"gated": {"mixer": "attention", "ffn": "gelu", **own}}
    blocks["t2r"] = {"mixer": "linear_attention", "learned": True}
    model |= {"mixers": {"attention": own}, "blocks": blocks}
    optim = {"name": "lamb", "lr": 0.5, "clip": None, "weight_decay": 0.2}
    optim |= {"methods": {"lamb": {"b1": 0.8}}, "schedule": "power", "warmup_tokens": 77}
    rest = {"seed": 3, "ema": 0.9, "data": {"length": 8}, "adapter": {"name": None}}
    loss = {"name": "cross_entropy", "losses": {"cross_entropy": {"z": 0.1}}}
    return rest | {"model": model, "optim": optim, "loss": loss, "trainable": "x", "steps": 9}


def made(teacher, **given):
    return plan(teacher, "runs/t", "runs/s", GIVEN | given)


def spelled(values):
    return "".join(
        entry[0] if entry != "gated_hedgehog" else "G"
        for part in ("prefix", "pattern", "suffix")
        for entry in (*values[f"model.{part}"], "|")
    )


@pytest.mark.parametrize(
    ("teacher", "text", "found", "model"),
    [
        (layers(), "all", (0, 1, 2, 3), "|h||"),
        (layers(), "even", (0, 2), "|ha||"),
        (layers(), "odd", (1, 3), "|ah||"),
        (layers(), "1-2", (1, 2), "a|h|a|"),
        (layers("aaaaaa"), "0,2,4-5", (0, 2, 4, 5), "|ha|hh|"),
        (layers("abab"), "all", (0, 2), "|hb||"),
        (layers("ag"), "all", (0, 1), "|hG||"),
        (layers("a", "b", "g"), "2", (2,), "|baG||"),
    ],
)
def test_layers(teacher, text, found, model):
    conversion = made(teacher, layers=text)
    assert conversion.layers == found
    assert spelled(conversion.transfer) == spelled(conversion.tuned) == model


def spells(entries, before, period, after):
    middle = entries[before : len(entries) - after]
    return len(middle) >= period and middle[:period] * (len(middle) // period) == middle


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_the_shortest_spelling_by_brute_force(n):
    for entries in itertools.product("ha", repeat=n):
        prefix, pattern, suffix = shortest(entries)
        left = n - len(prefix) - len(suffix)
        assert prefix + pattern * (left // len(pattern)) + suffix == entries
        sizes = itertools.product(range(n), range(1, n + 1), range(n))
        best = min(sum(given) for given in sizes if spells(entries, *given))
        assert len(prefix) + len(pattern) + len(suffix) == best
    model = dict(prefix=("a",), pattern=("b", "c"), suffix=("d",), layers=6)
    assert entries_of(model) == ["a", "b", "c", "b", "c", "d"]


@pytest.mark.parametrize(
    ("teacher", "text", "said"),
    [
        (layers(window=8), "all", "layer 0 is attention with window=8, which Hedgehog cannot"),
        (layers(softcap=20.0), "1", "layer 1 is attention with softcap=20.0, which"),
        (layers(sinks=True), "1", "layer 1 is attention with sinks=True, which"),
        (layers(first=2), "1", "layer 1 is attention with first=2, which"),
        (layers(), "4", "--layers names layer 4, and the model's 4 are 0 to 3"),
        (layers(), "1,,2", "--layers 1,,2 is not understood; give all, even"),
        (layers(), "3-", "--layers 3- is not understood"),
        (layers("ab"), "0-1", "layer 1 is based and not attention; layers of attention are 0"),
        (layers("b"), "all", "the model has no layer of attention, so there is nothing"),
        (layers(), "0-99999999999", "--layers names layer 99999999999, and the model's 4 are"),
        (layers("ah"), "0", "layer 1 is hedgehog with learned feature maps, which would be taught"),
        (layers("ta"), "1", "layer 0 is linear_attention with learned feature maps"),
        (layers(), "2-1", "--layers 2-1 runs backwards; give 1-2"),
    ],
)
def test_what_cannot_be_converted(teacher, text, said):
    with pytest.raises(UsageError) as caught:
        made(teacher, layers=text)
    assert said in str(caught.value)


def test_an_encoder_cannot():
    model = layers()["model"] | {"causal": False}
    with pytest.raises(UsageError, match="sees later tokens"):
        chosen("all", entries_of(model), model)


def test_what_each_run_has_of_the_teacher():
    conversion = made(layers("ag"), form="fla", width=8, match="outputs", transfer_steps=7)
    transfer, tuned = conversion.transfer, conversion.tuned
    own = {"heads": 4, "kv_heads": 2, "rope": False, "form": "fla", "width": 8, "window": None}
    for values in (transfer, tuned):
        entry = {"mixer": "hedgehog", "ffn": "gelu"} | own
        assert {k: values[f"model.blocks.gated_hedgehog.{k}"] for k in entry} == entry
        assert {k: values[f"model.mixers.hedgehog.{k}"] for k in own} == own
        assert (values["seed"], values["data.length"]) == (3, 8)
        assert not {"ema", "optim.warmup_tokens", "optim.schedule"} & set(values)
    assert (transfer["start"], transfer["trainable"], transfer["steps"]) == ("runs/t", MAPS, 7)
    assert (transfer["loss.name"], transfer["model.dropout"]) == ("output_transfer", 0.0)
    assert (transfer["optim.lr"], transfer["optim.weight_decay"]) == (1e-2, 0.0)
    assert (tuned["start"], tuned["steps"], tuned["model.dropout"]) == (
        "runs/s/transfer",
        1000,
        0.1,
    )
    assert (tuned["optim.name"], tuned["optim.methods.lamb.b1"]) == ("lamb", 0.8)
    assert tuned["optim.lr"] == pytest.approx(0.05)
    assert not {"trainable", "loss.name", "adapter.name"} & set(tuned)
    adapted = made(layers(), lora=4, lr=0.2).tuned
    assert (adapted["adapter.lora.rank"], adapted["trainable"]) == (4, MAPS)
    assert (adapted["optim.lr"], made(layers(), lora=4).tuned["optim.lr"]) == (0.2, 0.5)
