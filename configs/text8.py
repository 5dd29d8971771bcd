"""MD4 on text8 (Shi et al. 2024, arXiv:2406.04329): 12 layers, 1M steps of 512 sequences of 256 characters.

Any text will do for a trial: --config.data.name=corpus.txt --config.train.steps=3 --config.train.batch_size=4
"""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name, config.data.eval_split = "data/text8.txt", "valid"
    config.data.options = {"length": 256, "vocabulary": "text8"}
    config.denoiser.name = "text"
    config.denoiser.options = {
        "width": 768, "depth": 12, "heads": 12, "mlp": "gated", "mlp_width": 2048, "embed_width": 64,
        "time": True, "dropout": 0.05, "dtype": "bfloat16", "scan": True, "remat": False,
    }  # fmt: skip
    config.optimizer.learning_rate, config.optimizer.warmup, config.optimizer.weight_decay = 3e-4, 2000, 0.03
    config.train.steps, config.train.batch_size, config.train.accumulate, config.train.ema = 1_000_000, 512, 1, 0.9999
    config.train.eval_every, config.train.sample_every, config.train.checkpoint_every = 10_000, 10_000, 5_000
    config.sample.num, config.sample.steps, config.sample.grid = 16, 256, "cosine"
    config.eval.max_examples = 1024
    return config
