"""Sequential Monte Carlo around a sampler."""

from ddjax.particles.weights import effective_sample_size, log_mean, resample, systematic

__all__ = ["effective_sample_size", "log_mean", "resample", "systematic"]
