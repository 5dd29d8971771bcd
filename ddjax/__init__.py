"""ddjax: denoising diffusion on any state space, in JAX.

    process = ddjax.processes.Masked(num_symbols=17)
    denoise = ddjax.bind(apply, params, process, "posterior")
    samples = ddjax.sample(key, denoise, process, shape=(64, 8, 8, 1),
                           solver=ddjax.solvers.Ancestral(process), times=ddjax.grids.uniform(64))

`docs/design.md` explains the words. `ddjax.load(workdir)` gives back a finished training.
"""

import importlib

from ddjax import (
    codebook_files,
    codebooks,
    evolution,
    fixtures,
    gaussian_law,
    grids,
    guidance,
    inversion,
    likelihood,
    objectives,
    particles,
    presets,
    processes,
    random,
    retrieval,
    schedules,
    shaping,
    shifted_times,
    solvers,
    thresholding,
    transport,
)
from ddjax.long import sample_long
from ddjax.parallel import ParallelSample, sample_parallel
from ddjax.predictions import BoundDenoiser, Prediction, bind
from ddjax.retiming import retime
from ddjax.sampling import Observed, sample, stream
from ddjax.types import Bound, Rows, Sample

__version__ = "0.1.0"

# Imported on first use: Flax, Orbax, Grain and the command line cost seconds that the mathematics does not need.
_LAZY = {
    "animation": "ddjax.animation",
    "autoencoders": "ddjax.autoencoders",
    "data": "ddjax.data",
    "denoisers": "ddjax.denoisers",
    "interop": "ddjax.interop",
    "lora": "ddjax.lora",
    "training": "ddjax.training",
}


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    if name in ("load", "Run"):
        return getattr(importlib.import_module("ddjax.run"), name)
    raise AttributeError(f"module 'ddjax' has no attribute {name!r}")


__all__ = [
    "Bound",
    "BoundDenoiser",
    "Observed",
    "ParallelSample",
    "Prediction",
    "Rows",
    "Run",
    "Sample",
    "animation",
    "autoencoders",
    "bind",
    "codebook_files",
    "codebooks",
    "data",
    "denoisers",
    "evolution",
    "fixtures",
    "gaussian_law",
    "grids",
    "guidance",
    "inversion",
    "likelihood",
    "load",
    "objectives",
    "particles",
    "presets",
    "processes",
    "random",
    "retime",
    "retrieval",
    "sample",
    "sample_long",
    "sample_parallel",
    "schedules",
    "shaping",
    "shifted_times",
    "solvers",
    "stream",
    "thresholding",
    "training",
    "transport",
]
