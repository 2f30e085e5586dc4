"""Whether a configuration's learning rate suits any width: `uv run coordcheck --config X`."""

import copy
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence

from launch import flags, platform
from launch.schema import Key, UsageError

ABOUT = """\
Trains the model for a few steps on one batch at several widths, and fits how the size of every
named activation, and its change, go with the width. Exits with 1 where one grows or dies. Learning
rates are those of model.base_d_model, or where that is none of the smallest width here; --standard
leaves them as they are. Sizes that the configuration gives by number (widths of feed-forward
networks, heads where head_dim is given) go with the width."""
OPTIONS = {
    "widths": Key(str, "64,128,256,512", False, (), "of the residual stream, by commas"),
    "steps": Key(int, 4, False, (), "optimizer steps at a constant learning rate"),
    "rows": Key(int, 8, False, (), "rows of the batch"),
    "tokens": Key(int, 64, False, (), "of each row"),
    "seeds": Key(int, 1, False, (), "starts that are averaged over"),
    # A wrong power of the width is off by 0.5 or 1; narrow models and one start scatter by 0.2.
    "limit": Key(float, 0.3, False, (), "largest slope that is neither growing nor dying"),
    "standard": Key(bool, False, False, (), "the same learning rate and start at every width"),
    "out": Key(str, None, True, (), "where to write NAME.json and NAME.png, given as NAME.json"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 1 where an activation is at fault, with 2 for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = flags.parse(argv, prog="coordcheck", about=ABOUT, flags=OPTIONS)
    try:
        configs = at_widths(given.config, _widths(given.flags), given.flags)
    except UsageError as error:
        print(f"coordcheck: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    platform.choose()
    # Only now may jax be imported: its platforms are chosen.
    from launch import setup

    with setup.one_sentence("coordcheck"):
        found = measure(configs, given.flags)
        fine = report(found, configs, given.flags, shlex.join(["uv", "run", "coordcheck", *argv]))
    raise SystemExit(0 if fine else 1)


def _widths(given) -> list[int]:
    for name in ("steps", "rows", "tokens", "seeds"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name} is {getattr(given, name)} and must be at least 1")
    if not given.limit >= 0:
        raise UsageError(f"--limit is {given.limit} and must be at least 0")
    try:
        widths = sorted({int(text) for text in given.widths.split(",")})
    except ValueError:
        raise UsageError(f"--widths takes numbers by commas, not {given.widths!r}") from None
    if len(widths) < 2 or widths[0] < 1:
        raise UsageError(f"--widths {given.widths} are not two or more different numbers above 0")
    return widths


def at_widths(config: dict, widths: Sequence[int], given) -> dict[int, dict]:
    """The configuration at each width, of one short batch. Raises UsageError."""
    from models.width import at_width

    base = config["model"].get("base_d_model")
    base = None if given.standard else widths[0] if base is None else base
    made = {}
    for width in widths:
        own = copy.deepcopy(config)
        try:
            own["model"] = at_width(own["model"], width)
        except ValueError as error:
            raise UsageError(str(error)) from None
        own["model"] |= {"base_d_model": base, "dtype": "float32"}
        own["data"] |= {"batch_size": given.rows, "length": given.tokens, "micro_batches": 1}
        own["steps"] = given.steps
        own["optim"] |= {"schedule": "constant", "warmup_tokens": 0, "schedules": {}}
        own["zero"] = "none"
        made[width] = own
    return made


def measure(configs: dict[int, dict], given) -> list:
    """An `analysis.coordinates.Coordinate` for every named activation of every layer."""
    import numpy as np

    import data.pipeline
    from analysis.coordinates import Coordinate
    from training.progress import bar

    first = next(iter(configs.values()))
    corpus = data.pipeline.build(seed=first["seed"], **first["data"])
    turns = [(config, seed) for config in configs.values() for seed in range(given.seeds)]
    runs = [_run(c | {"seed": c["seed"] + s}, corpus) for c, s in bar(turns, desc="coordcheck")]
    names, number = list(runs[0][0]), given.seeds
    by_width = lambda kind, name: np.stack(
        [np.mean([run[kind][name] for run in runs[i : i + number]], 0)
         for i in range(0, len(runs), number)]
    )  # fmt: skip
    return [Coordinate(name, by_width(0, name), by_width(1, name)) for name in names]


def _run(config: dict, corpus) -> tuple[dict, dict]:
    """({activation: sizes by step}, {activation: changes by step}) of one width and seed."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from models.context import of_batch
    from parallel import mesh as meshes
    from parallel.observed import observed
    from training.loss import log_likelihood
    from training.program import build, parameters

    mesh = meshes.make(jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(config, mesh, corpus.vocab_size)
        batch = jax.tree.map(jnp.asarray, corpus.batch(0))
        rows = jax.tree.map(lambda x: x[0], batch)
        forward = lambda params, rows: program.model(params)(
            rows.inputs, of_batch(rows, **program.context)
        )

        def see(params):
            (logits, _), found = observed(forward)(params, rows)
            nll = -rows.weights * log_likelihood(logits, rows.targets)[0]
            return _floats(found) | {"loss": jnp.sum(nll) / jnp.maximum(jnp.sum(rows.weights), 1)}

        watch = jax.jit(see)
        state, seen = program.init(), []
        for step in range(config["steps"] + 1):
            if step:
                state, _ = program.step(state, batch)
            seen.append(jax.device_get(watch(parameters(state, averaged=False))))
    size = lambda x: float(np.mean(np.abs(x)))
    sizes = {n: [size(at[n]) for at in seen] for n in seen[0]}
    return sizes, {n: [size(at[n] - seen[0][n]) for at in seen[1:]] for n in seen[0]}


def _floats(found: dict) -> dict:
    """{name and number: value} of what is no index; padded logits count as 0."""
    import jax.numpy as jnp

    kept = {}
    for name, values in found.items():
        for i, x in enumerate(values):
            if jnp.issubdtype(x.dtype, jnp.floating):
                label = name if len(values) == 1 else f"{name} {i}"
                kept[label] = jnp.where(jnp.isneginf(x), 0.0, x)
    return kept


def report(found: list, configs: dict[int, dict], given, command: str) -> bool:
    """Prints the table and writes the files; whether every activation is in order."""
    from analysis import coordinates
    from analysis.report import finite
    from launch import provenance

    widths = list(configs)
    slopes = [coordinates.judge(one, widths, given.limit) for one in found]
    print(coordinates.text(slopes))
    wrong = [f"{s.name} {s.fault}" for s in slopes if s.fault]
    base = next(iter(configs.values()))["model"]["base_d_model"]
    how = "standard parametrization" if base is None else f"muP from width {base}"
    verdict = f"{len(wrong)} of {len(slopes)} activations depend on the width"
    print(f"{how}: {verdict if wrong else 'no activation grows or dies with the width'}")
    if given.out is not None:
        out = pathlib.Path(given.out).with_suffix(".json")
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"command": command, "widths": widths, "parametrization": how}
        facts |= {"commit": provenance.commit(), "versions": provenance.versions()}
        held = facts | {"activations": coordinates.record(found, slopes)}
        out.write_text(json.dumps(finite(held), allow_nan=False) + "\n", encoding="utf-8")
        optim = next(iter(configs.values()))["optim"]
        title = f"{how}, {optim['name']}, lr {optim['lr']:g}"
        coordinates.draw(found, slopes, widths, title, out.with_suffix(".png"))
        print(f"report: {out}")
    return not wrong


if __name__ == "__main__":
    main()
