"""What resolves, resolves exactly; every way it can be wrong ends in one sentence."""

import json

import pytest

from launch import checks
from launch.config import nearest, resolve, shared_keys
from launch.schema import UsageError


def _overrides(text):
    return dict(part.split("=", 1) for part in text.split())


def test_resolved_dict_is_plain_and_holds_what_runs_and_no_more(repository):
    config = resolve(
        repository.experiment("config.steps = 7"), {"model.d_model": "32"}, repository.path
    )
    assert config["steps"] == 7
    assert config["model"]["d_model"] == 32
    attention = config["model"]["mixers"]["attention"]
    assert attention == {
        "heads": 4, "kv_heads": None, "head_dim": None, "rope": True, "base": 1e4,
        "scaling": "none", "window": None,
    }  # fmt: skip
    assert list(config["model"]["mixers"]) == ["attention"]
    assert config["model"]["ffns"] == {"swiglu": {"width": None}}
    assert config["model"]["heads"] == {"linear": {}}
    assert config["optim"]["methods"] == {"adamw": {"b1": 0.9}}
    assert config["optim"]["schedules"] == {"cosine": {"final": 0.1}}
    assert config["data"]["transform"] == {}
    assert json.loads(json.dumps(config))["model"]["pattern"] == ["attention"]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("ema", "0.99", 0.99),
        ("ema", "none", None),
        ("optim.clip", "None", None),
        ("optim.lr", "1", 1.0),
        ("optim.lr", "1e-3", 1e-3),
        ("seed", "1_000", 1000),
        ("model.tied", "false", False),
        ("model.tied", "True", True),
        ("model.positions", "none", "none"),
        ("model.vocab", "512", 512),
        ("trainable", "'none'", "none"),
        ("model.pattern", "attention,slow", ("attention", "slow")),
        ("model.pattern", "('slow', 'attention')", ("slow", "attention")),
        ("model.pattern", '["slow","slow"]', ("slow", "slow")),
        ("data.transforms", "masked_lm", ("masked_lm",)),
        ("data.transforms", "()", ()),
        ("data.transforms", "", ()),
        ("mesh.data", "-1", -1),
        ("model.mixers.attention.window", "64", 64),
        ("model.mixers.attention.window", "none", None),
        ("model.mixers.attention.scaling", "none", "none"),
        ("model.ffns.swiglu.width", "96", 96),
        ("data.sources.stdlib.root", "/tmp/a b=c", "/tmp/a b=c"),
    ],
)
def test_values_take_the_type_of_their_key(repository, key, text, value):
    got = resolve("base", {key: text}, repository.path)
    for part in key.split("."):
        got = got[part]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("model.d_modl=3", ["model.d_modl", "did you mean model.d_model?"]),
        ("lr=1", ["did you mean optim.lr?"]),
        ("heads=8", ["did you mean model.mixers.attention.heads?"]),
        ("model.mixers.attention.windw=8", ["did you mean model.mixers.attention.window?"]),
        ("zzz=1", ["zzz is not a key", "--help"]),
        ("model.mixers.helper.x=2", ["is not a key"]),
        ("model=3", ["model is a section", "model.d_model"]),
        ("model.mixers.attention=3", ["is a section", "model.mixers.attention.heads"]),
        ("steps=ten", ["--config.steps takes an integer and got 'ten'"]),
        ("steps=1.5", ["an integer", "1.5"]),
        ("steps=none", ["an integer", "none"]),
        ("ema=much", ["a number or none", "'much'"]),
        ("optim.lr=nan", ["optim.lr", "a number"]),
        ("model.tied=1", ["true or false", "'1'"]),
        ("model.pattern=('a',", ["model.pattern", "names separated by commas"]),
        ("model.pattern=(1,2)", ["model.pattern", "names separated by commas"]),
        ("model.norm=rms", ["rmsnorm | layernorm", "'rms'"]),
        ("model.mixers.attention.heads=1.5", ["model.mixers.attention.heads", "an integer"]),
        ("model.pattern=slow model.mixers.slow.kind=c", ["a | b", "'c'"]),
        ("model.pattern=atention", ["models/mixers has no atention.py", "'attention'"]),
        ("model.ffn=swigl", ["model.ffn", "models/ffns has no swigl.py", "'swiglu'"]),
        ("optim.name=adam", ["optim/methods has no adam.py", "'adamw'"]),
        ("optim.schedule=cosin", ["optim/schedules.py has no such function", "'cosine'"]),
        ("loss.name=crossentropy", ["training/losses", "'cross_entropy'"]),
        ("data.source=stdlb", ["data/sources has no stdlb.py", "'stdlib'"]),
        ("data.transforms=mask", ["data.transforms names 'mask'", "'masked_lm'"]),
        ("data.transforms=pack", ["data/transforms/pack.py has no Transform", "did you mean"]),
        ("optim.methods.sgd.momentum=0.5", ["no effect", "sgd", "optim.methods it uses adamw"]),
        ("data.transform.masked_lm.rate=0.5", ["no effect", "it uses nothing"]),
        ("optim.warmup_tokens=64 optim.warmup_fraction=0.5", ["no effect", "warmup_tokens=none"]),
        ("steps=-1", ["steps is -1", "must not be negative"]),
        ("data.length=-1", ["data.length is -1"]),
        ("model.layers=0", ["model.layers is 0"]),
        ("train.keep=0", ["train.keep is 0"]),
        ("model.dropout=1.0", ["model.dropout is 1.0", "below 1"]),
        ("seed=-1", ["seed is -1", "negative"]),
        ("trainable=(", ["trainable", "regular expression"]),
        ("data.micro_batches=3", ["batch_size 8", "3 micro-batches", "micro_batches to 2"]),
        ("optim.warmup_tokens=20480", ["20480", "160 rows of 128"]),
        ("model.pattern=", ["model.pattern is empty"]),
        ("model.layers=3 model.pattern=slow,slow", ["is 3", "of 2", "set it to 2 or 4"]),
        ("model.layers=1 model.prefix=slow,slow", ["is 1", "prefix of 2", "2 or 3"]),
        ("model.mixers.attention.heads=5", ["d_model 64", "5 heads", "head_dim"]),
        ("model.mixers.attention.heads=0", ["heads is 0"]),
        ("model.mixers.attention.kv_heads=3", ["heads 4", "3 kv_heads", "divisor of 4"]),
        ("mesh.fsdp=0", ["mesh.fsdp is 0"]),
        ("mesh.fsdp=-1", ["mesh.data and mesh.fsdp", "-1"]),
        ("model.blocks.a.mixer=slw", ["model.blocks.a.mixer names 'slw'", "'slow'"]),
        ("model.blocks.slow.mixer=slow", ["model.blocks.slow.mixer", "rename the entry"]),
        ("model.blocks.a.mixer=slow", ["no effect", "does not use a"]),
        ("model.blocks.a.rate=1", ["no entry 'a'", "model.blocks.a.mixer"]),
        (
            "model.pattern=a model.blocks.a.mixer=attention model.blocks.a.heads=7",
            ["7 heads", "model.blocks.a.heads"],
        ),
    ],
)
def test_errors_are_one_sentence(repository, overrides, parts):
    with pytest.raises(UsageError) as caught:
        resolve("base", _overrides(overrides), repository.path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def test_head_dim_lifts_divisibility(repository):
    own = "model.mixers.attention.heads=5 model.mixers.attention.head_dim=8"
    config = resolve("base", _overrides(own), repository.path)
    assert config["model"]["mixers"]["attention"]["heads"] == 5


def test_entries_hold_their_mixers_arguments_flat(repository):
    path = repository.experiment(
        "config.model.pattern = ('local', 'attention')",
        "config.model.mixers.attention = dict(heads=8)",
        "config.model.blocks.local = dict(mixer='attention', ffn='gelu', window=16)",
        "config.model.blocks.unused = dict(mixer='slow')",
        "config.model.mixers.slow = dict(rate=1)",
    )
    overrides = {"model.blocks.local.base": "2e4", "model.mixers.attention.kv_heads": "2"}
    model = resolve(path, overrides, repository.path)["model"]
    assert model["blocks"] == {
        "local": {
            "mixer": "attention", "ffn": "gelu", "heads": 8, "kv_heads": 2, "head_dim": None,
            "rope": True, "base": 2e4, "scaling": "none", "window": 16,
        }
    }  # fmt: skip
    assert model["mixers"]["attention"]["heads"] == 8
    assert model["mixers"]["attention"]["window"] is None
    assert set(model["mixers"]) == {"attention"}
    assert set(model["ffns"]) == {"gelu", "swiglu"}


def test_an_entry_can_be_made_on_the_command_line(repository):
    own = "model.pattern=a model.blocks.a.mixer=slow model.blocks.a.rate=2"
    model = resolve("base", _overrides(own), repository.path)["model"]
    assert model["blocks"] == {"a": {"mixer": "slow", "ffn": "swiglu", "rate": 2.0, "kind": "a"}}
    assert model["mixers"] == {}


def test_a_file_may_prepare_methods_that_the_command_line_chooses(repository):
    path = repository.experiment("config.optim.methods.sgd = dict(momentum=0.5)")
    assert resolve(path, {}, repository.path)["optim"]["methods"] == {"adamw": {"b1": 0.9}}
    chosen = resolve(path, {"optim.name": "sgd"}, repository.path)["optim"]["methods"]
    assert chosen == {"sgd": {"momentum": 0.5}}


def test_nearest_prefers_the_same_last_part():
    names = ["optim.lr", "model.layers", "model.d_model"]
    assert nearest("lr", names) == "optim.lr"
    assert nearest("modl.d_modl", names) == "model.d_model"
    assert nearest("qqqq", names) is None


def test_checks_name_keys_that_exist():
    named = (*checks.POSITIVE, *checks.NOT_NEGATIVE, *checks.FRACTIONS)
    assert set(named) <= set(shared_keys())
