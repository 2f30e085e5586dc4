"""Configuration files: their mistakes are told in one sentence, and printing reads back."""

import pytest

from launch.config import resolve
from launch.files import read, render
from launch.schema import UsageError


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("config.model.d_modl = 3", ["x.py sets model.d_modl", "did you mean model.d_model?"]),
        ("config.model.mixers.attention = dict(head=2)", ["sets model.mixers.attention.head"]),
        ("config.model.blocks.a = dict(window=3)", ["no entry 'a' with a mixer"]),
        ("config.steps = None", ["steps takes an integer and got None"]),
        ("config.steps = True", ["steps takes an integer and got True"]),
        ("config.steps = 1.5", ["x.py line 7", "TypeError"]),
        ("config.model.ffns.swiglu = dict(width='a')", ["model.ffns.swiglu.width takes"]),
        ("raise ValueError('two\\n lines')", ["x.py line 7: ValueError: two lines"]),
        ("1 +", ["x.py line 7: SyntaxError"]),
        ("return 3", ["returned int, not a ConfigDict"]),
    ],
)
def test_mistakes_in_a_file_name_the_file(repository, line, parts):
    with pytest.raises(UsageError) as caught:
        resolve(repository.experiment(line), {}, repository.path)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_file_without_get_config_says_so(repository):
    repository.write("experiments/y.py", "x = 1\n")
    with pytest.raises(UsageError, match="get_config"):
        resolve("y", {}, repository.path)


def test_a_missing_file_lists_near_ones(repository):
    for name in ("gpt2_124m", "quick", "_hidden"):
        repository.write(f"experiments/{name}.py", "")
    with pytest.raises(UsageError, match=r"there is no configuration 'gpt2'; .*gpt2_124m.py$"):
        resolve("gpt2", {}, repository.path)
    with pytest.raises(UsageError, match=r"gpt2_124m.py, quick.py$"):
        resolve(str(repository.path / "experiments" / "zzzzzz.py"), {}, repository.path)


def test_printed_configuration_is_deterministic_and_reads_back(repository, tmp_path):
    path = repository.experiment(
        "config.model.pattern = ('local',)",
        "config.model.blocks.local = dict(mixer='attention', window=16)",
    )
    config = resolve(path, {"ema": "0.5"}, repository.path)
    text = render(config)
    assert text == render(resolve(path, {"ema": "0.5"}, repository.path))
    assert read(text) == config
    printed = tmp_path / "printed.txt"
    printed.write_text(text)
    assert resolve(str(printed), {}, repository.path) == config
    assert resolve(str(printed), {"steps": "3"}, repository.path)["steps"] == 3
    for text in ("steps 3", "steps = 3 +", "\ufffd"):
        with pytest.raises(UsageError, match="line 1 is not"):
            read(text)
    with pytest.raises(UsageError, match="line 2 is not"):
        read("data = 1\ndata.length = 2")
