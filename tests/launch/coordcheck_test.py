"""Every mixer, ffn and optimizer learns at the same pace at any width; and the check can fail."""

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

WIDTHS = (128, 512)
GIVEN = dict(steps=3, rows=1, tokens=16, seeds=1, standard=False)
LIMIT = 0.3  # of one start; a wrong power of the width is off by 0.5 or 1
OWN = {
    "data.sources.stdlib.max_bytes": "100000",
    "model.layers": "2",
    "model.ffns.swiglu.width": "256",
    "optim.clip": "none",
    "optim.lr": "3e-3",
}
# A step of these is as large as the weight's norm, or its gradient, makes it.
RATES = {"lamb": "0.03", "lars": "30", "sgd": "0.3", "muon": "0.02", "lion": "1e-3"}

names = lambda package: [module.name for module in pkgutil.iter_modules(package.__path__)]


def faults(standard=False, **own):
    config = resolve("experiments/quickstart.py", OWN | {k.replace("__", "."): v for k, v in own.items()})
    given = types.SimpleNamespace(**GIVEN | {"standard": standard})
    configs = coordcheck.at_widths(config, WIDTHS, given)
    found = coordcheck.measure(configs, given)
    return [s for s in (coordinates.judge(one, WIDTHS, LIMIT) for one in found) if s.fault]


@pytest.mark.parametrize("mixer", names(models.mixers))
def test_mixers(mixer):
    assert faults(model__pattern=mixer) == []


@pytest.mark.parametrize("ffn", names(models.ffns))
def test_ffns(ffn):
    assert faults(model__ffn=ffn, model__tied="False") == []


@pytest.mark.parametrize("method", names(optim.methods))
def test_methods(method):
    assert faults(optim__name=method, optim__lr=RATES.get(method, "3e-3")) == []
