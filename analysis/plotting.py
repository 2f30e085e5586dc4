"""Pictures without a window, where matplotlib is installed."""


def pyplot(what: str):
    """matplotlib.pyplot, drawing into files. Raises ImportError, one sentence, where it is missing.

    what: was not drawn then.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            f"matplotlib is not installed, so {what} was not drawn; run `uv sync` for the packages "
            "of development and the same command again"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt
