"""Who hangs is named in time, and nobody who does not."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.liveness import BEHIND, PHASES, SILENT, Beat, Limits, Pulse

MINUTE = 60.0


def run(pulse, seconds, beats, start=0.0):
    """Judges every second; beats(now) -> {process: Beat or None for silence}. (when, verdict)."""
    for second in range(int(seconds)):
        now = start + second
        for process, beat in beats(now).items():
            if beat is not None:
                pulse.heard(process, beat, now)
        if verdict := pulse.stalled(now):
            return now, verdict
    return None


def at(mark, phase="running a step", step=0):
    return Beat(int(mark), phase, step)


def test_a_silent_process_is_named_within_a_minute():
    pulse = Pulse(range(3), 0.0, Limits())
    beats = lambda now: {0: at(now), 1: at(now) if now < 100 else None, 2: at(now)}
    when, (process, how) = run(pulse, 300, beats)
    assert (process, how) == (1, "has given no sign of life for 26 seconds")
    assert SILENT < when - 99 < MINUTE


def test_one_that_is_behind_is_named_within_a_minute_with_its_phase():
    pulse = Pulse(range(3), 0.0, Limits())
    beats = lambda now: {p: at(min(now, 50 if p == 1 else 51)) for p in range(3)}
    when, (process, how) = run(pulse, 300, beats)
    assert (process, how) == (1, "has kept the others waiting for 46 seconds while running a step")
    assert BEHIND < when - 51 < MINUTE


def test_one_that_is_always_a_little_behind_is_not_named():
    assert (
        run(Pulse(range(2), 0.0, Limits()), 300, lambda now: {0: at(now + 1), 1: at(now)}) is None
    )


def test_all_equally_far_is_a_long_step():
    assert run(Pulse(range(2), 0.0, Limits()), 1000, lambda now: {0: at(7), 1: at(7)}) is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4))
def test_processes_that_are_late_but_come_are_never_named(lags):
    """Each passes a point a minute, up to half a minute after the others."""
    beats = lambda now: {p: at((now - lag) // 60) for p, lag in enumerate(lags)}
    assert run(Pulse(range(len(lags)), 0.0, Limits()), 300, beats) is None


@pytest.mark.parametrize("phase", PHASES)
def test_a_long_phase_has_its_own_limit(phase):
    pulse, limit = Pulse(range(2), 0.0, Limits()), PHASES[phase]
    found = run(pulse, 2000, lambda now: {0: at(5), 1: at(4, phase)})
    if limit == math.inf:
        assert found is None
    else:
        when, (process, how) = found
        assert process == 1
        assert how.endswith(f"while {phase}")
        assert limit < when <= limit + 2


def test_a_limit_that_is_raised_holds_in_every_phase():
    pulse = Pulse(range(2), 0.0, Limits.of({"MESHWORK_STALL_SECONDS": "1900"}))
    assert run(pulse, 1800, lambda now: {0: at(5), 1: at(4, "saving")}) is None


def test_the_one_that_is_furthest_behind_is_named():
    pulse = Pulse(range(3), 0.0, Limits())
    _, (process, _) = run(pulse, 100, lambda now: {0: at(9), 1: at(8), 2: at(7)})
    assert process == 2


def test_what_has_ended_is_not_missed_but_others_are_behind_it():
    pulse = Pulse(range(2), 0.0, Limits())
    pulse.heard(0, at(100, "ending"), 0.0)
    pulse.ended(0)
    assert run(pulse, 40, lambda now: {1: at(99)}) is None
    _, (process, _) = run(pulse, 40, lambda now: {1: at(99)}, start=40.0)
    assert process == 1


def test_a_pause_of_the_judge_is_nobody_elses():
    """Its machine slept: signs of life that it could not read are not missing."""
    pulse = Pulse(range(2), 0.0, Limits())
    assert run(pulse, 10, lambda now: {0: at(now), 1: at(now)}) is None
    assert pulse.stalled(500.0) is None
    assert run(pulse, 10, lambda now: {0: at(now), 1: at(now)}, start=501.0) is None
    assert run(pulse, 60, lambda now: {0: at(now), 1: None}, start=511.0)[1][0] == 1


def test_limits_can_be_overruled():
    assert Limits.of({}) == Limits(SILENT, BEHIND)
    assert Limits.of({"MESHWORK_STALL_SECONDS": "4"}) == Limits(4.0, 4.0)
    for text in ("", "soon", "0", "-3", "nan"):
        with pytest.raises(ValueError, match=f"MESHWORK_STALL_SECONDS is '{text}'; give a number"):
            Limits.of({"MESHWORK_STALL_SECONDS": text})


def test_the_furthest_step():
    pulse = Pulse(range(2), 0.0, Limits())
    assert pulse.furthest() == 0
    pulse.heard(1, at(3, step=8), 1.0)
    pulse.heard(1, None, 2.0)
    assert pulse.furthest() == 8
    assert pulse.beat(1) == at(3, step=8)
