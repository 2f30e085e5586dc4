"""Orbax without what it prints.

Left alone it logs its progress once absl's verbosity is INFO. When a save fails (a full disk), it
logs the error from several threads, and the writes that were under way or still to come complain
to an event loop that is gone: hundreds of lines of tracebacks. All of it is dropped, because the
error itself is raised, once, by the next call to the manager.
"""

import functools
import logging
import sys
import warnings

AFTERMATH = ("Event loop is closed", "async_serialize_from_host", "OCDBT database")


@functools.cache
def orbax():
    """The module orbax.checkpoint, imported when first used: it takes up to a second."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(lambda record: not _is_aftermath(record.getMessage()))
    warnings.filterwarnings("ignore", ".*async_serialize_from_host.*never awaited")
    report = sys.unraisablehook
    sys.unraisablehook = lambda args: None if _is_aftermath(args.exc_value) else report(args)
    return ocp


def _is_news(record: logging.LogRecord) -> bool:
    repeated = record.levelno < logging.WARNING or record.exc_info
    return not (repeated and "orbax" in record.pathname)


def _is_aftermath(what: object) -> bool:
    return any(text in str(what) for text in AFTERMATH)
