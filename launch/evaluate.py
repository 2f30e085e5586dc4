"""Score a checkpoint on the held-out split: `uv run evaluate --workdir runs/quickstart`."""

from launch import flags, platform
from launch.schema import Key

ABOUT = "Scores the latest checkpoint in --workdir on the files held out of its training."
FLAGS = {
    "rows": Key(int, None, True, (), "held-out rows to read; none is all"),
    "batch": Key(int, None, True, (), "rows at a time; none is as in training"),
    **flags.OPENING,
}


def main() -> None:
    parsed = flags.parse(prog="evaluate", about=ABOUT, flags=FLAGS, needs_config=False)
    platform.choose()
    from launch import report, setup
    from training.evaluate import held_out
    from training.progress import bar

    with setup.one_sentence("evaluate"):
        built, params, step = setup.reopen(parsed.flags.workdir, trust=parsed.flags.trust)
        rows = parsed.flags.batch
        rows = built.program.batch.inputs.shape[1] if rows is None else rows
        progress = lambda batches: bar(batches, desc="held-out", unit="batch")
        limit = parsed.flags.rows
        score = held_out(
            built.program, params, built.data, built.mesh, rows=rows, limit=limit, progress=progress
        )
    print(f"step           {step}")
    print(f"targets        {score.targets:,.0f}")
    for name, value in score.summary().items():
        print(f"{name.replace('_', ' '):<14} {value:.4f}")
    for line in report.by_domain(score):
        print(line)


if __name__ == "__main__":
    main()
