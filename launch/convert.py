"""Softmax attention to Hedgehog: `uv run convert --workdir runs/teacher --out runs/student`.

The same command goes on where it stopped.
"""

import shlex
import sys
from collections.abc import Sequence

from launch import flags, platform
from launch.conversion import FLAGS as OWN
from launch.conversion import refuse_decided
from launch.schema import Key, UsageError
from launch.usage import plain_usage

ABOUT = """\
Makes a trained model's attention linear by two ordinary runs, each with a configuration in --out:
`transfer` begins with the parameters of --workdir and teaches the feature maps of Hedgehog to weigh
as attention does, `tuned` begins with what that leaves and learns the next token again. --out gets
the held-out losses before and after (conversion.json) and pictures of weights; TensorBoard shows
what each layer has learned. --config.KEY=VALUE sets a key of both runs, such as data.batch_size.
The same command goes on where it stopped, and skips what is finished."""
FLAGS = {
    "workdir": Key(str, None, True, (), "folder of the teacher's run"),
    "out": Key(str, None, True, (), "folder of the two runs and of what came of them"),
    **OWN,
    "print": Key(
        *(bool, False, False, ()),
        "write both configurations, print their commands (as for several hosts), and stop",
    ),
    **flags.OPENING,
    "help": flags.COMMON["help"],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 2 and one sentence for what the user can mend, with 1 for a run that diverged."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(argv):
        print(plain_usage("convert", ABOUT, FLAGS), end="")
        return
    # Overrides are taken where a configuration could be given.
    known = FLAGS | {"config": Key(str, None, True)}
    parsed = flags.parse(argv, prog="convert", flags=known, needs_config=False)
    try:
        _check(parsed)
    except UsageError as error:
        print(f"convert: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    platform.choose()
    # Only now may jax be imported: its platforms are chosen.
    from launch import converting, setup

    again = shlex.join(["uv", "run", "convert", *argv])
    with setup.one_sentence("convert"):
        print(converting.convert(vars(parsed.flags), parsed.overrides, again), flush=True)


def _check(parsed: flags.Parsed) -> None:
    given = parsed.flags
    if given.config is not None:
        raise UsageError(
            "--config is the teacher's own; give --workdir FOLDER of its run, and change keys by "
            "--config.KEY=VALUE"
        )
    for name, meaning in (("workdir", "of the teacher's run"), ("out", "of the student's runs")):
        if not getattr(given, name):
            raise UsageError(f"give --{name} FOLDER, the folder {meaning}")
    refuse_decided(parsed.overrides)


if __name__ == "__main__":
    main()
