import pytest

from data import methods


def test_nearest_names():
    with pytest.raises(ValueError, match=r"no data/sources/stdlb\.py\. Nearest: stdlib"):
        methods.make("sources", "Source", "stdlb", {})
    with pytest.raises(ValueError, match=r"no data/transforms/masked-lm\.py\. Nearest: masked_lm"):
        methods.make("transforms", "Transform", "masked-lm", {})
    with pytest.raises(ValueError, match=r"masked_lm has no argument 'ratio'\. Nearest: rate"):
        methods.make("transforms", "Transform", "masked_lm", {"ratio": 0.1})
    with pytest.raises(ValueError, match=r"transforms/pack\.py has no class Transform"):
        methods.make("transforms", "Transform", "pack", {})


def test_own_arguments_reach_the_method():
    assert methods.make("transforms", "Transform", "masked_lm", {"rate": 0.25}).rate == 0.25
