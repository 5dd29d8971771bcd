"""Masked diffusion of scikit-learn's digits: 8x8 pixels of 17 levels, as tokens. About 10 minutes on two cores."""

from ddjax.config import default


def get_config():
    config = default()
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4, "time": False}
    config.objective.name, config.objective.condition_dropout = "any_order", 0.2
    config.optimizer.learning_rate, config.optimizer.weight_decay = 3e-3, 0.01
    config.train.steps, config.train.batch_size = 3000, 64
    config.train.eval_every, config.train.sample_every = 1000, 1000
    config.sample.guidance = 1.5
    return config
