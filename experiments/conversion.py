"""Conversion of a trained model's attention: Hedgehog's forms against T2R's ReLU map and 1+ELU.

A teacher, softmax attention as in linear_text.py, takes 750 steps. Of each student this reports the
loss with maps that know nothing (`_swapped`, no step), after they alone have learned to weigh as
attention does for 150 steps (`_taught`, Hedgehog, arXiv 2402.04347, section 4.2, eq. 5; for T2R's
map too, which is the paper's T2R-HH), and after 300 steps of the whole model on the next token (the
bare name). `_direct` are 450 such steps without imitation: of relu it is T2R as published (arXiv
2103.13076); 1+ELU (arXiv 2006.16236) has nothing to teach. continued is softmax attention for as
many. Every stage reads the corpus from its first row on, so that what is taught and then tuned sees
fewer different rows than a direct arm with as many tokens. Hedgehog's own table, of GPT-2 on
WikiText-103: 15.8 perplexity fine-tuned, 16.7 converted by Hedgehog, 19.4 by T2R.

RULE  Claimed: hedgehog, hedgehog_paper and hedgehog_fla are better than relu. Each arm stands at
its grid point with the best mean of validation/bits_per_byte. Judged are its differences, arm minus
relu, of runs with the same seed: their mean and its two-sided 95% t-interval. 'Better' is confirmed
if the interval lies below 0 and the mean is at most -0.005, refuted if all of it lies above -0.005,
and undecided otherwise. There is no verdict where data order or tokens differ, or FLOPs a token by
more than 5%.

COMMAND   uv run sweep experiments/conversion.py
COST      54 runs of at most 768,000 tokens, two at a time, one core each: 18 minutes (Intel Xeon,
          2 cores, jax 0.11.2, which other work shared in part)
FULL      uv run sweep experiments/conversion.py --config.data.source=tokens
          --config.data.sources.tokens.path=corpora/wikitext103 --config.data.tokenizer=hf
          --config.data.tokenizers.hf.path=corpora/wikitext103 --config.data.length=1024
          --config.data.batch_size=32 --config.model.d_model=768 --config.model.layers=12
          --config.model.mixers.attention.heads=12 --config.model.mixers.hedgehog.heads=12
          --config.model.mixers.linear_attention.heads=12 --config.model.ffns.swiglu.width=2048
          --config.model.dtype=bfloat16 --workdir runs/conversion_full
          (corpora/wikitext103 as `uv run tokenize` writes it; steps of the arms times 100, and
          kv_heads of the mixers as heads)
EXPECTED  all three claims confirmed; hedgehog's loss 4.24 bits a byte swapped, 3.21 taught, 2.55
          tuned, where relu's is 4.34, 3.56 and 2.67, as in experiments/results/conversion.md; the
          weights of both are in experiments/results/weights.md
"""

from experiments import base

BASELINE = "relu"
MAPS = r".*mixer/(q|k)_map(_bias)?"
HEDGEHOG = {"model.pattern": ("hedgehog",)}
RELU = {
    "model.pattern": ("linear_attention",),
    "model.mixers.linear_attention.features": "relu",
    "model.mixers.linear_attention.learned": True,
}
ELU = {"model.pattern": ("linear_attention",)}
PAPER = HEDGEHOG | {"model.mixers.hedgehog.form": "paper"}
FLA = HEDGEHOG | {"model.mixers.hedgehog.form": "fla"}
SWAPPED = {"steps": 0}
TAUGHT = {
    "steps": 150,
    "trainable": MAPS,
    "loss.name": "attention_transfer",
    "optim.lr": 1e-2,
    "optim.weight_decay": 0.0,
    "optim.warmup_fraction": 0.0,
    "optim.schedule": "cosine",
}
TUNED = {"steps": 300, "optim.lr": 6e-4, "optim.schedule": "cosine"}
DIRECT = TUNED | {"steps": 450}
ARMS = {
    "teacher": {"model.pattern": ("attention",), "steps": 750},
    "continued": {"model.pattern": ("attention",)} | DIRECT,
    "relu_swapped": RELU | SWAPPED,
    "relu_taught": RELU | TAUGHT,
    "relu": RELU | TUNED,
    "relu_direct": RELU | DIRECT,
    "hedgehog_swapped": HEDGEHOG | SWAPPED,
    "hedgehog_taught": HEDGEHOG | TAUGHT,
    "hedgehog": HEDGEHOG | TUNED,
    "hedgehog_direct": HEDGEHOG | DIRECT,
    "hedgehog_paper_swapped": PAPER | SWAPPED,
    "hedgehog_paper_taught": PAPER | TAUGHT,
    "hedgehog_paper": PAPER | TUNED,
    "hedgehog_fla_swapped": FLA | SWAPPED,
    "hedgehog_fla_taught": FLA | TAUGHT,
    "hedgehog_fla": FLA | TUNED,
    "elu_swapped": ELU | SWAPPED,
    "elu_direct": ELU | DIRECT,
}
AFTER = {arm: "teacher" for arm in ARMS if arm != "teacher"}
AFTER |= {arm: f"{arm}_taught" for arm in ARMS if f"{arm}_taught" in ARMS}
CLAIMS = {arm: "better" for arm in ("hedgehog", "hedgehog_paper", "hedgehog_fla")}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.005
FLOPS = 0.05
TOWARD = "continued"


def get_config():
    config = base.get_config()
    config.steps = 750
    config.data.batch_size = 8
    config.data.length = 128
    config.model.d_model = 128
    config.model.layers = 4
    config.model.mixers.attention = dict(heads=4, kv_heads=2)
    config.model.mixers.hedgehog = dict(heads=4, kv_heads=2)
    config.model.mixers.linear_attention = dict(heads=4, kv_heads=2)
    config.model.ffns.swiglu = dict(width=192)
    config.optim.lr = 1.8e-3
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 25
    config.train.eval_every = 75
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
