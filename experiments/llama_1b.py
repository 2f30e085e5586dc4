"""The shape of Llama 3.2 1B: The Llama 3 Herd of Models, arXiv 2407.21783, and its model card.

1,235,814,400 parameters: 128256 x 2048 token embeddings (tied) + 16 layers of 60,821,504 + the
final norm's 2,048. Rotary positions have base 500,000 and the 'llama3' scaling by 32 over an
original 8,192 tokens, which is what lets the published model reach 131,072.

The published model was pruned and distilled from larger ones over up to 9e12 tokens; this file
trains its shape from the start: 256 rows of 8,192 = 2,097,152 tokens a step, 12,000 steps =
2.5e10 tokens (20 a parameter, arXiv 2203.15556). Rate and decay are ordinary ones for this size,
not the paper's, which does not give them for 1B.

COMMAND   uv run train --config experiments/llama_1b.py --config.mesh.fsdp=16
COST      not run
EXPECTED  not run
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.steps = 12_000
    config.data.batch_size = 256
    config.data.length = 8192
    config.data.micro_batches = 16
    config.model.d_model = 2048
    config.model.layers = 16
    config.model.mixers.attention = dict(
        heads=32,
        kv_heads=8,
        head_dim=64,
        rope_base=500_000.0,
        rope_scaling="llama3",
        rope_factor=32.0,
        rope_original_length=8192,
    )
    config.model.ffn = "swiglu"
    config.model.ffns.swiglu = dict(width=8192)
    config.model.tied = True
    config.model.vocab = 128_256
    config.model.norm_eps = 1e-5
    config.model.init_std = 0.02
    config.model.remat = "dots"
    config.model.dtype = "bfloat16"
    config.optim.lr = 3e-4
    config.optim.warmup_fraction = 0.02
    config.optim.schedules.cosine = dict(final_ratio=0.1)
    config.train.log_every = 10
    config.train.eval_every = 500
    config.train.eval_rows = 512
    config.train.save_every = 500
    return config
