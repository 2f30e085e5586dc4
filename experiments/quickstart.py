"""A byte model of the Python standard library, which every Python carries: two minutes on a laptop.

Nothing is downloaded. 4 layers of width 128: 525,696 parameters, of which 33,024 are embeddings.
300 steps of 16 x 256 = 4,096 bytes read 1.2 MB of the 12.

Source: the model is a small Llama (arXiv 2302.13971); the schedule is warm-up, stable, decay
(arXiv 2404.06395) with the 1-sqrt decay of arXiv 2405.18392.

COMMAND   python -m launch.train --config quickstart --workdir runs/quickstart
COST      not run
EXPECTED  not run
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.steps = 300
    config.data.batch_size = 16
    config.data.length = 256
    config.model.d_model = 128
    config.model.layers = 4
    config.model.mixers.attention = dict(heads=4, kv_heads=2)
    config.model.ffns.swiglu = dict(width=192)
    config.optim.lr = 4e-3
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.eval_rows = 64
    config.train.sample_every = 100
    config.train.save_every = 100
    return config
