"""Train a model: `uv run train --config experiments/quickstart.py`. The same command resumes."""

import sys

from launch import flags, platform
from launch.schema import Key

ABOUT = """\
Trains the model of a configuration, from the latest checkpoint in --workdir (runs/NAME by default)
or from the start. SIGTERM and Ctrl-C save before they end the run; the same command goes on."""
FLAGS = {
    "accept_corpus": Key(
        bool, False, False, (), "go on although the corpus or the mixture changed; it is recorded"
    ),
    "accept_config": Key(
        *(bool, False, False, ()),
        "go on although keys changed that decide what is computed (optim.lr); it is recorded",
    ),
}


def main() -> None:
    parsed = flags.parse(prog="train", about=ABOUT, flags=FLAGS)
    platform.choose()
    # Only now may jax be imported: its platforms are chosen.
    from launch import report, setup
    from training import loop

    with setup.one_sentence("train"):
        folder = setup.workdir(parsed.flags, parsed.flags.config)
        built = setup.build(parsed.config)
        if parsed.flags.print_params:
            vocab = setup.vocabulary(built)
            print(setup.parameter_table(built.program.table, vocab), end="")
            return
        head = setup.header(built)
        print(report.opening(built, head, folder), file=sys.stderr)
        sample = report.sampler(built)
        job = loop.Run(
            config=parsed.config,
            program=built.program,
            data=built.data,
            mesh=built.mesh,
            workdir=folder,
            header=head,
            flops=head["flops_per_token"].get("visible"),
            sample=sample,
            accept_corpus=parsed.flags.accept_corpus,
            accept_config=parsed.flags.accept_config,
        )
        outcome = loop.run(job)
        print(report.closing(job, outcome, parsed))


if __name__ == "__main__":
    main()
