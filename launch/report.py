"""What train says before and after a run."""

import contextlib
import json
import pathlib
import shlex
from collections.abc import Callable, Mapping

from analysis import ngrams
from inference.generate import generate
from launch.flags import Parsed
from launch.setup import Setup
from training.evaluate import Score
from training.loop import Outcome, Run
from training.program import parameters


def opening(setup: Setup, header: Mapping, folder: pathlib.Path) -> str:
    """One paragraph on what is about to run."""
    counts, device, data = header["parameters"], header["device"], setup.data
    config = setup.config
    devices = f"{device['count']} x {device['kind']}"
    devices += f" of {header['hosts']} processes" if header["hosts"] > 1 else ""
    rows, length = config["data"]["batch_size"], config["data"]["length"]
    return (
        f"{counts['total']:,} parameters ({counts['without_embeddings']:,} without embeddings) on "
        f"{devices}; {config['steps']:,} steps of {rows} x {length} = {rows * length:,} tokens "
        f"from {_corpus(data)}{_mixture(data)}; {folder}"
    )


def _corpus(data) -> str:
    """How much there is to read, and what is drawn without end."""
    tokens, drawn = data.tokens("train"), " and ".join(data.drawn)
    read = [f"{tokens:,}"] if tokens else []
    return " and ".join(read + ([f"rows drawn by {drawn}"] if drawn else []))


def _mixture(data) -> str:
    """The domains with the weights that the first row is drawn with, where there are several."""
    if len(data.domains) == 1:
        return ""
    listed = ", ".join(f"{name} {weight:.3g}" for name, weight in data.weights(0).items())
    follow = {"train": ", which follow the losses", "validation": ", which follow held-out losses"}
    return f" ({listed} at row 0{follow.get(data.hears, '')})"


def by_domain(score: Score) -> list[str]:
    """A line a domain, where there are several."""
    width = max(map(len, score.domains), default=0)
    return [
        f"  {name:<{width}} loss {loss:.4f} over {score.weights[name]:,.0f} targets"
        for name, loss in score.domains.items()
    ]


def sampler(setup: Setup) -> Callable[[dict], str] | None:
    """params -> the configured prompt with the model's continuation.

    None where there is none: for an encoder, ids without text, and where a mixer cannot decode.
    """
    config, data = setup.config, setup.data
    if not config["model"]["causal"] or not data.tokenizer.byte_lengths.any():
        return None
    prompt, tokens = config["train"]["sample_prompt"], config["train"]["sample_tokens"]
    ids = data.tokenizer.encode_prompt(prompt)
    lm = setup.program.model(parameters(setup.program.state))
    if lm.longest is not None:
        tokens = min(tokens, lm.longest - len(ids))
    if tokens < 1 or not lm.decodes:
        return None

    def sample(params: dict) -> str:
        context = {"dtype": setup.program.context["dtype"]}
        drawn = dict(seed=config["seed"], temperature=0.7, top_p=0.95)
        (out,) = generate(
            setup.program.model,
            params,
            [ids],
            tokens=tokens,
            eos=data.tokenizer.eos,
            context=context,
            **drawn,
        )
        return data.tokenizer.decode([*ids[1:], *out])

    return sample


def closing(job: Run, outcome: Outcome, given: Parsed) -> str:
    """Scores beside n-gram counts, a sample, and what one may do next.

    To be called by every process of a run; only what the leader is given is complete.
    """
    folder, steps = shlex.quote(str(job.workdir)), job.config["steps"]
    changes = {f"--config.{key}": text for key, text in given.overrides.items() if key != "steps"}
    chosen = [f"{flag}={shlex.quote(text)}" for flag, text in changes.items()]
    command = ["uv run train --config", shlex.quote(given.flags.config), "--workdir", folder]
    given_hosts = {n: getattr(given.flags, n, None) for n in ("coordinator", "processes")}
    hosts = [f"--{name}={value}" for name, value in given_hosts.items() if value is not None]
    hosts += ["--process=I"] if len(hosts) > 1 else []
    again = " ".join([*command, *chosen, *hosts])
    if outcome.step < steps:
        at = f"--config.steps={steps}" if "steps" in given.overrides else ""
        return f"stopped at step {outcome.step} of {steps}, saved; to go on: {again} {at}".rstrip()
    lines = []
    if not outcome.stepped:
        lines.append(f"this run is finished: {folder} holds step {outcome.step} of {steps}")
    if outcome.score is not None:
        text = outcome.text or (job.sample and job.sample(parameters(outcome.state)))
        lines += _scores(job, outcome) if job.hosts.leader else []
        lines += ["", "sample", text, ""] if text else [""]
    lines += [
        f"train on:     {again} --config.steps={2 * steps}",
        f"score:        uv run evaluate --workdir {folder}",
        f"sample:       uv run generate --workdir {folder} --prompt 'def '",
        f"tensorboard:  uv run tensorboard --logdir {folder}",
    ]
    if job.sample is None:
        lines = [line for line in lines if not line.startswith("sample:")]
    return "\n".join(lines)


def _ngrams(job: Run) -> dict[str, float]:
    """Computed once a run and kept beside its metrics, where pictures find them."""
    path, source = job.workdir / "ngrams.json", job.data.source
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    scores = ngrams.bits_per_byte(source.documents("train"), source.documents("validation"))
    path.write_text(json.dumps(scores))
    return scores


def _scores(job: Run, outcome: Outcome) -> list[str]:
    score = outcome.score
    rows, source = [("this model", score.bits_per_byte)], job.data.source
    counted = ""
    if job.config["train"]["ngrams"]:
        if len(job.data.domains) == 1 and hasattr(source, "documents") and source.encoded is None:
            rows += _ngrams(job).items()
            counted = ", n-gram counts taken from the training files"
        else:
            counted = ", without n-gram counts, which are of one domain of text"
    lines = [
        f"held-out: {score.targets:,.0f} tokens, loss {score.loss:.4f} nats a token, "
        f"perplexity {score.perplexity:.3f}",
        *by_domain(score),
    ]
    if score.bits_per_byte is not None:
        lines.append(f"bits per byte of held-out files{counted}:")
        lines += [f"  {name:<11} {bits:.3f}" for name, bits in rows]
    return lines
