"""Digits of 8 x 8 from theirs of 4 x 4, by Inf-DiT: noise, preconditioning and solver as in digits_gaussian.py."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.tokens = False
    config.data.conditions = {"image": {"smaller": 2}}  # what the network is told is made of what it learns to draw
    config.process.name, config.process.schedule, config.process.data_std = "gaussian", "edm", 0.75
    config.denoiser.name, config.denoiser.kind = "inf_dit", "edm"
    config.denoiser.options = {
        "patch": 1, "low_patch": 1, "block": 2, "width": 96, "depth": 4, "heads": 4,
    }  # fmt: skip
    config.objective.name = "gaussian"
    config.objective.options = {"density": "log_normal_sigma", "mean": -1.2, "std": 1.2}
    config.optimizer.learning_rate = 2e-3
    config.train.steps, config.train.batch_size = 1000, 64
    config.train.eval_every, config.train.sample_every = 1000, 1000
    config.sample.solver, config.sample.grid, config.sample.steps = "heun", "karras", 18
    return config
