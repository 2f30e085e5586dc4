"""Is it few tokens or few documents that hurt a balance over micro-batches?

The control of "Demons in the Detail" (arXiv 2501.11873, section 4.3): tokens of the whole batch are
dealt at random to parts as small as a micro-batch, and experts are balanced within each. There this
is as good as the global batch (perplexity 8.041 beside 8.038, and 8.167 of micro-batches), so that
it is the few documents. Here the model, corpus and steps of moe_balance.py, 16 parts of 128 tokens
each, whole rows or shuffled, and the global batch; one weight.

RULE  Claimed: shuffled is no worse than global_batch. Each arm stands at its grid point with the
best mean of validation/bits_per_byte. Judged are its differences, arm minus global_batch, of runs
with the same seed: their mean and its two-sided 95% t-interval. 'No worse' is confirmed if the
interval lies below 0.01, refuted if it lies above 0 and the mean is at least 0.01, and undecided
otherwise. There is no verdict where data order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/moe_shuffled.py
COST      9 runs of 768,000 tokens, two at a time, one core each: 11 minutes (Intel Xeon, 2 cores,
          jax 0.11.2, which other work shared in part)
FULL      uv run sweep experiments/moe_shuffled.py --config.data.batch_size=512
          --config.data.length=4096 --config.steps=60000 --config.model.d_model=1024
          --config.model.layers=24 --config.model.mixers.attention.heads=16
          --config.model.ffns.moe.experts=64 --config.model.ffns.moe.top_k=4
          --config.model.ffns.moe.shared=4 --config.model.ffns.moe.width=512
          --config.model.dtype=bfloat16 --workdir runs/moe_shuffled_full
          (parts=128 and weights 0.008, and a corpus of 120e9 tokens)
EXPECTED  undecided, +0.009 +-0.018 bits a byte; rows_1 is 0.033 worse than global_batch, as in
          experiments/results/moe_shuffled.md
"""

from experiments import base

BASELINE = "global_batch"
ARMS = {
    "global_batch": {"balance.balances.global_batch.weight": 0.1},
    "shuffled": {
        "balance.name": "shuffled",
        "balance.balances.shuffled.parts": 16,
        "balance.balances.shuffled.weight": 0.1,
    },
    "rows_1": {"balance.name": "micro_batch", "balance.balances.micro_batch.weight": 0.1},
}
CLAIMS = {"shuffled": "no worse"}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.01


def get_config():
    config = base.get_config()
    config.steps = 375
    config.data.batch_size = 16
    config.data.length = 128
    config.data.mixture = ("stdlib", "prose", "records", "arithmetic")
    config.model.d_model = 128
    config.model.layers = 4
    config.model.mixers.attention = dict(heads=4, kv_heads=2)
    config.model.ffn = "moe"
    config.model.ffns.moe = dict(experts=16, top_k=2, width=96, router="softmax")
    config.optim.lr = 1.8e-3
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 25
    config.train.eval_every = 75
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
