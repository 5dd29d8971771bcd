"""Data: sources, their splits, and a Grain pipeline with exact epochs and exact resume.

    train = ddjax.data.load("digits", "train")
    for batch in ddjax.data.batches(train, batch_size=128, seed=0):  # {"x0": ..., "cond": ...}
        ...

Importing this imports neither Grain nor any optional package.
"""

from ddjax.data.ahead import Ahead
from ddjax.data.arrays import from_arrays
from ddjax.data.baselines import bigram_entropy, unigram_entropy
from ddjax.data.beside import by_class, in_condition, mislabelled
from ddjax.data.columns import Columns, read_csv, write_csv
from ddjax.data.conditions import conditioned, smaller
from ddjax.data.dataset import Dataset, Source, count_symbols
from ddjax.data.encoded import Latents, encoded, scale_of
from ddjax.data.mixing import mixed
from ddjax.data.noisy import noisy
from ddjax.data.pipeline import Batches, batches, epoch
from ddjax.data.png import grid, write_png
from ddjax.data.registry import load
from ddjax.data.rescaled import rescaled
from ddjax.data.shards import ShardError
from ddjax.data.transport import Transported
from ddjax.data.vocabulary import Bytes, Characters, Subwords, text8

__all__ = [
    "Ahead",
    "Batches",
    "Bytes",
    "Characters",
    "Columns",
    "Dataset",
    "Latents",
    "ShardError",
    "Source",
    "Subwords",
    "Transported",
    "batches",
    "bigram_entropy",
    "by_class",
    "conditioned",
    "count_symbols",
    "encoded",
    "epoch",
    "from_arrays",
    "grid",
    "in_condition",
    "load",
    "mislabelled",
    "mixed",
    "noisy",
    "read_csv",
    "rescaled",
    "scale_of",
    "smaller",
    "text8",
    "unigram_entropy",
    "write_csv",
    "write_png",
]
