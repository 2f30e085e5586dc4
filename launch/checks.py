"""Sizes that can be judged before jax is imported. Methods check their own arguments themselves."""

import re
from collections.abc import Mapping, Sequence

from data.schedule import parse
from launch.files import leaves
from launch.schema import UsageError

POSITIVE = (
    "data.batch_size",
    "data.length",
    "data.micro_batches",
    "model.d_model",
    "model.base_d_model",
    "model.layers",
    "model.vocab",
    "model.softcap",
    "model.norm_eps",
    "model.unroll",
    "optim.lr",
    "optim.clip",
    "train.log_every",
    "train.eval_every",
    "train.eval_rows",
    "train.sample_every",
    "train.sample_tokens",
    "train.save_every",
    "train.keep",
    "train.keep_every",
    "train.profile_steps",
)
NOT_NEGATIVE = (
    "seed",
    "steps",
    "data.prefetch",
    "data.workers",
    "model.token_types",
    "optim.weight_decay",
)
FRACTIONS = ("model.dropout", "ema", "optim.warmup_fraction")


def check(config: Mapping) -> None:
    """Raises UsageError, with the numbers and the fix, for sizes that cannot work."""
    values = dict(leaves(config))
    _ranges(values)
    _regex(values["trainable"])
    _batch(values["data.batch_size"], values["data.micro_batches"])
    _warmup(values)
    _mixture(config["data"]["mixture"], config["data"]["domains"])
    _layers(config["model"])
    _heads(config["model"])
    _mesh(config["mesh"])


def _ranges(values: Mapping[str, object]) -> None:
    given = {name: value for name, value in values.items() if value is not None}
    for name in POSITIVE:
        if given.get(name, 1) <= 0:
            raise UsageError(f"{name} is {given[name]} and must be greater than 0")
    for name in NOT_NEGATIVE:
        if given.get(name, 0) < 0:
            raise UsageError(f"{name} is {given[name]} and must not be negative")
    if values["seed"] >= 2**32:
        raise UsageError(f"seed is {values['seed']} and must be below 2^32 = {2**32}")
    for name in FRACTIONS:
        if not 0 <= given.get(name, 0) < 1:
            raise UsageError(f"{name} is {given[name]} and must be at least 0 and below 1")


def _regex(trainable: str | None) -> None:
    try:
        re.compile(trainable or "")
    except re.error as error:
        raise UsageError(
            f"trainable is not a regular expression: {error} in {trainable!r}"
        ) from None


def _batch(batch_size: int, micro_batches: int) -> None:
    if batch_size % micro_batches:
        near = max(n for n in range(1, micro_batches) if batch_size % n == 0)
        raise UsageError(
            f"data.batch_size {batch_size} does not divide into {micro_batches} micro-batches; set "
            f"data.micro_batches to {near}, or data.batch_size to a multiple of {micro_batches}"
        )


def _warmup(values: Mapping[str, object]) -> None:
    rows, length = values["steps"] * values["data.batch_size"], values["data.length"]
    warmup = values["optim.warmup_tokens"] or 0
    if warmup < 0 or warmup >= rows * length > 0:
        raise UsageError(
            f"optim.warmup_tokens is {warmup} and the run has {rows} rows of {length} = "
            f"{rows * length} tokens; shorten one or lengthen the other"
        )


def _mixture(names: Sequence[str], domains: Mapping[str, Mapping]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"data.mixture names {name!r} {names.count(name)} times; name it once, or give "
                "the others entries in data.domains"
            )
    drawn = [any(_weights(f"data.domains.{entry}", own)) for entry, own in domains.items()]
    # A source that is not an entry has the weight 1.
    if names and not any(drawn) and len(names) == len(domains):
        last = "weight" if domains[names[0]]["schedule"] is None else "schedule"
        raise UsageError(
            f"data.mixture {','.join(names)} has no weight above 0; "
            f"set data.domains.{names[0]}.{last}"
        )


def _weights(key: str, own: Mapping[str, object]) -> list[float]:
    """All weights that an entry of data.domains ever has."""
    if own["weight"] < 0:
        raise UsageError(f"{key}.weight is {own['weight']} and must not be negative")
    if own["epochs"] is not None and own["epochs"] <= 0:
        raise UsageError(f"{key}.epochs is {own['epochs']} and must be greater than 0, or none")
    if own["schedule"] is None:
        return [own["weight"]]
    try:
        return [weight for _, weight in parse(f"{key}.schedule", own["schedule"])]
    except ValueError as error:
        raise UsageError(str(error)) from None


def _layers(model: Mapping) -> None:
    prefix, pattern, suffix = (len(model[key]) for key in ("prefix", "pattern", "suffix"))
    if not pattern:
        raise UsageError("model.pattern is empty; name at least one mixer, such as attention")
    periods, rest = divmod(model["layers"] - prefix - suffix, pattern)
    if rest or periods < 0:
        below = max(periods, 0) * pattern + prefix + suffix
        fits = [n for n in (below, below + pattern) if n > 0]
        raise UsageError(
            f"model.layers is {model['layers']}, which is not a prefix of {prefix} + whole "
            f"patterns of {pattern} + a suffix of {suffix}; set it to {' or '.join(map(str, fits))}"
        )


def _heads(model: Mapping) -> None:
    """Heads under the names that mixers share: heads, kv_heads, head_dim."""
    sections = [(f"model.mixers.{name}", own) for name, own in model["mixers"].items()]
    sections += [(f"model.blocks.{name}", own) for name, own in model["blocks"].items()]
    for section, own in sections:
        for name in ("heads", "kv_heads", "head_dim"):
            if own.get(name) is not None and own[name] <= 0:
                raise UsageError(f"{section}.{name} is {own[name]} and must be greater than 0")
        heads, groups = own.get("heads"), own.get("kv_heads")
        if heads and not own.get("head_dim") and model["d_model"] % heads:
            raise UsageError(
                f"model.d_model {model['d_model']} does not divide into {heads} heads "
                f"({section}.heads); change one of them"
                + (f" or set {section}.head_dim" if "head_dim" in own else "")
            )
        if heads and groups and heads % groups:
            raise UsageError(
                f"{section}.heads {heads} does not divide over {groups} kv_heads; "
                f"set {section}.kv_heads to a divisor of {heads}"
            )


def _mesh(mesh: Mapping) -> None:
    for axis, size in mesh.items():
        if size < 1 and size != -1:
            raise UsageError(f"mesh.{axis} is {size} and must be positive, or -1 for the rest")
    open_axes = [axis for axis, size in mesh.items() if size == -1]
    if len(open_axes) > 1:
        names = " and ".join(f"mesh.{axis}" for axis in open_axes)
        raise UsageError(f"{names} are both -1, and one only can take the rest; set the others")
