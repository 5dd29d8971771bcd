"""TabDDPM on the census rows of Adult (a CSV file): numbers by Gaussian, symbols by multinomial diffusion."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name = "../shared/data/tabular/adult_train.csv"
    config.process.name, config.process.schedule = "product", "vp_cosine"
    config.process.options = {"symbols": "uniform", "symbols_schedule": "cosine"}
    config.denoiser.name, config.denoiser.kind = "mixed_table", "noise+posterior"
    config.denoiser.options = {"width": 128, "hidden": [512, 512]}
    config.objective.name = "tabddpm"
    config.optimizer.learning_rate = 1e-3
    config.train.steps, config.train.batch_size = 20_000, 1024
    config.train.sample_every = 5000
    config.sample.num, config.sample.steps = 1000, 100
    return config
