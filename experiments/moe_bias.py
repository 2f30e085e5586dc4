"""Balance by a bias instead of a loss, counted within rows and over the global batch.

"Demons in the Detail" (arXiv 2501.11873, table 1) updates the bias of arXiv 2408.15664 by counts of
micro-batches (perplexity 8.521) and of the global batch (8.080, beside 8.038 of the loss). Here the
model, corpus and steps of moe_balance.py; the bias moves by 0.001 a step, in the direction that
each row by itself asks for on average, or the whole batch; and with the loss beside it.

RULE  Claimed: bias_global is better than bias_rows_1. Each arm stands at its grid point with the
best mean of validation/bits_per_byte. Judged are its differences, arm minus bias_rows_1, of runs
with the same seed: their mean and its two-sided 95% t-interval. 'Better' is confirmed if the
interval lies below 0 and the mean is at most -0.005, refuted if all of it lies above -0.005, and
undecided otherwise. There is no verdict where data order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/moe_bias.py
COST      12 runs of 768,000 tokens, two at a time, one core each: 13 minutes (Intel Xeon, 2 cores,
          jax 0.11.2, which other work shared in part)
FULL      uv run sweep experiments/moe_bias.py --config.data.batch_size=512
          --config.data.length=4096 --config.steps=60000 --config.model.d_model=1024
          --config.model.layers=24 --config.model.mixers.attention.heads=16
          --config.model.ffns.moe.experts=64 --config.model.ffns.moe.top_k=4
          --config.model.ffns.moe.shared=4 --config.model.ffns.moe.width=512
          --config.model.dtype=bfloat16 --workdir runs/moe_bias_full
          (rows=4 of bias_rows_1, and a corpus of 120e9 tokens)
EXPECTED  undecided, +0.02 +-0.06 bits a byte, for the worse; a loss beside the bias, or alone, ends
          0.05 better than any bias of this rate in so few steps, as in
          experiments/results/moe_bias.md
"""

from experiments import base

BASELINE = "bias_rows_1"
BIAS = {"balance.name": "aux_free"}
ARMS = {
    "bias_rows_1": BIAS | {"balance.balances.aux_free.rows": 1},
    "bias_global": BIAS,
    "bias_global_and_loss": BIAS | {"balance.balances.aux_free.weight": 0.01},
    "loss_global": {"balance.balances.global_batch.weight": 0.01},
}
CLAIMS = {"bias_global": "better"}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.005


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
