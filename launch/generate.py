"""Text from a checkpoint: `uv run generate --workdir runs/quickstart --prompt 'def '`."""

import sys

from launch import flags, platform
from launch.schema import Key

ABOUT = """\
Continues --prompt, or every line of standard input as a prompt of its own, with the latest
checkpoint in --workdir. A text depends on --seed and its line's number, not on other prompts."""
FLAGS = {
    "prompt": Key(
        str, None, True, (), "text to continue; left out, lines of standard input are", raw=True
    ),
    "tokens": Key(int, 256, False, (), "tokens to add to each prompt"),
    "temperature": Key(float, 0.8, False, (), "divides the logits; 0 takes the likeliest token"),
    "top_k": Key(int, None, True, (), "draw among this many likeliest tokens"),
    "top_p": Key(float, 0.95, False, (), "draw among the likeliest with this much probability"),
    "seed": Key(int, 0, False, (), "of the draws"),
    **flags.OPENING,
}


def main() -> None:
    parsed = flags.parse(prog="generate", about=ABOUT, flags=FLAGS, needs_config=False)
    platform.choose()
    from inference.generate import generate
    from launch import setup

    given = parsed.flags
    with setup.one_sentence("generate"):
        if not 0 <= given.seed < 2**32:
            raise ValueError(f"--seed is {given.seed} and must be at least 0 and below 2^32")
        prompts = [given.prompt] if given.prompt is not None else _lines()
        built, params, _ = setup.reopen(given.workdir, corpus=False, trust=given.trust)
        if not built.config["model"]["causal"]:
            raise ValueError(f"{given.workdir} holds an encoder, which does not continue text")
        tokenizer = built.data.tokenizer
        starts = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        texts = generate(
            built.program.model,
            params,
            starts,
            tokens=given.tokens,
            eos=tokenizer.eos,
            context={"dtype": built.program.context["dtype"]},
            seed=given.seed,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
        )
        for start, ids in zip(starts, texts, strict=True):
            print(tokenizer.decode([*start[1:], *ids]))  # Together: a letter may have begun before.


def _lines() -> list[str]:
    if sys.stdin.isatty():
        print("type prompts, one a line, and end with Ctrl-D", file=sys.stderr)
    lines = [line.rstrip("\n") for line in sys.stdin]
    if not lines:
        raise ValueError("there is no prompt; give --prompt TEXT or lines on standard input")
    return lines


if __name__ == "__main__":
    main()
