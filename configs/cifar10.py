"""MD4's discrete CIFAR-10 (Shi et al. 2024, arXiv:2406.04329): pixels as 256 symbols, 2M steps of 256 images.

The hyper-parameters are MD4's; the network is a DiT instead of their U-Net (docs/departures.md). For a trial:
--config.data.name=../shared/data/cifar10/cifar10_jpeg.npz --config.train.steps=3 --config.train.batch_size=4
"""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name = "data/cifar10.npz"
    config.denoiser.options = {
        "patch": 2, "width": 512, "depth": 16, "heads": 8,
        "time": True, "dropout": 0.1, "dtype": "bfloat16", "scan": True, "remat": False,
    }  # fmt: skip
    config.optimizer.learning_rate, config.optimizer.b2, config.optimizer.weight_decay = 2e-4, 0.99, 0.01
    config.optimizer.schedule, config.optimizer.warmup = "constant", 100
    config.train.steps, config.train.batch_size, config.train.accumulate, config.train.ema = 2_000_000, 256, 1, 0.9999
    config.train.eval_every, config.train.sample_every, config.train.checkpoint_every = 20_000, 10_000, 5_000
    config.sample.num, config.sample.steps, config.sample.grid = 64, 256, "cosine"
    return config
