"""DeepSeekMoE 16B, Dai et al. 2024, arXiv 2401.06066: 64 narrow experts, 6 a token, 2 shared.

16,375,728,128 parameters: 102400 x 2048 token embeddings and as many in the head + a first layer
with a dense feed-forward network, 84,021,248 + 27 layers of 587,862,016 + the final norm's 2,048.

The paper's recipe (section 5.1.2): AdamW 0.9 / 0.95, weight decay 0.1, clipping at 1.0, 4.2e-4
after 2,000 steps of warm-up, times 0.316 after 80% and again after 90% of the steps, standard
deviation 0.006 at the start, 4,608 rows of 4,096 tokens, 106,449 steps. Deviations: the rate falls
by a cosine to a tenth, which is where their two steps end; experts are balanced over the global
batch, with the paper's weight of 0.001, not within each device's; a device has room for twice the
tokens of perfect balance from each that sends to it, and what goes beyond is lost. Corpus and
tokenizer are the embedded ones until others are there; model.vocab holds the published size.

COMMAND   uv run train --config experiments/deepseek_moe_16b.py --config.mesh.fsdp=16
          --config.mesh.expert=8
COST      not run
EXPECTED  not run
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.steps = 106_449
    config.data.batch_size = 4608
    config.data.length = 4096
    config.data.micro_batches = 6
    config.model.d_model = 2048
    config.model.layers = 28
    config.model.prefix = ("dense",)
    config.model.blocks.dense = dict(mixer="attention", ffn="swiglu", heads=16)
    config.model.mixers.attention = dict(heads=16)
    config.model.ffn = "moe"
    config.model.ffns.swiglu = dict(width=10944)
    config.model.ffns.moe = dict(experts=64, top_k=6, width=1408, shared=2, router="softmax")
    config.model.ffns.moe.room = 2.0
    config.model.tied = False
    config.model.vocab = 102_400
    config.model.init_std = 0.006
    config.model.scale_residual = False
    config.model.remat = "full"
    config.model.dtype = "bfloat16"
    config.balance.balances.global_batch = dict(weight=0.001, z=0.0)
    config.optim.lr = 4.2e-4
    config.optim.warmup_fraction = 2_000 / 106_449
    config.optim.methods.adamw = dict(b1=0.9, b2=0.95)
    config.optim.schedules.cosine = dict(final_ratio=0.1)
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_rows = 1024
    config.train.save_every = 1000
    return config
