"""Train a model: `uv run train --config experiments/quickstart.py`. The same command resumes."""

import functools
import pathlib
import sys

from launch import cluster, flags, platform
from launch.schema import Key

ABOUT = (
    """\
Trains the model of a configuration, from the latest checkpoint in --workdir (runs/NAME by default)
or from the start. SIGTERM and Ctrl-C save before they end the run; the same command goes on.

"""
    + cluster.ABOUT
)
FLAGS = {
    "accept_corpus": Key(
        bool, False, False, (), "go on although the corpus or the mixture changed; it is recorded"
    ),
    "accept_config": Key(
        *(bool, False, False, ()),
        "go on although keys changed that decide what is computed (optim.lr); it is recorded",
    ),
    **flags.OPENING,
    "explain": Key(
        bool, False, False, (), "print how every array lies on the devices of config.mesh, and stop"
    ),
}


def main() -> None:
    parsed = flags.parse(prog="train", about=ABOUT, flags=FLAGS | cluster.FLAGS)
    platform.choose()
    # Only now may jax be imported: its platforms are chosen.
    from launch import setup, together

    with setup.one_sentence("train"):
        if parsed.flags.explain:
            from launch import explain

            explain.explain(parsed.config)
            return
        folder = setup.workdir(parsed.flags, parsed.flags.config)
        place = cluster.find(parsed.flags)
        own = {f"--{name}": getattr(parsed.flags, name) for name in FLAGS}
        with together.joined(place, parsed.config, own, folder) as hosts:
            hosts.at("reading its corpus")
            connect = place and functools.partial(together.connect, hosts, place)
            _train(parsed, folder, setup.build(parsed.config, connect=connect), hosts)


def _train(parsed: flags.Parsed, folder: pathlib.Path, built, hosts) -> None:
    from launch import report, setup
    from training import loop

    if parsed.flags.print_params:
        vocab = setup.vocabulary(built)
        if hosts.leader:
            print(setup.parameter_table(built.program.table, vocab), end="")
        return
    head = setup.header(built)
    if hosts.leader:
        print(report.opening(built, head, folder), file=sys.stderr)
    names = ("accept_corpus", "accept_config", "trust")
    own = {name: getattr(parsed.flags, name) for name in names}
    job = prepare(built, folder, head, hosts=hosts, **own)
    outcome = loop.run(job)
    hosts.at("ending")
    text = report.closing(job, outcome, parsed)
    if hosts.leader:
        print(text, flush=True)


def prepare(built, folder: pathlib.Path, head: dict, **own):
    """The run, to be given to training.loop.run.

    built: by `launch.setup.build`.  head: its header.  own: other fields of training.run.Run.
    """
    from launch import pictures, report
    from training.run import Run

    return Run(
        config=built.config,
        program=built.program,
        data=built.data,
        mesh=built.mesh,
        workdir=folder,
        header=head,
        flops=head["flops_per_token"].get("visible"),
        sample=report.sampler(built),
        draw=pictures.drawer(built),
        **own,
    )


if __name__ == "__main__":
    main()
