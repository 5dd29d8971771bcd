"""Masked diffusion of tiny Shakespeare's characters, 128 at a time. About 8 minutes on two cores.

The text is at `../shared/data/tinyshakespeare/input.txt` unless `--config.data.name` says otherwise.
"""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name, config.data.eval_split = "../shared/data/tinyshakespeare/input.txt", "valid"
    config.data.options = {"length": 128, "stride": 32, "vocabulary": "characters"}
    config.denoiser.name = "text"
    config.denoiser.options = {"width": 128, "depth": 4, "heads": 4, "mlp_width": 384}
    config.optimizer.learning_rate, config.optimizer.weight_decay = 2e-3, 0.01
    config.train.steps, config.train.batch_size = 1000, 32
    config.train.sample_every, config.train.checkpoint_every = 1000, 500
    config.sample.num, config.sample.steps = 8, 128
    config.eval.num_times, config.eval.batch_size, config.eval.max_examples = 16, 64, 256
    return config
