"""Table and plot of what `benchmarks/mnist.sh FOLDER` measured: `python benchmarks/mnist_plot.py FOLDER PLOT.png`."""

import json
import pathlib
import sys

import matplotlib.pyplot as plt

LIKELIHOODS = {"bound": "by the bound", "ode": "by the probability-flow ODE"}


def scores(folder: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
    """Setting -> likelihood -> what `ddjax eval` wrote; lowest bound first."""
    found = {}
    for run in sorted(folder.iterdir()):
        files = {name: run / f"{name}.json" for name in LIKELIHOODS}
        if all(path.exists() for path in files.values()):
            found[run.name] = {name: json.loads(path.read_text()) for name, path in files.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]["bound"]["bits_per_dim"]))


def main(folder: str, out: str) -> None:
    found = scores(pathlib.Path(folder))
    names = list(found)
    print("| setting | bound, bits/dim | with label | ODE, bits/dim | with label | labels right |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        cells = [
            f"{row[by][f'bits_per_dim{label}']:.3f} ± {row[by][f'stderr{label}']:.3f}"
            for by in LIKELIHOODS
            for label in ("", "_labelled")
        ]
        print(f"| {name} | {' | '.join(cells)} | {row['bound']['label_accuracy']:.1%} |")
    figure, (bits, labels) = plt.subplots(1, 2, figsize=(10, 0.4 * len(names) + 1.5), sharey=True, layout="constrained")
    for (by, label), marker in zip(LIKELIHOODS.items(), "oD", strict=True):
        values, errors = ([row[by][key] for row in found.values()] for key in ("bits_per_dim", "stderr"))
        bits.errorbar(values, names, xerr=errors, fmt=marker, label=label, capsize=3)
    bits.set_xlabel("test bits per dimension, without label")
    bits.legend()
    labels.barh(names, [100 * row["bound"]["label_accuracy"] for row in found.values()], color="C2")
    labels.set_xlabel("samples given their own label by an SVC, %")
    labels.set_xlim(0, 100)
    bits.invert_yaxis()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
