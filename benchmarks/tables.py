"""TabDDPM's two questions about a run on a table: are its rows useful, and are they copies.

ddjax train --config configs/adult.py --workdir runs/adult
python benchmarks/tables.py runs/adult --target income --test ../shared/data/tabular/adult_test.csv
"""

import argparse

import jax
import numpy as np

import ddjax
from ddjax import data
from ddjax.evaluation import nearest_record_distance, utility
from ddjax.experiment import load_data


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    parser.add_argument("--target", required=True, help="the column that a classifier is to tell")
    parser.add_argument("--test", help="a CSV file of rows held out; default the run's test split")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    run = ddjax.load(args.workdir)
    columns, train = run.data.columns, load_data(run.config, "train")
    cond = columns.labels(np.arange(args.num)) if columns.label else None
    x0 = run.sample(jax.random.key(0), args.num, cond=cond, steps=args.steps, batch_size=2000)
    synthetic = columns.decode(x0, cond)
    items = train[np.arange(min(args.num, len(train)))]
    real = columns.decode(items["x0"], items.get("cond"))
    if args.test is None:
        held = load_data(run.config, "test")[:]
        test = columns.decode(held["x0"], held.get("cond"))
    else:
        test = {name: values for name, values in data.read_csv(args.test).items() if name in columns.names}
    # Alone in its column, each value as often as it is, without a word on the others.
    rng = np.random.default_rng(0)
    apart = {name: rng.permutation(np.asarray(values, object)).tolist() for name, values in real.items()}
    found, mixed = (utility(columns, rows, real, test, args.target) for rows in (synthetic, apart))
    print(f"{found.score}: synthetic {found.synthetic:.3f}, real {found.real:.3f}, shuffled {mixed.synthetic:.3f}")
    distances = [np.median(nearest_record_distance(columns, rows, real)) for rows in (synthetic, test, apart)]
    print(
        "median distance to the nearest real row: synthetic {:.3f}, held out {:.3f}, shuffled {:.3f}".format(*distances)
    )


if __name__ == "__main__":
    main()
