"""Orbax without what it prints.

Left alone it logs its progress once absl's verbosity is INFO. When a save fails (a full disk), it
logs the error from several threads, and the writes that were under way or still to come complain
to an event loop that is gone: hundreds of lines of tracebacks. Reads that fail do the same. All of
it is dropped, because the error itself is raised, once, by the next call, and `cause` says it in
words.
"""

import errno
import functools
import logging
import os
import sys
import traceback
import warnings

import jax

AFTERMATH = (
    *("Event loop is closed", "async_serialize_from_host", "OCDBT database"),
    "Encountered error while reading array index",
)
UNAWAITED = r"(\w*CheckpointHandler\.|cancellable|_?(async_)?serialize)"
LONGEST = 200  # letters of a message that nothing is known about
_ROOM = "make room there, then run the same command again"
_WRITABLE = "choose a folder that can be written"
# Errors of the system that Orbax wraps into pages of text, and what helps.
FIXES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENOTDIR: "a part of that path is a file; choose another folder",
    errno.EIO: "look after the disk",
}


@functools.cache
def orbax():
    """The module orbax.checkpoint, imported when first used: it takes up to a second."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(lambda record: not _is_of_orbax(record))
    warnings.filterwarnings("ignore", f"coroutine '{UNAWAITED}.*' was never awaited")
    report = sys.unraisablehook
    sys.unraisablehook = lambda args: None if _is_aftermath(args.exc_value) else report(args)
    return ocp


def together() -> dict:
    """How a checkpointer makes several processes wait: without collectives of the devices."""
    everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = orbax().options.MultiprocessingOptions(
        active_processes=everyone, barrier_sync_key_prefix="meshwork"
    )
    return {"multiprocessing_options": options}


def cause(error: BaseException) -> str:
    """Why something failed, in a few words: the system's, if they are anywhere in the message."""
    text = str(error)
    for number in FIXES:
        if os.strerror(number) in text:
            return os.strerror(number)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = next(iter(text.strip().splitlines()), "")
    first = first[:LONGEST] + "..." * (len(first) > LONGEST)
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def fix(words: str) -> str:
    """What helps against a cause, with a semicolon before it; nothing where that is not known."""
    known = (phrase for number, phrase in FIXES.items() if os.strerror(number) in words)
    return "".join(f"; {phrase}" for phrase in list(known)[:1])


def _is_news(record: logging.LogRecord) -> bool:
    repeated = record.levelno < logging.WARNING or record.exc_info
    return not (repeated and "orbax" in record.pathname)


def _is_of_orbax(record: logging.LogRecord) -> bool:
    """Whether an error that nobody has waited for was raised in Orbax."""
    message = record.getMessage()
    frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    files = (frame.f_code.co_filename for frame, _ in frames)
    return _is_aftermath(message) or any("/orbax/" in place for place in (message, *files))


def _is_aftermath(what: object) -> bool:
    return any(text in str(what) for text in AFTERMATH)
