"""A run goes on with another corpus only where that is accepted, and then says so for good."""

import dataclasses

import jax
import pytest

from tests import tiny
from tests.training import mixed
from tests.training.mixed import Mixed
from training import loop, metrics
from training.checkpoint import CheckpointError, Checkpoints

ROWS = 4


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    built = mixed.setup(tiny.corpus(tmp_path_factory.mktemp("corpus")))
    with jax.set_mesh(built.mesh):
        yield built


def job(built, workdir, steps, *, corpus="first", accept=False, data=None, **changes):
    """A run of so many steps on a corpus of that fingerprint; changes: of config['data']."""
    data = Mixed(built.data) if data is None else data
    made = mixed.run(built, workdir, data, steps=steps)
    config = made.header["config"] | {"data": made.header["config"]["data"] | changes}
    header = dict(made.header) | {"config": config, "fingerprint": corpus}
    return dataclasses.replace(made, header=header, accept_corpus=accept)


def refused(job):
    with pytest.raises(CheckpointError) as caught:
        loop.run(job)
    text = str(caught.value)
    assert "\n" not in text
    return text


def corpora(workdir):
    """As the last checkpoint has them, which must be what the log's last header says."""
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.meta()["header"]["corpora"]
    rows = metrics._lines(workdir / "metrics.jsonl")
    assert [row for row in rows if "header" in row][-1]["header"]["corpora"] == found
    return found


FIRST = {"from_row": 0, "fingerprint": "first"}


def test_another_corpus_is_accepted_and_recorded_for_good(built, tmp_path, capsys):
    loop.run(job(built, tmp_path, 1))
    assert corpora(tmp_path) == [FIRST]
    text = refused(job(built, tmp_path, 2, corpus="second"))
    assert "its fingerprint is second and was first" in text
    assert text.endswith("or go on with --accept_corpus")
    loop.run(job(built, tmp_path, 2, corpus="second", accept=True))
    second = {"from_row": ROWS, "fingerprint": "second", "changed": {}}
    assert corpora(tmp_path) == [FIRST, second]
    assert "note: from row 4 on the corpus is second" in capsys.readouterr().err
    loop.run(job(built, tmp_path, 3, corpus="second"))  # needs no flag any more
    assert corpora(tmp_path) == [FIRST, second]
    assert "was second" in refused(job(built, tmp_path, 4))
    loop.run(job(built, tmp_path, 4, accept=True))
    third = {"from_row": 3 * ROWS, "fingerprint": "first", "changed": {}}
    assert corpora(tmp_path) == [FIRST, second, third]


def test_a_flag_without_a_change_records_nothing(built, tmp_path, capsys):
    loop.run(job(built, tmp_path, 1, accept=True))
    loop.run(job(built, tmp_path, 2, accept=True, prefetch=7))
    assert corpora(tmp_path) == [FIRST]
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert notes == [
        "note: going on from step 1 with other keys (steps 1 -> 2, data.prefetch 0 -> 7)"
    ]


def test_keys_that_choose_rows_are_accepted_with_both_values(built, tmp_path):
    loop.run(job(built, tmp_path, 1))
    changes = dict(packing="other", transforms=["masked_lm"], source="hf", prefetch=7)
    text = refused(job(built, tmp_path, 2, **changes))
    assert "data.packing 'pack' -> 'other'" in text
    assert text.endswith("or go on with --accept_corpus")
    loop.run(job(built, tmp_path, 2, accept=True, **changes))
    entry = corpora(tmp_path)[1]
    assert (entry["from_row"], entry["fingerprint"]) == (ROWS, "first")
    assert entry["changed"] == {
        "data.packing": ["pack", "other"],
        "data.transforms": [[], ["masked_lm"]],
        "data.source": ["stdlib", "hf"],
    }


@pytest.mark.parametrize(
    "changes", [dict(length=64), dict(tokenizer="hf"), dict(tokenizers={"hf": {"path": "x"}})]
)
def test_what_a_row_is_to_the_model_is_never_accepted(built, tmp_path, changes):
    loop.run(job(built, tmp_path, 1))
    for given in (changes, changes | {"packing": "other"}):
        text = refused(job(built, tmp_path, 2, accept=True, **given))
        assert f"data.{next(iter(changes))}" in text
        assert text.endswith("; undo that or choose another --workdir")


def test_another_tokenizer_of_the_same_name_is_never_accepted(built, tmp_path):
    loop.run(job(built, tmp_path, 1))
    other = job(built, tmp_path, 2, corpus="second", accept=True)
    text = refused(dataclasses.replace(other, header=other.header | {"tokenizer": "other"}))
    assert "the tokenizer is not the one" in text
    assert "its fingerprint is other and was bytes" in text


def domain(**own):
    return {"domains": {"code": {"source": "text", "weight": 1.0, "path": "a"} | own}}


def test_a_domains_own_arguments_are_free_and_the_mixtures_are_not(built, tmp_path):
    loop.run(job(built, tmp_path, 1, **domain()))
    loop.run(job(built, tmp_path, 2, **domain(path="b")))
    assert corpora(tmp_path) == [FIRST]
    for key, value in dict(source="hf", weight=2.0, schedule="0:1", epochs=1.0).items():
        text = refused(job(built, tmp_path, 3, **domain(path="b", **{key: value})))
        assert f"(data.domains.code.{key} " in text
        assert text.endswith("or go on with --accept_corpus")
    loop.run(job(built, tmp_path, 3, accept=True, **domain(path="c", weight=2.0)))
    assert corpora(tmp_path)[1]["changed"] == {
        "data.domains.code.weight": [1.0, 2.0],
        "data.domains.code.path": ["b", "c"],
    }


def test_weights_go_on_where_the_domains_are_the_same(built, tmp_path, capsys):
    loop.run(job(built, tmp_path, 2))
    data = Mixed(built.data)
    loop.run(job(built, tmp_path, 3, corpus="second", accept=True, data=data))
    assert data.weights(ROWS * 4) != data.weights(0)
    assert "begin anew" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        (domain(weight=2.0), True),
        (domain(schedule="0:1"), True),
        (domain(epochs=2.0), True),
        (domain() | {"mixing": "other"}, True),
        (domain() | {"mixture": ["prose", "code", "tables"]}, True),
        (domain() | {"mixings": {"online": {"delay": 9}}}, True),
        (domain(source="hf"), False),
    ],
)
def test_weights_of_another_mixture_are_dropped_with_a_note(built, tmp_path, capsys, changes, anew):
    """Or what was accepted would have no effect."""
    loop.run(job(built, tmp_path, 2, **domain()))
    data = Mixed(built.data)
    loop.run(job(built, tmp_path, 3, accept=True, data=data, **changes))
    assert (set(data.weights(4 * ROWS).values()) == {1 / 3}) == anew
    note = "note: the mixture's weights begin anew, because the mixture is another one (data."
    assert (note in capsys.readouterr().err) == anew


def test_weights_of_other_domains_are_dropped_with_a_note(built, tmp_path, capsys):
    loop.run(job(built, tmp_path, 2))
    fresh = lambda: Mixed(built.data, domains=("x", "y", "z"))
    with pytest.raises(ValueError, match="the saved weights are of code, prose, tables"):
        loop.run(job(built, tmp_path, 3, data=fresh()))
    data = fresh()
    loop.run(job(built, tmp_path, 3, corpus="second", accept=True, data=data))
    note = "note: the mixture's weights begin anew, because the saved weights are of code, prose"
    assert note in capsys.readouterr().err
    assert [row for row, _, _ in data.log] == [3 * ROWS]
    assert set(data.weights(3 * ROWS).values()) == {1 / 3}


@pytest.mark.parametrize(
    ("limit", "steps", "possible"), [(4 * ROWS - 1, 4, 3), (ROWS - 1, 1, 0), (7, 6, 1)]
)
def test_a_corpus_that_ends_too_early_is_told_at_the_start(built, tmp_path, limit, steps, possible):
    with pytest.raises(ValueError, match=f"nothing left after row {limit}, ") as caught:
        loop.run(job(built, tmp_path, steps, data=Mixed(built.data, limit=limit)))
    text = str(caught.value)
    assert f"steps={steps} would read {steps * ROWS} rows from row 0 on" in text
    assert f"set steps to at most {possible}, or raise data.domains.*.epochs" in text


def test_a_corpus_that_ends_is_read_to_its_end_and_no_further(built, tmp_path):
    """Two steps from the start, and one more after them, counted from where the run is."""
    loop.run(job(built, tmp_path, 2, data=Mixed(built.data, limit=2 * ROWS)))
    loop.run(job(built, tmp_path, 2, data=Mixed(built.data, limit=2 * ROWS)))
    limited = lambda steps: job(built, tmp_path, steps, data=Mixed(built.data, limit=3 * ROWS))
    with pytest.raises(ValueError, match="would read 8 rows from row 8 on; set steps to at most 3"):
        loop.run(limited(4))
    assert loop.run(limited(3)).step == 3
    assert not loop.run(job(built, tmp_path, 3, data=Mixed(built.data, limit=1))).stepped
