"""What a study's file may say, and the sentence for what it may not."""

import pytest

from analysis.compare import Rule
from launch import study
from launch.schema import UsageError
from tests.launch.sweep_test import ARMS, PAIR, STUDY, sentence


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


MOMENTUM = "optim.methods.sgd.momentum"
SETTINGS = {"short": {"data.length": 32}, "long": {"data.length": 64, MOMENTUM: 0.5}}
IN_BOTH = Rule(
    *("old", "validation/bits_per_byte", 0.01, {"new": "better"}), settings=("short", "long")
)


def test_every_arm_runs_in_every_setting_with_the_keys_that_it_reads(read):
    arms = {"old": {"data.length": 48}, "new": {"optim.name": "sgd"}}
    found = read(arms, rule=IN_BOTH, more=f"SETTINGS = {SETTINGS}")
    assert "Claimed of short and long, each: new is better than old." in str(found.rule)
    assert "with the same seed and setting" in str(found.rule)
    assert str(found.rule).endswith("data order, tokens or FLOPs differ, in one setting.")
    assert found.rule.judged == {"new@short": "better", "new@long": "better"}
    assert [found.rule.base(arm) for arm in found.rule.judged] == ["old@short", "old@long"]
    cells = {run.arm: run.config for run in found.runs if run.seed == 0}
    assert list(cells) == ["old@short", "new@short", "old@long", "new@long"]
    # An arm's own value wins over the setting's.
    assert [config["data"]["length"] for config in cells.values()] == [48, 32, 48, 64]
    assert cells["new@long"]["optim"]["methods"]["sgd"]["momentum"] == 0.5
    assert MOMENTUM not in found.runs[4].overrides
    assert found.runs[-1].name == "new@long-seed=1"
    assert found.record()["settings"] == ("short", "long")


def test_arms_go_on_from_the_run_of_the_same_seed_and_setting(read, tmp_path):
    arms = {"taught": {}, "old": {}, "new": {"optim.lr": [0.1, 0.2]}}
    settings = {name: {"data.length": length} for name, length in (("short", 32), ("long", 64))}
    more = f"SETTINGS = {settings}; AFTER = {dict(old='taught', new='old')}"
    found = read(arms, rule=IN_BOTH, more=f"{more}; CLAIMS = {IN_BOTH.claims}")
    after = {run.name: run.after for run in found.runs}
    assert after["taught@long-seed=1"] is None
    assert after["old@long-seed=1"] == "taught@long-seed=1"
    assert after["new@short-lr=0.2-seed=0"] == "old@short-seed=0"
    run = next(run for run in found.runs if run.name == "new@short-lr=0.2-seed=0")
    assert found.arguments(run, tmp_path)[-1] == f"--config.start={tmp_path}/old@short-seed=0"
    assert found.record()["runs"][run.name]["after"] == run.after


def test_an_override_that_no_arm_reads_is_refused(read):
    arms = {"old": {}, "new": {"optim.name": "sgd"}}
    found = read(arms, overrides={MOMENTUM: "0.5"})
    given = {run.arm: MOMENTUM in run.overrides for run in found.runs}
    assert given == {"old": False, "new": True}
    with pytest.raises(UsageError, match=r"sgd.momentum has no effect, because"):
        read(PAIR, overrides={MOMENTUM: "0.5"})


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
        (dict(more="SETTINGS = 3"), "SETTINGS is 3, not a dict"),
        (dict(more="SETTINGS = {'a@b': {}}"), "setting 'a@b' needs a name"),
        (dict(more="SETTINGS = {'a': {'seed': 1}}"), "not a dict of keys other than seed"),
        (dict(more="SETTINGS = {'a': {'optim.lr': [1, 2]}}"), "setting a lists values of optim.lr"),
        (dict(more="AFTER = {'old': 'new'}"), "AFTER lets old go on from new, which has to be an"),
        (dict(more="AFTER = {'new': 'x'}"), "AFTER lets new go on from x"),
        (dict(more="AFTER = {'new': 'old'}"), "new goes on from old, which has to have one value"),
        (
            dict(more="AFTER = {'new': 'old'}", arms={"old": {}, "new": {"start": "x"}}),
            "arm new sets start, which AFTER does",
        ),
        (dict(more="nonsense"), "line 13: NameError"),
    ],
)
def test_what_cannot_run_is_one_sentence(read, parts, part):
    with pytest.raises(UsageError) as error:
        read(**parts)
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1
