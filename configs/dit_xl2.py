"""DiT-XL/2 on latents of 256 x 256 images (Peebles & Xie 2023): 675M parameters, 400k steps of 256 latents.

A plan needs no data: ddjax plan --config configs/dit_xl2.py --devices 64 --chip h200 --shape 32 32 4 --classes 1000
"""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name, config.data.tokens = "data/imagenet_latents.npz", False
    config.process.name, config.process.schedule = "gaussian", "vp_linear"
    config.denoiser.kind = "noise"
    config.denoiser.options = {
        "patch": 2, "width": 1152, "depth": 28, "heads": 16, "dtype": "bfloat16", "scan": True, "remat": "full",
    }  # fmt: skip
    config.objective.name = "gaussian"
    config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup = 1e-4, "constant", 0
    config.train.steps, config.train.batch_size, config.train.ema = 400_000, 256, 0.9999
    config.train.mesh = {"data": -1, "fsdp": 8}  # parameters are gathered within a node of 8
    config.sample.solver, config.sample.steps, config.sample.grid = "ddim", 250, "uniform"
    return config
