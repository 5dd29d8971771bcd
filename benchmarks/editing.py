"""Edit labelled images of a trained run to another label by each kind of inversion: what comes back, what is read.

    python benchmarks/editing.py RUN [--num 40] [--steps 50] [--out folder]

For each way prints the round-trip error under the items' own labels, how many edits a classifier fitted on the training
data gives the new label, and how far edits are from their originals (root mean square of a site; of tokens the
fraction of sites that differ), beside fresh samples of the new label. Writes a picture for each: originals,
reconstructions, edits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

import ddjax
from ddjax import editing, inversion
from ddjax.evaluation import label_reader
from ddjax.experiment import load_data
from ddjax.training.loop import levels

REAL = {
    "path": {},
    "path, start 0.7": {"start": 0.7},
    "independent": {"independent": True},
    "independent, start 0.7": {"independent": True, "start": 0.7},
    "ODE (DDIM), naive": {"solver": "ddim", "iterations": 0},
    "ODE (DDIM), 8 fixed points": {"solver": "ddim", "iterations": 8},
    "ODE (DDIM), 8 fixed points, start 0.7": {"solver": "ddim", "iterations": 8, "start": 0.7},
    "DDIM eta 0.5": {"solver": "ddim", "solver_options": {"eta": 0.5}},
}
TOKENS = {
    "gumbel": {},
    "gumbel, start 0.7": {"start": 0.7},
    "logit, lambda 0.02, 0.98": {"residual": "logit", "lambda_1": 0.02, "lambda_2": 0.98},
    "logit, lambda 0.1, 0.9": {"residual": "logit", "lambda_1": 0.1, "lambda_2": 0.9},
    "independent, gumbel": {"independent": True},
    "independent, gumbel, start 0.7": {"independent": True, "start": 0.7},
}


def main() -> None:
    """Run all ways on one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--num", type=int, default=40, help="items of the test split (default: 40)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default: 50)")
    parser.add_argument("--guidance", type=float, help="of the edits (default: the config's)")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    run, num = ddjax.load(arguments.run), arguments.num
    train = load_data(run.config, "train")
    seen, items = train[np.arange(min(len(train), 2000))], load_data(run.config, "test")[np.arange(num)]
    x0, own = items["x0"], items["cond"]
    new = (own + 3) % run.data.num_classes

    read = label_reader(levels(run.data, seen["x0"]), seen["cond"])

    def judge(x, labels):
        return np.mean(read(levels(run.data, np.asarray(x))) == labels)

    def far(x):
        return float(np.mean(inversion.round_trip_error(x0, x)))

    key, ways = jax.random.key(0), dict(TOKENS if run.process.state == "categorical" else REAL)
    print(
        f"{arguments.run}, step {run.step}: {num} items, {arguments.steps} steps; originals read {judge(x0, own):.0%}"
    )
    fresh = run.sample(key, num, cond=new, steps=arguments.steps, guidance=arguments.guidance)
    print(f"fresh samples: new label {judge(fresh, new):.0%}, distance {far(fresh):.3f}", flush=True)
    for name, options in ways.items():
        weights = {n: options[n] for n in ("lambda_1", "lambda_2") if n in options}
        options = {n: v for n, v in options.items() if n not in weights}
        made = run.record(key, x0, cond=own, steps=arguments.steps, **options)
        again = run.edit(jax.random.key(1), made, cond=own, guidance=1.0)
        changed = run.edit(jax.random.key(2), made, cond=new, guidance=arguments.guidance, **weights)
        error = np.asarray(inversion.round_trip_error(x0, again))
        print(
            f"{name}: round trip {error.mean():.2g} (at most {error.max():.2g}), new label {judge(changed, new):.0%}, "
            f"distance {far(changed):.3f}",
            flush=True,
        )
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            first = {"original": x0[:16], "again": np.asarray(again[:16]), "edit": np.asarray(changed[:16])}
            path = arguments.out / (name.replace(",", "").replace(" ", "_") + ".png")
            editing.write_images(run.data, first, path)


if __name__ == "__main__":
    main()
