"""EDM on the digits as images in [-1, 1] (Karras et al. 2022: preconditioning, log-normal noise, Heun)."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.tokens = False
    config.process.name, config.process.schedule, config.process.data_std = "gaussian", "edm", 0.75
    config.denoiser.kind = "edm"
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4}
    config.objective.name = "gaussian"
    config.objective.options = {"density": "log_normal_sigma", "mean": -1.2, "std": 1.2}
    config.optimizer.learning_rate = 2e-3
    config.train.steps, config.train.batch_size = 2000, 64
    config.train.eval_every, config.train.sample_every = 2000, 1000
    config.sample.solver, config.sample.grid, config.sample.steps = "heun", "karras", 18
    config.sample.guidance = 1.5
    return config
