"""Flow matching on the digits as images in [-1, 1]: straight paths, velocity prediction (Lipman et al. 2023)."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.tokens = False
    config.process.name, config.process.schedule = "gaussian", "cond_ot"
    config.denoiser.kind = "velocity"
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4}
    config.objective.name = "gaussian"
    config.optimizer.learning_rate = 2e-3
    config.train.steps, config.train.batch_size = 2000, 64
    config.train.eval_every, config.train.sample_every = 2000, 1000
    config.sample.solver, config.sample.steps = "heun", 24
    config.sample.guidance = 1.5
    return config
