"""MaskBit's second stage: masked diffusion of the tokens that `benchmarks/maskbit.py tokenise runs/maskbit` writes.

MNIST, 28 x 28, as 7 x 7 sites of two groups of 4 bits, fed as bits. About 10 minutes on two cores.
"""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name, config.data.options = "runs/maskbit/tokens.npz", {"num_symbols": 16}
    config.denoiser.options = {"width": 128, "depth": 4, "heads": 4, "time": False, "bits": 4}
    config.objective.name, config.objective.condition_dropout = "any_order", 0.1
    config.optimizer.learning_rate = 2e-3
    config.train.steps, config.train.batch_size = 3000, 64
    config.sample.guidance, config.sample.steps = 2.0, 49
    return config
