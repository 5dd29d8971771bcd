"""EDM on the digits as images in [-1, 1], with a U-Net (DDPM++ as Karras et al. 2022 have it, small)."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.tokens = False
    config.process.name, config.process.schedule, config.process.data_std = "gaussian", "edm", 0.75
    config.denoiser.name, config.denoiser.kind = "unet", "edm"
    config.denoiser.options = {
        "design": "ddpm++", "width": 32, "multipliers": (1, 2), "blocks": 1, "attend_at": (4,), "time_scale": 1.0,
    }  # fmt: skip
    config.objective.name = "gaussian"
    config.objective.options = {"density": "log_normal_sigma", "mean": -1.2, "std": 1.2}
    config.optimizer.learning_rate = 2e-3
    config.train.steps, config.train.batch_size = 1000, 64
    config.train.eval_every, config.train.sample_every = 1000, 1000
    config.sample.solver, config.sample.grid, config.sample.steps = "heun", "karras", 18
    config.sample.guidance = 1.5
    return config
