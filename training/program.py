"""A run's computation, built from its config: what train executes and plan lowers."""

import dataclasses
import difflib
import importlib
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

import data.batch
from data.batch import Batch
from models.context import of_batch
from models.lm import LM
from models.param import flatten, restore, table
from models.width import at_width
from optim import build as optimizer
from parallel import zero
from parallel.rules import RULES, layout, partition, ways
from parallel.weight import Table, widened
from training import adapter as adapters
from training import balance, step
from training.loss import by_domain, log_likelihood, right
from training.state import TrainState, pair

# Keys of config.model that are not the model's: the tokenizer's, and what Context carries.
NOT_OF_LM = ("vocab", "causal", "dtype", "taps")


@dataclasses.dataclass(frozen=True)
class Program:
    """init() -> state and step(state, batch) -> (state, metrics), both jitted; step donates state.

    init(source, take): with the parameters take(source, drawn), traced, for those that are drawn.
    state, batch: what they take, abstract, with shardings.
    table: of the parameters, those of the adapter last.  adapter: what they add to the model's own.
    evaluate(params, batch `[b L]`): sums of `nll` (nats), `weight`, `right`, and by domain, jitted.
    model(params): the module, for decoding, of parameters that may be abstract.
    context: static fields of its Context.
    lr(tokens, batch_tokens): the learning rate.  tokens: of the whole run, B L steps.
    """

    init: Callable[..., TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict]]
    state: TrainState
    batch: Batch
    evaluate: Callable[[dict, Batch], dict]
    model: Callable[[dict], LM]
    table: Table
    adapter: adapters.Adapter
    context: Mapping
    lr: Callable
    tokens: int


def build(
    config: Mapping, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, vocab: int
) -> Program:
    """The program of a resolved config on a mesh (concrete, or abstract for a target elsewhere).

    vocab: the tokenizer's size, used where `model.vocab` is None.

    Raises:
      ValueError: sizes or names that do not fit, in one sentence.
    """
    bare, construct, own, adapter = _declared(config, vocab)
    model = lambda params: bare(adapter.bind(params))
    weights = own | adapter.table
    _check_declared(weights)
    _check_used(weights, mesh)
    _check_divides(weights, mesh)
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        context = {name: config["model"][name] for name in ("dtype", "causal")}
        context["taps"] = tuple(config["model"].get("taps", ()))
        chosen = _chosen(config["trainable"], own, adapter.table)
        sizes = config["data"]
        context["domains"] = max(1, len(sizes.get("mixture", ())))
        # A run of no steps scores what it begins with; its schedule has a step that is not taken.
        tokens = sizes["batch_size"] * sizes["length"] * max(1, config["steps"])
        tx, lr = optimizer.build({p: weights[p] for p in chosen}, tokens, **config["optim"])
        seed, ema = config["seed"], config["ema"]
        # A config of a run from before this key has none.
        place = zero.make(config.get("zero", "none"), {p: weights[p] for p in chosen}, mesh)

        def init(source: Mapping = {}, take: Callable | None = None) -> TrainState:
            whole = flatten(nnx.state(construct(jax.random.key(seed))))
            whole |= adapters.start(adapter.table, seed)
            whole = whole if take is None else take(source, whole)
            params = {path: whole[path] for path in chosen}
            frozen = {path: leaf for path, leaf in whole.items() if path not in chosen}
            aux = {"frozen": frozen} if frozen else {}
            held = place.split(params)
            aux |= {} if ema is None else {"ema": jax.tree.map(jnp.copy, held)}
            nothing = jnp.asarray(pair(0))
            return TrainState(jnp.int32(0), nothing, nothing, params, tx.init(held), aux)

        loss = _loss(config["loss"], lambda params, inputs, ctx: model(params)(inputs, ctx))
        # A config of a run from before this key has none.
        loss = balance.around(loss, own, config.get("balance", {}))
        asked = context | {"taps": (*context["taps"], *loss.taps)}
        run = step.make(loss, tx, lr, seed=seed, context=asked, ema=ema, place=place)
        state = _placed(jax.eval_shape(init), mesh)
        # One spelling of each sharding for init, step and restore, or the step compiles again.
        canonical = jax.tree.map(lambda leaf: leaf.sharding, state)
        return Program(
            init=jax.jit(init, static_argnums=1, out_shardings=canonical),
            step=jax.jit(run, donate_argnums=0, out_shardings=(canonical, None)),
            state=state,
            batch=_batch(sizes, mesh),
            evaluate=jax.jit(_evaluate(model, context)),
            model=model,
            table=weights,
            adapter=adapter,
            context=context,
            lr=lr,
            tokens=tokens,
        )


def described(config: Mapping, vocab: int) -> tuple[Table, adapters.Adapter]:
    """The model's own parameters and the adapter of a config, as in `build`, of which it raises."""
    _, _, own, adapter = _declared(config, vocab)
    return own, adapter


def _declared(config: Mapping, vocab: int):
    # Without a mesh, so that sizes which do not divide reach the check, not an error of JAX's.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        bare, abstract, construct = _model(config["model"], config["data"]["length"], vocab)
        own = table(abstract)
        # A config of a run from before these keys has none.
        adapter = adapters.make(config.get("adapter", {}), own)
        return bare, construct, *_widened(own, adapter, config, vocab)


def _widened(own: Table, adapter: adapters.Adapter, config: Mapping, vocab: int):
    """Both with what each weight's fans are beside those of the base width, where there is one."""
    model, base = config["model"], config["model"].get("base_d_model")
    if base is None:
        return own, adapter
    twice = at_width(model, 2 * model["d_model"]) | {"base_d_model": None}
    _, abstract, _ = _model(twice, config["data"]["length"], vocab)
    doubled, wider = table(abstract), model["d_model"] / base
    # By the paths that the adapter was asked for.
    same = {path: doubled.get(path, entry) for path, entry in own.items()}
    added = adapters.make(config.get("adapter", {}), same).table
    adapter = dataclasses.replace(adapter, table=widened(adapter.table, added, wider))
    return widened(own, doubled, wider), adapter


def parameters(state: TrainState, *, averaged: bool = True) -> dict:
    """All parameters of a state, frozen ones included; their moving average where there is one.

    They lie as the parameters do, whatever is split further (config.zero).
    """
    average = state.aux.get("ema", {}) if averaged else {}
    average = {path: _like(leaf, state.params[path]) for path, leaf in average.items()}
    return state.aux.get("frozen", {}) | state.params | average


def _like(leaf, like):
    return jax.device_put(leaf, like.sharding) if isinstance(leaf, jax.Array) else leaf


def _model(config: Mapping, length: int, vocab: int):
    own = {name: value for name, value in config.items() if name not in NOT_OF_LM}
    size = config["vocab"] or vocab
    if size < vocab:
        raise ValueError(
            f"model.vocab is {size} and the tokenizer has {vocab} ids; raise it or drop it"
        )
    construct = lambda key: LM(rngs=nnx.Rngs(key), vocab=size, length=length, **own)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: construct(jax.random.key(0))))
    return lambda params: nnx.merge(graph, restore(abstract, params)), abstract, construct


def _loss(config: Mapping, apply: Callable):
    name = config["name"]
    return importlib.import_module(f"training.losses.{name}").make(
        apply, **config["losses"].get(name, {})
    )


def _chosen(pattern: str | None, own: Table, added: Table) -> list[str]:
    """What is trained: all that is added, and of the model's own what the pattern matches.

    Without a pattern that is nothing where something is added, else all; state never is.
    """
    own = {path: entry for path, entry in own.items() if entry.weight.group != "state"}
    if pattern is None:
        return list(added or own)
    chosen = [path for path in own if re.fullmatch(pattern, path)]
    if not chosen:
        near = difflib.get_close_matches(pattern, list(own), n=3, cutoff=0.0)
        raise ValueError(f"trainable {pattern!r} matches no parameter; some are {', '.join(near)}")
    return [*chosen, *added]


def _evaluate(model: Callable, context: Mapping):
    def evaluate(params: dict, batch: Batch) -> dict:
        ctx = of_batch(batch, **context)
        logits, _ = model(params)(batch.inputs, ctx)
        log_p, _ = log_likelihood(logits, batch.targets)
        sums = {"nll": -jnp.sum(batch.weights * log_p), "weight": jnp.sum(batch.weights)}
        sums["right"] = jnp.sum(batch.weights * right(logits, batch.targets))
        return sums | by_domain(batch, ctx, log_p)

    return evaluate


def _placed(abstract, mesh):
    place = lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, layout(leaf))
    )
    return jax.tree.map(place, abstract)


def _batch(sizes: Mapping, mesh) -> Batch:
    A, B, L = sizes["micro_batches"], sizes["batch_size"], sizes["length"]
    if B % A:
        raise ValueError(f"data.batch_size {B} does not divide into {A} micro-batches")
    devices = ways(mesh, "batch")
    if B // A % devices:
        shape = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES["batch"])
        raise ValueError(
            f"{B} rows in {A} micro-batches leave {B // A} a micro-batch, which do not divide over "
            f"{devices} devices ({shape}); change data.batch_size, data.micro_batches or the mesh"
        )
    if L % mesh.shape["context"]:
        raise ValueError(
            f"data.length {L} does not divide over mesh.context {mesh.shape['context']}"
        )
    fields = data.batch.abstract((A, B // A), L)._asdict()
    return Batch(**{name: _field(name, field, mesh, 1) for name, field in fields.items()})


def batch_sharding(name: str, mesh, lead: int) -> NamedSharding:
    """The sharding of a Batch field with `lead` dimensions (micro-batches) before its rows."""
    tail = {"sample": (None,), "domain": ()}.get(name, ("length",))
    return NamedSharding(mesh, partition(*[None] * lead, "batch", *tail))


def _field(name, field, mesh, lead):
    sharding = batch_sharding(name, mesh, lead)
    return jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=sharding)


def _check_declared(weights: Table) -> None:
    """Refuses axes that no rule knows or that collide, on one device as on many."""
    for path, entry in weights.items():
        try:
            partition(*entry.weight.axes)
        except ValueError as error:
            raise ValueError(f"the weight {path}: {error}") from None


def _check_used(weights: Table, mesh) -> None:
    """Refuses devices that would only repeat what others do."""
    names = {"batch", "length", *(name for entry in weights.values() for name in entry.axes)}
    used = {axis for name in names if name for axis in RULES[name]}
    # Rows are split over the experts' devices too, but that is what mesh.data is for.
    used -= set() if "experts" in names else set(RULES["experts"])
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise ValueError(
                f"mesh.{axis} is {size} and nothing in this model is split over it; set it to 1"
            )


def _check_divides(weights: Table, mesh) -> None:
    for path, entry in weights.items():
        for size, name in zip(entry.shape, entry.axes, strict=True):
            if size % ways(mesh, name):
                axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in RULES[name])
                raise ValueError(
                    f"dimension {name!r} of {path} has size {size}, which does not divide over "
                    f"{axes}; change the size or the mesh"
                )
