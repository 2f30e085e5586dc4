"""What is said of a corpus of several domains, before and after a run and by evaluate."""

import sys

import jax
import pytest

from launch import evaluate, report, setup
from launch.flags import parse
from tests import tiny
from tests.training import mixed
from tests.training.mixed import DOMAINS, Mixed
from training import loop


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    built = mixed.setup(tiny.corpus(tmp_path_factory.mktemp("corpus")))
    with jax.set_mesh(built.mesh):
        yield built


@pytest.mark.parametrize(
    ("hears", "words"),
    [
        ("nothing", "(code 0.333, prose 0.333, tables 0.333 at row 0);"),
        ("train", " at row 0, which follow the losses);"),
        ("validation", " at row 0, which follow held-out losses);"),
    ],
)
def test_the_opening_names_domains_and_weights(built, tmp_path, hears, words):
    job = mixed.run(built, tmp_path, Mixed(built.data, hears))
    made = setup.Setup(built.config, built.mesh, job.data, built.program)
    assert words in report.opening(made, job.header, tmp_path)


def test_the_opening_of_one_domain_names_none(built, tmp_path):
    job = tiny.run(built, tmp_path)
    text = report.opening(built, job.header, tmp_path)
    assert f"tokens from {built.data.tokens('train'):,}; {tmp_path}" in text


def test_ngrams_are_not_counted_of_several_domains(built, tmp_path):
    job = mixed.run(built, tmp_path, Mixed(built.data), steps=1, ngrams=True)
    text = report.closing(job, loop.run(job), parse(["--config", "base", *tiny.flags(tmp_path)]))
    assert "of held-out files, without n-gram counts, which are of one domain of text:" in text
    assert not (tmp_path / "ngrams.json").exists()


def test_train_and_evaluate_end_with_a_line_a_domain(built, tmp_path, monkeypatch, capsys):
    job = mixed.run(built, tmp_path, Mixed(built.data), steps=1)
    outcome = loop.run(job)
    given = parse(["--config", "base", *tiny.flags(tmp_path)])
    lines = report.closing(job, outcome, given).splitlines()
    score = outcome.score
    expected = [
        f"  {name:<6} loss {score.domains[name]:.4f} over {score.weights[name]:,.0f} targets"
        for name in DOMAINS
    ]
    assert lines[1:4] == expected

    reopened = setup.Setup(built.config, built.mesh, job.data, built.program)
    monkeypatch.setattr(setup, "reopen", lambda *_, **__: (reopened, outcome.state.params, 1))
    monkeypatch.setattr(sys, "argv", ["evaluate", "--workdir", str(tmp_path)])
    evaluate.main()
    assert capsys.readouterr().out.splitlines()[-3:] == expected
