"""DDPM's "simple" loss on MNIST, 16 x 16, as images in [-1, 1]; what benchmarks/mnist.sh varies."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name = "../shared/data/mnist/mnist.npz"
    config.data.tokens, config.data.options = False, {"size": 16}
    config.process.name, config.process.schedule = "gaussian", "vp_linear"
    config.denoiser.kind = "noise"
    config.denoiser.options = {"width": 96, "depth": 3, "heads": 4, "patch": 2}
    config.objective.name = "gaussian"
    config.optimizer.learning_rate = 2e-3
    config.train.steps, config.train.batch_size = 800, 64
    config.train.eval_every, config.train.sample_every = 0, 800
    config.eval.max_examples, config.eval.num_times = 500, 16
    config.sample.solver, config.sample.steps, config.sample.guidance = "heun", 24, 1.5
    return config
