"""Masked diffusion of scikit-learn's digits: 8x8 pixels of 17 levels, as tokens."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name = "digits"
    config.process.name, config.process.schedule = "masked", "linear"
    config.denoiser.options = dict(width=96, depth=3, heads=4, time=False, dropout=0.0)
    config.objective.name = "any_order"
    config.objective.condition_dropout = 0.1
    config.optimizer.learning_rate, config.optimizer.weight_decay = 3e-3, 0.01
    config.train.steps, config.train.batch_size = 4000, 64
    config.train.eval_every, config.train.sample_every = 1000, 1000
    config.sample.guidance = 1.5
    return config
