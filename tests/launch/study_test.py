"""What a study's file may say, and the sentence for what it may not."""

import pytest

from analysis.compare import Rule
from launch import study
from launch.schema import UsageError
from tests.launch.sweep_test import ARMS, STUDY, sentence


@pytest.fixture
def read(tmp_path):
    """read(**parts of STUDY): the study."""

    def make(arms=None, margin=0.01, more="", rule=None, overrides=None):
        arms = ARMS if arms is None else arms
        rule = sentence(arms) if rule is None else rule
        path = tmp_path / "study.py"
        path.write_text(STUDY.format(arms=arms, margin=margin, more=more, rule=rule))
        return study.read(str(path), overrides or {})

    return make


def test_a_grid_is_every_combination_in_the_file_s_order(read):
    arms = {
        "old": {},
        "new": {"optim.lr": [0.1, 1], "optim.clip": [None, 2.0], "optim.name": "sgd"},
    }
    found = read(arms)
    assert found.title == "A study of nothing."
    assert [run.name for run in found.runs] == ["old-seed=0", "old-seed=1"] + [
        f"new-lr={lr}-clip={clip}-seed={seed}"
        for lr in ("0.1", "1")
        for clip in ("none", "2.0")
        for seed in (0, 1)
    ]
    last = found.runs[-1]
    assert last.point == {"optim.lr": "1", "optim.clip": "2.0"}
    assert last.config["optim"]["lr"] == 1.0
    assert last.config["optim"]["name"] == "sgd"
    assert last.config["seed"] == last.seed == 1
    assert found.runs[-4].config["optim"]["clip"] is None
    assert last.overrides["seed"] == "1"


def test_claims_are_all_other_arms_unless_said(read):
    assert read().rule.claims == {"new": "better"}
    claims = {"new": "no worse"}
    rule = Rule("old", "validation/bits_per_byte", 0.01, claims, True, 0.05, "new")
    assert "or FLOPs a token by more than 5%." in str(rule)
    assert (
        read(rule=rule, more=f"CLAIMS = {claims}; HIGHER = True; FLOPS = 0.05; TOWARD = 'new'").rule
        == rule
    )


def test_the_rule_may_be_wrapped(read):
    text = str(sentence(ARMS))
    assert read(rule=text.replace(". ", ".\n  ")).rule == sentence(ARMS)


@pytest.mark.parametrize(
    ("parts", "part"),
    [
        (dict(rule="Whatever."), "the docstring lacks the rule that will be computed, as a par"),
        (dict(margin=0.02), "of its own: RULE Claimed: new is better than old. Each arm"),
        (dict(margin="None"), "it needs MARGIN, a float"),
        (dict(margin=-1), "MARGIN -1 is below 0"),
        (dict(arms={}), "it needs ARMS, a dict"),
        (dict(arms={"x": {}}), "BASELINE 'old' is none of the arms x"),
        (dict(arms={"old": {}, "a/b": {}}), "arm 'a/b' needs a name of letters"),
        (dict(arms={"old": {}, "new": 3}), "arm new is 3, not a dict of keys"),
        (dict(arms={"old": {}, "new": {"seed": 3}}), "arm new sets seed, which SEEDS does"),
        (dict(arms={"old": {}, "new": {"optim.lr": []}}), "no value to try for optim.lr"),
        (dict(more="SEEDS = (0, 0)"), "SEEDS (0, 0) are not different integers"),
        (dict(more="SEEDS = (0, '1')"), "are not different integers"),
        (dict(more="SEEDS = 3"), "it needs SEEDS, a tuple"),
        (dict(arms={"old": {}}, rule="x"), "there is no claim"),
        (dict(more="CLAIMS = {'old': 'better'}"), "names 'old', which is no arm beside"),
        (dict(more="CLAIMS = {'new': 'nicer'}"), "it may say 'better' or 'no worse'"),
        (dict(arms={"old": {}, "new": {"optim.lrr": 1.0}}), "run new: --config.optim.lrr is not"),
        (dict(arms={"old": {}, "new": {"optim.lr": [0.1, "x"]}}), "run new-lr=x: "),
        (dict(arms={"old": {}, "new": {"optim.name": "no"}}), "optim/methods has no no.py"),
        (dict(arms={"old": {}, "new": {"steps": [True]}}), "run new-steps=true: "),
        (dict(arms={"old": {}, "new": {"data.mixture": ("a,b",)}}), "run new: "),
        (
            dict(arms={"old": {}, "new": {"optim.lr": [0.1, 1e-1]}}),
            "two runs are called new-lr=0.1",
        ),
        (
            dict(arms={"old": {}, "new": {"train.sample_prompt": "'x'"}}),
            "run new: train.sample_prompt cannot be \"'x'\"",
        ),
        (dict(more="nonsense"), "line 13: NameError"),
    ],
)
def test_what_cannot_run_is_one_sentence(read, parts, part):
    with pytest.raises(UsageError) as error:
        read(**parts)
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1
