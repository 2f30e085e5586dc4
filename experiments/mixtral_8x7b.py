"""Mixtral of Experts, Jiang et al. 2024, arXiv 2401.04088: 8 experts, 2 a token.

46,702,792,704 parameters: 32000 x 4096 token embeddings and as many in the head + 32 layers of
1,451,270,144 + the final norm's 4,096. A token goes through 12,879,925,248 of them: 2 of 8 experts.

The paper publishes the model (table 1), not how it was trained. Rows of 4,096 tokens, batch, rate
and weight decay are Llama 2's (llama_7b.py); the rotary base of 1e6 is the released model's.
Experts are balanced over the global batch (arXiv 2501.11873, weight 0.008) with a z-loss of 1e-3,
and a device has room for twice the tokens of perfect balance from each of those that send to it.
Corpus and tokenizer are the embedded ones until others are there; model.vocab holds the published
size.

COMMAND   uv run train --config experiments/mixtral_8x7b.py --config.mesh.fsdp=64
          --config.mesh.expert=8
COST      not run
EXPECTED  not run
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.steps = 476_838
    config.data.batch_size = 1024
    config.data.length = 4096
    config.data.micro_batches = 2
    config.model.d_model = 4096
    config.model.layers = 32
    config.model.mixers.attention = dict(heads=32, kv_heads=8, rope_base=1e6)
    config.model.ffn = "moe"
    config.model.ffns.moe = dict(experts=8, top_k=2, width=14336, router="topk_softmax")
    config.model.ffns.moe.room = 2.0
    config.model.tied = False
    config.model.vocab = 32_000
    config.model.norm_eps = 1e-5
    config.model.init_std = 0.02
    config.model.remat = "full"
    config.model.dtype = "bfloat16"
    config.balance.balances.global_batch = dict(weight=0.008, z=1e-3)
    config.optim.lr = 3e-4
    config.optim.warmup_fraction = 2_000 / 476_838
    config.optim.methods.adamw = dict(b1=0.9, b2=0.95, eps=1e-5)
    config.optim.schedules.cosine = dict(final_ratio=0.1)
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_rows = 1024
    config.train.save_every = 1000
    return config
