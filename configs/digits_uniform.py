"""Uniform-noise diffusion of the digits. Trained on the bound, its network predicts cavities."""

from ddjax.config import default


def get_config():
    config = default()
    config.process.name = "uniform"
    config.denoiser.kind = "cavity"
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4}
    config.objective.condition_dropout = 0.2
    config.optimizer.learning_rate, config.optimizer.weight_decay = 2e-3, 0.01
    config.train.steps, config.train.batch_size = 2000, 64
    config.train.eval_every, config.train.sample_every = 1000, 1000
    config.sample.guidance = 1.5
    return config
