"""Masked diffusion of the installed Python standard library's source, byte by byte. About 10 minutes on two cores."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name, config.data.eval_split = "stdlib", "valid"
    config.data.options = {"length": 256}
    config.denoiser.name = "text"
    config.denoiser.options = {"width": 128, "depth": 4, "heads": 4, "mlp_width": 384, "time": False}
    config.objective.name = "any_order"
    config.optimizer.learning_rate, config.optimizer.weight_decay = 3e-3, 0.01
    config.train.steps, config.train.batch_size = 600, 32
    config.train.eval_every, config.train.sample_every, config.train.checkpoint_every = 300, 300, 150
    config.sample.num, config.sample.steps = 8, 256
    config.eval.num_times, config.eval.batch_size, config.eval.max_examples = 8, 64, 256
    return config
