"""Training: the state, its step, where it lives, and how it is kept.

Importing this imports neither Orbax nor Grain; `Checkpoints` and `load_ema` import Orbax when they are used.
"""

from ddjax.training.checkpoint import Checkpoints, load_ema
from ddjax.training.export import export_safetensors, load_safetensors
from ddjax.training.manifest import CheckpointError, write_manifest
from ddjax.training.mesh import (
    abstract_state,
    batch_sharding,
    compile_step,
    init_sharded,
    make_mesh,
    shard_batch,
    state_shardings,
)
from ddjax.training.optimizers import adamw, learning_rate_schedule, optimizer
from ddjax.training.state import TrainState, init_state
from ddjax.training.step import Ema, make_train_step, update_ema

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Ema",
    "TrainState",
    "abstract_state",
    "adamw",
    "batch_sharding",
    "compile_step",
    "export_safetensors",
    "init_sharded",
    "init_state",
    "learning_rate_schedule",
    "load_ema",
    "load_safetensors",
    "make_mesh",
    "make_train_step",
    "optimizer",
    "shard_batch",
    "state_shardings",
    "update_ema",
    "write_manifest",
]
