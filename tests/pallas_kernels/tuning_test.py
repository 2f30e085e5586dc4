"""Explicit, recorded, guessed: in this order."""

import dataclasses
import json

import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import tuning

KEY = {"B": 2, "L": 1024, "S": 1024, "K": 128, "causal": True, "dtype": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Config:
    T: int = 8
    C: int = 8

    def __post_init__(self):
        if self.T % 8:
            raise ValueError(f"T must be a multiple of 8, not {self.T}")


@dataclasses.dataclass(frozen=True)
class Other:
    T: int = 8


@pytest.fixture(autouse=True)
def on_a_v5p(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "ROOM", tmp_path)
    device = AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def write(content):
    path = tuning.record("op", "TPU v5p")
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def entry(T, **changes):
    return {"key": KEY | changes, "config": {"T": T, "C": 128}, "how": "a test"}


def choose(key=KEY, explicit=None):
    return tuning.choose("op", "fast", key, explicit, Config)


def test_a_record_is_named_like_its_device():
    assert tuning.record("op", "TPU v5p").parts[-3:] == ("op", "tuned", "tpu-v5p.json")
    assert tuning.record("op", "NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


def test_explicit_goes_before_the_record_and_that_before_the_guess():
    assert choose() == Config()
    write({"fast": [entry(256)], "slow": [entry(512)]})
    tuning.entries.cache_clear()
    assert choose() == Config(256, 128)
    assert choose(explicit=Config(16)) == Config(16)


def test_the_nearest_length_and_batch_speak_and_the_rest_must_agree():
    lengths = {256: (2, 256), 1024: (2, 1024), 4096: (1, 4096)}
    write({"fast": [entry(T, B=B, L=L, S=L) for T, (B, L) in lengths.items()]})
    of = lambda **changes: choose(KEY | changes).T
    assert of() == 1024
    assert of(L=300, S=300) == 256
    assert of(B=1, L=3000, S=3000) == 4096
    assert of(L=16384, S=16384) == 4096  # 4 times away
    assert of(L=16385, S=16384) == 8
    assert of(L=512, S=512) == 256  # as near as 1024, and first
    for other in ({"K": 64}, {"causal": False}, {"dtype": "float32"}, {"extra": 1}):
        assert of(**other) == 8


def test_a_config_of_another_implementation_is_refused():
    with pytest.raises(ValueError, match=r"'fast' takes a config of .*Config, not .*Other"):
        choose(explicit=Other())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no record of tuning"),
        ([], "is no record of tuning"),
        ({"fast": {}}, "is no record of tuning"),
        ({"fast": [{"key": KEY}]}, "is no record of tuning"),
        ({"fast": [entry(8, L="long")]}, "is no record of tuning"),
        ({"fast": [entry(8, L=0)]}, "is no record of tuning"),
        ({"fast": [{"key": KEY, "config": {"TT": 8}}]}, "the field 'TT', but it has C, T"),
        ({"fast": [entry(9)]}, "holds no .*Config: T must be a multiple of 8, not 9"),
    ],
)
def test_a_malformed_record_is_one_sentence_that_names_it(content, message):
    write(content)
    with pytest.raises(ValueError, match=message) as error:
        choose()
    assert "tpu-v5p.json" in str(error.value)
    assert "\n" not in str(error.value)
