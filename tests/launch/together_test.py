"""How a process among several meets and ends; processes_test.py has real ones."""

import contextlib

import jax
import pytest

from launch import together
from launch.rollcall import Place
from training.hosts import Alone, TogetherError


class Others:
    """Stands for the processes of a run. prints: whether this one shall print its sentence."""

    def __init__(self, prints=True):
        self.prints, self.told, self.finished = prints, [], False

    def part(self, status, sentence):
        self.told.append((status, sentence))
        return self.prints

    def finish(self):
        self.finished = True


@pytest.fixture
def join(monkeypatch, tmp_path, capfd):
    """join(others, act): (exit status or None, stderr, seconds waited) of a joined block."""
    waited = []
    monkeypatch.setattr(together.time, "sleep", waited.append)
    monkeypatch.setattr(together, "end", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    monkeypatch.setattr(together, "_after", lambda seconds, status: None)

    def run(others, act):
        monkeypatch.setattr(together.rollcall, "call", lambda *args, **options: others)
        status = None
        try:
            with together.joined(Place("here", 1, 2, 1), {}, {}, tmp_path) as hosts:
                act(hosts)
        except SystemExit as stop:
            status = stop.code
        return status, capfd.readouterr().err, sum(waited)

    return run


def fail(error):
    def act(hosts):
        raise error

    return act


def test_one_process_is_alone(tmp_path):
    with together.joined(None, {}, {}, tmp_path) as hosts:
        assert isinstance(hosts, Alone)


def test_a_run_that_ends_well_waits_for_the_others(join):
    others = Others()
    assert join(others, lambda hosts: None) == (None, "", 0)
    assert others.finished
    assert others.told == []


@pytest.mark.parametrize("prints", [True, False])
def test_what_the_user_can_mend_is_told_in_a_sentence(join, prints):
    others = Others(prints)
    status, err, waited = join(others, fail(ValueError("the rows are too few")))
    assert others.told == [(2, "the rows are too few")]
    assert (status, err) == (2, "train: the rows are too few\n" if prints else "")
    assert 0 < waited < 5
    assert not others.finished


def test_a_defect_has_a_traceback_here_and_a_line_elsewhere(join):
    others = Others()
    status, err, _ = join(others, fail(KeyError("x")))
    assert others.told == [(1, "KeyError: 'x'")]
    assert status == 1
    assert err.startswith("Traceback")
    assert err.endswith("\nKeyError: 'x'\n")


def test_an_interruption_is_told_and_not_printed(join):
    others = Others()
    assert join(others, fail(KeyboardInterrupt()))[:2] == (130, "")
    assert others.told == [(130, "it was interrupted")]


@pytest.mark.parametrize(
    ("text", "least"), [("UNKNOWN: Gloo all-reduce failed", 30), ("RESOURCE_EXHAUSTED: 1", 0)]
)
def test_an_error_of_jax_leaves_time_to_find_who_is_lost(join, text, least):
    """Unless it is about this process's own devices."""
    _, _, waited = join(Others(), fail(jax.errors.JaxRuntimeError(text)))
    assert least < waited < least + 30


def test_what_all_raise_together_is_told_to_nobody(join):
    others = Others()
    with pytest.raises(TogetherError, match=r"^they differ$"):
        join(others, fail(TogetherError("they differ")))
    assert others.told == []


def test_sources_are_those_that_take_part(tmp_path):
    for name in ("models/lm.py", "models/mixers/a.py", "tests/x.py", "analysis/y.py", "data/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = together.sources(tmp_path)
    assert set(before) == {"models/lm.py", "models/mixers/a.py"}
    (tmp_path / "models/lm.py").write_text("other")
    after = together.sources(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"models/lm.py"}
    assert {"launch/train.py", "training/loop.py"} <= set(together.facts({})["sources"])


@pytest.mark.parametrize(
    ("host", "index", "local", "bind"),
    [
        ("127.0.0.1", 0, "127.0.0.1:80", "127.0.0.1:80"),
        ("localhost", 0, "127.0.0.1:80", "127.0.0.1:80"),
        ("::1", 0, "[::1]:80", "[::1]:80"),
        ("node7", 0, "127.0.0.1:80", "[::]:80"),
        ("node7", 1, "a tunnel", "[::]:80"),
        ("127.0.0.1", 1, "a tunnel", "127.0.0.1:80"),
    ],
)
def test_where_jax_finds_its_service(monkeypatch, host, index, local, bind):
    monkeypatch.setattr(together.tunnel, "start", lambda *to: "a tunnel")
    assert together._addresses(Place(host, 80, 2, index)) == (local, bind)


def test_a_bad_limit_is_told_before_anybody_is_called(monkeypatch, tmp_path):
    monkeypatch.setenv("MESHWORK_STALL_SECONDS", "soon")
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(ValueError, match="MESHWORK_STALL_SECONDS is 'soon'"),
    ):
        stack.enter_context(together.joined(Place("here", 1, 2, 1), {}, {}, tmp_path))
