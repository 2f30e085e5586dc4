"""Linear attention from scratch on text: Hedgehog's forms and a hybrid, from 1+ELU to softmax.

The quickstart's corpus and a model of its size, 750 steps of 8 x 128 bytes as in optimizers.py,
with its best recipe. Every arm replaces the mixers alone: elu (arXiv 2006.16236), hedgehog (arXiv
2402.04347) in LoLCATs' form, the paper's and flash-linear-attention's, learned with the rest of the
model and not distilled, hybrid with softmax attention in every other layer, and softmax attention
in all. Feed-forward widths make FLOPs a token equal to 1%: the recurrent form's for linear
attention, the visible half of the square's for softmax. The paper's own experiment is WikiText-103
with 125M parameters, where Hedgehog closes 68.6% of the gap between 1+ELU and softmax.

RULE  Claimed: softmax, hedgehog, hedgehog_paper, hedgehog_fla and hybrid are better than elu. Each
arm stands at its grid point with the best mean of validation/bits_per_byte. Judged are its
differences, arm minus elu, of runs with the same seed: their mean and its two-sided 95% t-interval.
'Better' is confirmed if the interval lies below 0 and the mean is at most -0.005, refuted if all of
it lies above -0.005, and undecided otherwise. There is no verdict where data order or tokens
differ, or FLOPs a token by more than 1%.

COMMAND   uv run sweep experiments/linear_text.py
COST      36 runs of 768,000 tokens, two at a time, one core each: 26 minutes (Intel Xeon, 2 cores,
          jax 0.11.2, which other work shared in part)
FULL      uv run sweep experiments/linear_text.py --config.data.source=tokens
          --config.data.sources.tokens.path=corpora/wikitext103 --config.data.tokenizer=hf
          --config.data.tokenizers.hf.path=corpora/wikitext103 --config.data.length=1024
          --config.data.batch_size=32 --config.steps=100000 --config.model.d_model=768
          --config.model.layers=12 --config.model.dtype=bfloat16 --workdir runs/linear_text_full
          (corpora/wikitext103 as `uv run tokenize` writes it; heads, widths and rates of the arms
          want setting anew)
EXPECTED  all five claims confirmed, and of the way to softmax hedgehog 39%, hedgehog_paper 33%,
          hedgehog_fla 17% and hybrid all of it, as in experiments/results/linear_text.md; linear
          arms stand at the higher of both rates, so with more rates they may come further
"""

from experiments import base

BASELINE = "elu"
RATES = [0.0018, 0.0027]
HEDGEHOG = {
    "model.pattern": ("hedgehog",),
    "model.ffns.swiglu.width": 198,
    "optim.lr": RATES,
}
ARMS = {
    "elu": {
        "model.pattern": ("linear_attention",),
        "model.ffns.swiglu.width": 224,
        "optim.lr": RATES,
    },
    "softmax": {"model.pattern": ("attention",), "optim.lr": RATES},
    "hedgehog": HEDGEHOG,
    "hedgehog_paper": HEDGEHOG | {"model.mixers.hedgehog.form": "paper"},
    "hedgehog_fla": HEDGEHOG | {"model.mixers.hedgehog.form": "fla"},
    "hybrid": {
        "model.pattern": ("hedgehog", "attention"),
        "model.ffns.swiglu.width": 195,
        "optim.lr": RATES,
    },
}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.005
FLOPS = 0.01
TOWARD = "softmax"


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
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 25
    config.train.eval_every = 75
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
