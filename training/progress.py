"""Progress bars: a terminal is redrawn often, a log file gets a line now and then."""

import sys

from tqdm import tqdm


def bar(iterable=None, **options) -> tqdm:
    """A tqdm bar on stderr with the options of tqdm."""
    seconds = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(iterable, dynamic_ncols=True, mininterval=seconds, **options)
