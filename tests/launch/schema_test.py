"""A method's signature is its schema."""

import pytest

from launch.config import resolve
from launch.schema import UsageError
from tests.launch.conftest import MIXER


@pytest.mark.parametrize(
    "own", ["rate=0.5", "rate: float", "rate: int = 0.5", "rate: list = []", "rate: float = x"]
)
def test_a_signature_that_breaks_the_rule_is_named(repository, own):
    path = repository.path / "models" / "mixers" / "slow.py"
    path.write_text(MIXER.format(own=own))
    if own == "rate: float":  # Without a default it is the caller's to give, as rngs is.
        overrides = {"model.pattern": "slow"}
        assert resolve("base", overrides, repository.path)["model"]["mixers"] == {"slow": {}}
        return
    with pytest.raises(UsageError, match=r"models/mixers/slow.py line 5: own argument 'rate'"):
        resolve("base", {"model.pattern": "slow"}, repository.path)


def test_a_half_written_method_does_not_stop_those_who_do_not_use_it(repository):
    (repository.path / "models" / "mixers" / "slow.py").write_text("class Mixer(:\n")
    assert resolve("base", {}, repository.path)["model"]["mixers"].keys() == {"attention"}
    with pytest.raises(UsageError, match=r"slow.py line 1 is not Python"):
        resolve("base", {"model.pattern": "slow"}, repository.path)
