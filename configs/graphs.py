"""DiGress on community graphs of 12 to 20 nodes: edges by marginal noise, a graph transformer told the sizes."""

from ddjax.config import default


def get_config():
    config = default()
    config.data.name = "../shared/data/graphs/community_small.npz"
    config.process.name = "product"
    config.process.options = {"symbols": "marginal", "symbols_schedule": "cosine"}
    config.denoiser.name = "graph"
    config.denoiser.options = {"width": 64, "edge_width": 32, "global_width": 32, "depth": 4, "eigenvectors": True}
    config.objective.name = "digress"
    config.train.steps, config.train.batch_size = 5000, 32
    config.sample.num, config.sample.steps = 20, 500
    return config
