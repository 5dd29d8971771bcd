"""MaskBit's second stage: masked diffusion of the tokens that `benchmarks/maskbit.py tokenise runs/maskbit` writes.

Scikit-learn's digits, 8 x 8, as 4 x 4 sites of two groups of 4 bits, fed as bits. A few minutes on two cores.
"""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name, config.data.options = "runs/maskbit/tokens.npz", {"num_symbols": 16}
    config.denoiser.options = {"width": 64, "depth": 3, "heads": 4, "time": False, "bits": 4}
    config.objective.name, config.objective.condition_dropout = "any_order", 0.1
    config.optimizer.learning_rate, config.optimizer.weight_decay = 3e-3, 0.01
    config.train.steps, config.train.batch_size = 1000, 64
    config.sample.guidance, config.sample.steps = 2.0, 32
    return config
