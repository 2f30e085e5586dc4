"""Every mixer, ffn and optimizer learns at one pace at any width; and the check can fail."""

import json
import pkgutil
import types

import numpy as np
import pytest

import models.ffns
import models.mixers
import optim.methods
from analysis import coordinates
from launch import coordcheck
from launch.config import resolve
from launch.schema import UsageError
from optim.methods import adamw

WIDTHS = (128, 512)
GIVEN = dict(steps=3, rows=1, tokens=16, seeds=1, standard=False)
LIMIT = 0.3  # of one start; a wrong power of the width is off by 0.5 or 1
OWN = {
    "data.sources.stdlib.max_bytes": "100000",
    "model.layers": "2",
    "optim.clip": "none",
    "optim.lr": "3e-3",
}
# Steps of about the same size, as each method measures it.
RATES = {"adafactor": "0.03", "lamb": "0.03", "lars": "0.01", "lion": "1e-3", "sgd": "0.03"}

names = lambda package: [module.name for module in pkgutil.iter_modules(package.__path__)]


def judged(standard=False, **own):
    """{activation: its slopes} over WIDTHS."""
    own = OWN | {key.replace("__", "."): value for key, value in own.items()}
    if own.get("model.ffn", "swiglu") == "swiglu":
        own["model.ffns.swiglu.width"] = "256"
    given = types.SimpleNamespace(**GIVEN | {"standard": standard})
    configs = coordcheck.at_widths(resolve("experiments/quickstart.py", own), WIDTHS, given)
    slopes = (coordinates.judge(one, WIDTHS, LIMIT) for one in coordcheck.measure(configs, given))
    return {one.name: one for one in slopes}


def faults(**own):
    return {name: one.fault for name, one in judged(**own).items() if one.fault}


@pytest.mark.parametrize("mixer", names(models.mixers))
def test_mixers(mixer):
    assert faults(model__pattern=mixer) == {}


@pytest.mark.parametrize("ffn", names(models.ffns))
def test_ffns(ffn):
    """Under a head of its own; mixers have that of the embedding."""
    assert faults(model__ffn=ffn, model__tied="False") == {}


@pytest.mark.parametrize("method", [name for name in names(optim.methods) if name != "adamw"])
def test_methods(method):
    assert faults(optim__name=method, optim__lr=RATES.get(method, "3e-3")) == {}


def test_the_standard_parametrization_grows():
    found = faults(standard=True)
    assert found["mixer 0"] == found["ffn 0"] == found["residual 0"] == "grows"


def test_a_learning_rate_that_falls_too_fast_is_seen_to_die(monkeypatch):
    rule = adamw.width
    monkeypatch.setattr(adamw, "width", lambda entry: rule(entry) ** 2)
    found = faults()
    assert found["mixer 0"] == found["ffn 0"] == "dies"


def coordinate(name, size, change):
    grid = lambda power: np.float64(WIDTHS)[:, None] ** power * np.ones(3)
    return coordinates.Coordinate(name, grid(size), grid(change)[:, 1:])


@pytest.mark.parametrize(
    ("name", "size", "change", "fault"),
    [
        ("mixer 0", 0.1, -0.1, None),
        ("mixer 0", -0.5, 0.0, None),
        ("mixer 0", 0.0, 0.5, "grows"),
        ("mixer 0", 0.5, 0.0, "grows"),
        ("mixer 0", 0.0, -0.5, "dies"),
        ("logits", -0.5, -0.5, None),
        ("router 1", -1.0, -1.0, "dies"),
        ("loss", 0.0, 0.5, None),
        ("loss", 0.0, -0.5, "dies"),
    ],
)
def test_slopes_and_what_follows(name, size, change, fault):
    found = coordinates.judge(coordinate(name, size, change), WIDTHS, LIMIT)
    assert (found.size, found.change) == pytest.approx((size, change))
    assert found.fault == fault


def test_what_never_changes_and_what_is_not_finite():
    still = coordinates.Coordinate("keys", np.ones((2, 3)), np.zeros((2, 2)))
    assert coordinates.judge(still, WIDTHS, LIMIT).fault is None
    broken = coordinates.Coordinate("keys", np.full((2, 3), np.nan), np.full((2, 2), np.nan))
    assert coordinates.judge(broken, WIDTHS, LIMIT).fault == "grows"


def test_sizes_given_by_number_follow_the_width():
    own = {"model.ffns.swiglu.width": "96", "model.mixers.attention.heads": "2"}
    own |= {"model.mixers.attention.head_dim": "64", "model.mixers.attention.kv_heads": "1"}
    config = resolve("experiments/quickstart.py", own)
    assert config["model"]["d_model"] == 128
    made = coordcheck.at_widths(config, (128, 512), types.SimpleNamespace(**GIVEN))[512]["model"]
    assert made["ffns"]["swiglu"]["width"] == 4 * 96
    assert made["mixers"]["attention"] | {"heads": 8, "kv_heads": 4} == made["mixers"]["attention"]
    assert made["base_d_model"] == 128
    with pytest.raises(UsageError, match=r"kv_heads 1 cannot be 0\.5 times as large"):
        coordcheck.at_widths(config, (64, 512), types.SimpleNamespace(**GIVEN))


@pytest.mark.parametrize("flag", ["--widths=64", "--widths=64,x", "--widths=0,64", "--steps=0"])
def test_what_cannot_be_checked_is_one_sentence(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        coordcheck.main(["--config=quickstart", flag])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert flag.partition("=")[0] in error
    assert error.count("\n") == 1


def test_the_command_tells_draws_and_exits_by_what_it_found(tmp_path, capsys):
    small = ["--config=quickstart", "--widths=32,128", "--steps=1", "--rows=1", "--tokens=8"]
    small += ["--config.model.layers=2", "--limit=9", f"--out={tmp_path / 'a' / 'check.json'}"]
    with pytest.raises(SystemExit) as stopped:
        coordcheck.main(small)
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "| residual 3 |" in told
    assert "muP from width 32: no activation grows or dies" in told
    held = json.loads((tmp_path / "a" / "check.json").read_text())
    assert held["widths"] == [32, 128]
    assert {"embedded", "logits", "loss", "mixer 0"} <= {a["name"] for a in held["activations"]}
    assert (tmp_path / "a" / "check.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as stopped:
        coordcheck.main([*small[:-2], "--limit=0"])
    assert stopped.value.code == 1


@pytest.mark.parametrize(
    "own",
    [
        {"model__pattern": "based", "optim__name": "sgd", "optim__lr": "0.03"},
        {
            "model__pattern": "hedgehog",
            "model__mixers__hedgehog__window": "4",
            "optim__name": "sgd",
            "optim__lr": "0.03",
        },
        {"adapter__name": "lora", "optim__name": "lamb"},
    ],
    ids=["based-sgd", "window-sgd", "lora-lamb"],
)
def test_pairs_in_which_fans_differ(own):
    assert faults(**own) == {}
