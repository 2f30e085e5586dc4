"""What balance over the global batch costs: steps a second of each method beside `micro_batch`.

One model, one batch and one set of parameters; only how experts are balanced differs, for one
micro-batch a step and for several. Steps are taken in turns, the state donated. The paper (arXiv
2501.11873, section 4.5) gives 1.64 s beside 1.55 s a step of 43B parameters, a ratio of 0.945, for
its buffer; exact balance over several micro-batches needs a second forward pass here.
"""

import contextlib
from collections.abc import Mapping

import jax

from launch.bench import measure
from launch.bench.measure import Report, Row
from launch.bench.pair import Way
from launch.schema import UsageError

PEER = "micro_batch"


def bench(
    *,
    config: str = "experiments/moe_balance.py",  # a configuration in which a layer routes
    methods: str = "global_batch,buffer,aux_free",  # files of training/balances, by commas
    micro_batches: str = "1,4",  # micro-batches a step, by commas
    seconds: float = 1.0,  # of steps in a sample
    repetitions: int = 10,  # samples of each method
) -> Report:
    """A row a method and number of micro-batches. Raises UsageError."""
    from launch.config import resolve

    names = [PEER, *filter(None, methods.split(","))]
    try:
        splits = [int(text) for text in micro_batches.split(",")]
    except ValueError:
        raise UsageError(f"--micro_batches takes numbers, not {micro_batches!r}") from None
    rows, progress = [], measure.Progress("moe")
    with contextlib.closing(progress):
        for A in splits:
            own = {"data.micro_batches": str(A)}
            found = {n: resolve(config, own | {"balance.name": n}) for n in names}
            what = "one micro-batch" if A == 1 else f"{A} micro-batches"
            ways = _ways(found, progress.within(what))
            rows += _rows(ways, what, seconds, repetitions, progress.within(what))
    sizes = "{batch_size} x {length} tokens a step".format_map(found[PEER]["data"])
    kind = jax.devices()[0].device_kind
    title = f"{config}, {sizes}, {jax.device_count()} x {kind}, jax {jax.__version__}"
    return Report(title, rows, [f"the peer is {PEER} with its own defaults"], found[PEER])


def _ways(configs: Mapping[str, Mapping], progress) -> dict[str, Way]:
    """Each method's step on the same rows and parameters."""
    import data.pipeline
    from parallel import mesh as meshes
    from training import balance
    from training.program import build

    first = next(iter(configs.values()))
    mesh = meshes.make(**first["mesh"])
    corpus = data.pipeline.build(seed=first["seed"], **first["data"])
    ways = {}
    for name, config in configs.items():
        progress(f"building {name}")
        try:
            program = build(config, mesh, corpus.vocab_size)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if not balance.routed(program.table):
            raise UsageError(f"no layer of {name} routes; set model.ffn=moe")
        with jax.set_mesh(mesh):
            homes = jax.tree.map(lambda like: like.sharding, program.batch)
            batch = jax.device_put(corpus.batch(0), homes)
            ways[name] = Way(program.step, program.init(), [batch], mesh)
    return ways


def _rows(ways: Mapping[str, Way], what, seconds, repetitions, progress) -> list[Row]:
    once = 0.0
    for way in ways.values():
        with way.scope():
            way.take()
            once = max(once, measure.seconds(way.take))
    count = measure.count_for(seconds, once)

    def sample(way: Way) -> float:
        with way.scope():
            return count / measure.seconds(lambda: way.take_many(count))

    timed = {name: lambda way=way: sample(way) for name, way in ways.items()}
    found = measure.interleaved(timed, repetitions, progress)
    return [
        Row(f"{name}, {what}", "steps/s", samples, found[PEER])
        for name, samples in found.items()
        if name != PEER
    ]
