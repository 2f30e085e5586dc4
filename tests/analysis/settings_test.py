"""Reports of studies over settings, and of runs that go on from others."""

import json
import shutil

import pytest

from analysis import report
from analysis.studies import load
from analysis.summary import summarise
from tests.analysis import written


def test_settings_are_judged_each_against_its_own_baseline(summary):
    one = lambda *values: {"0.1": list(values)}
    arms = {"old@a": one(2.0, 2.1, 2.2), "new@a": one(1.5, 1.61, 1.7), "half@a": one(1.8, 1.9, 2.0)}
    arms |= {
        "old@b": one(1.0, 1.1, 1.2),
        "new@b": one(1.5, 1.6, 1.71),
        "half@b": one(1.2, 1.3, 1.4),
    }
    claims = {"new": "better", "half": "better"}
    found = summary(arms, settings=["a", "b"], baseline="old", claims=claims, toward="new")
    told = {claim["said"]: claim["verdict"] for claim in found["claims"]}
    assert told == {
        "new@a is better than old@a": "confirmed",
        "half@a is better than old@a": "confirmed",
        "new@b is better than old@b": "refuted",
        "half@b is better than old@b": "refuted",
    }
    text = report.markdown(found)
    assert "by the means: half@a 40.3%." in text
    assert "by the means: half@b 39.7%." in text
    assert "with the same seed and setting" in text


def test_what_differs_between_settings_is_no_difference(summary, tmp_path):
    one = {"0.1": [2.0, 2.1, 2.2]}
    arms = {f"{arm}@{setting}": one for setting in "ab" for arm in ("old", "new")}
    given = dict(settings=["a", "b"], baseline="old", claims={"new": "better"})
    summary(arms, **given)
    data = written.CONFIG["data"] | {"length": 16}
    for arm in ("old", "new"):
        for seed in range(3):
            name = f"{arm}@b-lr=0.1-seed={seed}"
            written.rerun(tmp_path, name, config={"data": data}, flops_per_token={"visible": 900.0})
    assert summarise(load(tmp_path))["differing"] == []
    written.rerun(tmp_path, "new@a-lr=0.1-seed=2", config={"data": data})
    assert len(summarise(load(tmp_path))["differing"]) == 2


def test_tokens_of_runs_that_go_on_are_counted_together(summary, tmp_path):
    one = {"0.1": [2.0, 2.1, 2.2]}
    arms = {"old": one, "new": one, "before": one}
    given = written.study(tmp_path, arms, claims={"new": "better"})
    assert summarise(load(tmp_path))["differing"] == []
    for seed in range(3):
        given["runs"][f"new-lr=0.1-seed={seed}"]["after"] = f"before-lr=0.1-seed={seed}"
    (tmp_path / "study.json").write_text(json.dumps(given))
    found = summarise(load(tmp_path))
    assert "1280, then 1280" in found["differing"][0]
    assert [sentence.partition(":")[0] for sentence in found["differing"]] == ["tokens differ"]
    assert "new from before; their tokens and FLOPs are counted together" in report.markdown(found)
    # Nobody judges this arm, so it may differ.
    for seed in range(3):
        del given["runs"][f"new-lr=0.1-seed={seed}"]["after"]
    given["runs"]["before-lr=0.1-seed=1"]["after"] = "old-lr=0.1-seed=1"
    (tmp_path / "study.json").write_text(json.dumps(given))
    found = summarise(load(tmp_path))
    assert found["differing"] == []
    pairs = report.markdown(found).partition("## Differences")[2].partition("## Grid")[0]
    assert "| new |" in pairs
    assert "| before |" not in pairs


def test_a_stage_of_no_steps_adds_nothing(summary, tmp_path):
    """As of an arm that is scored with a part of its model switched off."""
    one = {"0.1": [2.0, 2.1, 2.2]}
    given = written.study(tmp_path, {"old": one, "new": one}, claims={"new": "better"})
    for seed in range(3):
        name = f"new-lr=0.1-seed={seed}"
        given["runs"][name]["after"] = f"old-lr=0.1-seed={seed}"
        head = written.header(config={"seed": seed, "steps": 0})
        row = {"step": 0, "tokens": 0, "time": 1.0, written.METRIC: 2.0}
        written.write(tmp_path / name, [{"header": head}, row])
        (tmp_path / name / "final.json").write_text('{"step": 0}')
    (tmp_path / "study.json").write_text(json.dumps(given))
    found = summarise(load(tmp_path))
    assert found["differing"] == []
    assert found["arms"]["new"]["curve"]["tokens"] == []


def test_what_was_before_counts_too(summary, tmp_path):
    """Corpora and FLOPs a token of every stage, each weighed by its tokens."""
    one = {"0.1": [2.0, 2.1, 2.2]}
    arms = {"old": one, "new": one, "first": one, "second": one}
    given = written.study(tmp_path, arms, claims={"new": "better"}, flops=0.05)
    for arm, before in (("old", "first"), ("new", "second")):
        for seed in range(3):
            given["runs"][f"{arm}-lr=0.1-seed={seed}"]["after"] = f"{before}-lr=0.1-seed={seed}"
    (tmp_path / "study.json").write_text(json.dumps(given))
    assert summarise(load(tmp_path))["differing"] == []
    written.rerun(tmp_path, "second-lr=0.1-seed=0", flops_per_token={"visible": 650.0})
    assert summarise(load(tmp_path))["differing"] == []  # (600 + 650) / 2 is 4.2% more
    written.rerun(tmp_path, "second-lr=0.1-seed=0", flops_per_token={"visible": 670.0})
    assert summarise(load(tmp_path))["differing"] == [
        "FLOPs a token differ: 600 in old-lr=0.1-seed=0; 635 in new-lr=0.1-seed=0"
    ]
    written.rerun(tmp_path, "second-lr=0.1-seed=0", fingerprint="another")
    assert summarise(load(tmp_path))["differing"][0].startswith("corpora differ")


def test_a_run_whose_parent_diverged_is_a_sentence(summary, tmp_path):
    one = {"0.1": [2.0, 2.1, 2.2]}
    given = written.study(
        tmp_path, {"old": one, "new": one, "first": one}, claims={"new": "better"}
    )
    given["runs"]["new-lr=0.1-seed=1"]["after"] = "first-lr=0.1-seed=1"
    (tmp_path / "study.json").write_text(json.dumps(given))
    shutil.rmtree(tmp_path / "new-lr=0.1-seed=1")
    folder = tmp_path / "first-lr=0.1-seed=1"
    row = {"step": 3, "tokens": 96, "time": 1.0, "loss": "NaN"}
    written.write(folder, [{"header": written.header()}, row])
    with pytest.raises(ValueError, match=r"first-lr=0.1-seed=1 diverged at step 3, so new-lr=0.1"):
        load(tmp_path)
