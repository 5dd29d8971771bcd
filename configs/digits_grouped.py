"""Digits written in groups of pixels that lie apart (LPD), 16 passes for 64 of them. About 15 minutes on two cores."""

from ddjax.config import default


def get_config():
    config = default()
    config.process.schedule = "cosine"
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4, "time": False}
    config.objective.name, config.objective.condition_dropout = "grouped", 0.2
    config.optimizer.learning_rate, config.optimizer.weight_decay = 3e-3, 0.01
    config.train.steps, config.train.batch_size = 3000, 64
    config.train.eval_every, config.train.sample_every = 1000, 1000
    config.sample.solver, config.sample.steps, config.sample.guidance = "grouped", 16, 1.5
    return config
