"""What is said of Orbax's errors, and what is not dropped with them."""

import errno
import logging
import os
import warnings

import pytest

from training.quiet import LONGEST, cause, fix, orbax

WRAPPED = (
    "RESOURCE_EXHAUSTED: Error writing \"a/b\" [tensorstore_spec='{...}']\n"
    "source: [OS error 28: ENOSPC No space left on device]"
)


@pytest.mark.parametrize(
    ("error", "words", "helps"),
    [
        (OSError(28, "No space left on device", "/x"), "No space left on device", "make room"),
        (ValueError(WRAPPED), "No space left on device", "make room"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied", "choose a folder"),
        (OSError(errno.EXDEV, "Invalid cross-device link"), "Invalid cross-device link", ""),
        (KeyError("lost"), "KeyError: 'lost'", ""),
        (ValueError(""), "ValueError", ""),
        (ValueError("one\ntwo"), "ValueError: one", ""),
        (ValueError("x" * 999), f"ValueError: {'x' * LONGEST}...", ""),
    ],
)
def test_a_cause_and_its_fix(error, words, helps):
    assert cause(error) == words
    assert fix(words).startswith(f"; {helps}" if helps else "")
    assert bool(fix(words)) == bool(helps)


def test_errors_that_nobody_waited_for_are_dropped_if_they_are_orbaxs(caplog):
    ocp = orbax()
    logger = logging.getLogger("asyncio")
    for raises in (lambda: ocp.args.Composite(**{".": 1}).x, lambda: os.stat("/nowhere")):
        try:
            raises()
        except (AttributeError, KeyError, FileNotFoundError) as error:
            logger.error("Future exception was never retrieved", exc_info=error)
    logger.error("Task was destroyed but it is pending: running at x/orbax/checkpoint/y.py:3")
    (record,) = caplog.records
    assert record.exc_info[0] is FileNotFoundError


def test_coroutines_of_others_still_warn():
    orbaxs = ["JsonCheckpointHandler._save_fn", "cancellable", "_async_serialize_shardings"]
    orbaxs += ["_serialize_arrays_batches_without_dispatcher.<locals>.x", "async_serialize_from"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        orbax.__wrapped__()  # as at its first call
        for name in (*orbaxs, "mine", "sleep"):
            warnings.warn(f"coroutine '{name}' was never awaited", RuntimeWarning, stacklevel=1)
    told = [str(warning.message) for warning in caught]
    assert told == [f"coroutine '{name}' was never awaited" for name in ("mine", "sleep")]
