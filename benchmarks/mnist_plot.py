"""Table and plot of what `benchmarks/mnist.sh FOLDER` measured: `python benchmarks/mnist_plot.py FOLDER PLOT.png`."""

import json
import pathlib
import sys

import matplotlib.pyplot as plt

BOUND, ODE = "by the bound", "by the probability-flow ODE"


def scores(folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Of each setting, lowest bound first."""
    found = {
        path.parent.name: json.loads(path.read_text()) | json.loads(path.with_name("ode.json").read_text())
        for path in folder.glob("*/bound.json")
        if path.with_name("ode.json").exists()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["bits_per_dim"]))


def main(folder: str, out: str) -> None:
    found = scores(pathlib.Path(folder))
    names = list(found)
    print("| setting | bound, bits/dim | with label | ODE, bits/dim | with label | labels right |")
    print("|---|---|---|---|---|---|")
    keys = ("bits_per_dim", "bits_per_dim_labelled", "ode_bits_per_dim", "ode_bits_per_dim_labelled")
    for name, row in found.items():
        cells = [f"{row[key]:.3f} ± {row[f'{key}_error']:.3f}" for key in keys]
        print(f"| {name} | {' | '.join(cells)} | {row['label_accuracy']:.1%} |")
    figure, (bits, labels) = plt.subplots(1, 2, figsize=(10, 0.4 * len(names) + 1.5), sharey=True, layout="constrained")
    for key, marker, label in ((keys[0], "o", BOUND), (keys[2], "D", ODE)):
        values, errors = ([row[k] for row in found.values()] for k in (key, f"{key}_error"))
        bits.errorbar(values, names, xerr=errors, fmt=marker, label=label, capsize=3, linestyle="none")
    bits.set_xlabel("test bits per dimension, without label")
    bits.legend()
    labels.barh(names, [100 * row["label_accuracy"] for row in found.values()], color="C2")
    labels.set_xlabel("samples given their own label by an SVC, %")
    labels.set_xlim(0, 100)
    bits.invert_yaxis()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
