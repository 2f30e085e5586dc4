"""What train says before and after a run."""

import json
import pathlib
from collections.abc import Callable, Mapping

from analysis import ngrams
from inference.generate import generate
from launch.setup import Setup
from training.loop import Outcome, Run
from training.program import parameters


def opening(setup: Setup, header: Mapping, folder: pathlib.Path) -> str:
    """One paragraph on what is about to run."""
    counts, device, data = header["parameters"], header["device"], setup.data
    config = setup.config
    rows, length = config["data"]["batch_size"], config["data"]["length"]
    return (
        f"{counts['total']:,} parameters ({counts['without_embeddings']:,} without embeddings) on "
        f"{device['count']} x {device['kind']}; {config['steps']:,} steps of {rows} x {length} = "
        f"{rows * length:,} tokens from {data.tokens('train'):,}; {folder}"
    )


def sampler(setup: Setup) -> Callable[[dict], str] | None:
    """params -> the configured prompt with the model's continuation; None for an encoder."""
    config, data = setup.config, setup.data
    if not config["model"]["causal"]:
        return None
    prompt, tokens = config["train"]["sample_prompt"], config["train"]["sample_tokens"]
    ids = data.tokenizer.encode_prompt(prompt)

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
        return prompt + data.tokenizer.decode(out)

    return sample


def closing(job: Run, outcome: Outcome, config_path: str) -> str:
    """Scores beside n-gram counts, a sample, and what one may do next."""
    folder, steps = job.workdir, job.config["steps"]
    again = f"uv run train --config {config_path} --workdir {folder}"
    if outcome.step < steps:
        return f"stopped at step {outcome.step} of {steps}, saved; to go on: {again}"
    lines = []
    if not outcome.stepped:
        lines.append(f"this run is finished: {folder} holds step {outcome.step} of {steps}")
    if outcome.score is not None:
        lines += _scores(job, outcome)
        if job.sample is not None:
            lines += ["", "sample", job.sample(parameters(outcome.state)), ""]
    lines += [
        f"train on:     {again} --config.steps={2 * steps}",
        f"score:        uv run evaluate --workdir {folder}",
        f"sample:       uv run generate --workdir {folder} --prompt 'def '",
        f"tensorboard:  uv run tensorboard --logdir {folder}",
    ]
    return "\n".join(lines)


def _ngrams(job: Run) -> dict[str, float]:
    """Computed once a run and kept beside its metrics, where pictures find them."""
    path, source = job.workdir / "ngrams.json", job.data.source
    if not path.is_file():
        scores = ngrams.bits_per_byte(source.documents("train"), source.documents("validation"))
        path.write_text(json.dumps(scores))
    return json.loads(path.read_text())


def _scores(job: Run, outcome: Outcome) -> list[str]:
    score = outcome.score
    rows = [("this model", score.bits_per_byte)]
    if job.config["train"]["ngrams"]:
        rows += _ngrams(job).items()
    lines = [
        f"held-out: {score.targets:,.0f} tokens, loss {score.loss:.4f} nats a token, "
        f"perplexity {score.perplexity:.3f}"
    ]
    if score.bits_per_byte is not None:
        lines.append(
            "bits per byte of held-out files, n-gram counts taken from the training files:"
        )
        lines += [f"  {name:<11} {bits:.3f}" for name, bits in rows]
    return lines
