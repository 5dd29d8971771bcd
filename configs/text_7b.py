"""A masked text denoiser of 7 billion parameters, of the width and depth of Llama 2 7B: batches of 4M tokens.

A plan needs no data: ddjax plan --config configs/text_7b.py --devices 256 --chip v5p --shape 4096 --symbols 32000
"""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name, config.data.options = "data/corpus.txt", {"length": 4096}
    config.denoiser.name = "text"
    config.denoiser.options = {
        "width": 4096, "depth": 32, "heads": 32, "mlp": "gated", "mlp_width": 11008, "cond_width": 128, "time": False,
        "dtype": "bfloat16", "scan": True, "remat": "full",
    }  # fmt: skip
    config.optimizer.learning_rate, config.optimizer.b2, config.optimizer.weight_decay = 3e-4, 0.95, 0.1
    config.optimizer.warmup = 2000
    config.train.steps, config.train.batch_size, config.train.ema = 500_000, 1024, 0.9999
    config.train.mesh = {"fsdp": -1, "tensor": 4}
    config.sample.steps, config.sample.grid = 256, "cosine"
    return config
