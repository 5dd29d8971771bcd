"""MaskBit on digits: a tokeniser of bits, and masked diffusion on its tokens.

    python benchmarks/maskbit.py tokenise runs/maskbit
    ddjax train --config configs/digits_maskbit.py --workdir runs/maskbit/model
    python benchmarks/maskbit.py decode runs/maskbit

The first writes tokeniser.safetensors, tokens.npz and reconstructions.png (an image above what its tokens say of it),
the last samples.png: ten of each digit, a row each. For MNIST: `--data ../shared/data/mnist/mnist.npz`, `--halvings 2`
for the first.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

import ddjax
from ddjax import autoencoders, data
from ddjax.autoencoders import Autoencoder, LookupFree
from ddjax.data import png
from ddjax.evaluation.labels import label_reader


def tokenise(folder, path, steps, halvings, bits, groups):
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: data.load(path, name, tokens=False) for name in ("train", "test")}
    autoencoder = Autoencoder(splits["train"].shape, width=16, halvings=halvings, quantiser=LookupFree(bits, groups))

    def report(step, metrics):
        print(step, " ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)

    params = autoencoders.train(jax.random.key(0), autoencoder, splits["train"], steps=steps, report=report)
    autoencoders.save(folder / "tokeniser.safetensors", autoencoder, params)
    tokens = {name: autoencoders.tokenise(autoencoder, params, split) for name, split in splits.items()}
    labels = {f"y_{name}": split[:]["cond"] for name, split in splits.items()}
    np.savez_compressed(folder / "tokens.npz", **{f"x_{name}": t for name, t in tokens.items()}, **labels)

    test, codes = splits["test"], tokens["test"] @ (2 ** (bits // groups)) ** np.arange(groups)
    x, again = test[:256]["x0"], np.asarray(autoencoder.from_tokens(params, tokens["test"][:256]))
    mean = splits["train"][:]["x0"].mean(axis=0)
    print(f"mean squared error on 256 test images {np.mean((again - x) ** 2):.4f}, of the mean image "
          f"{np.mean((mean - x) ** 2):.4f}; {len(np.unique(codes))} of {2**bits} codes in use")  # fmt: skip
    pairs = np.concatenate([x[:40].reshape(4, 10, *test.shape), again[:40].reshape(4, 10, *test.shape)], axis=1)
    picture = png.grid(test.to_images(pairs.reshape(-1, *test.shape)), columns=10, scale=4)
    png.write_png(folder / "reconstructions.png", picture)


def decode(folder, path, each):
    autoencoder, params = autoencoders.load(folder / "tokeniser.safetensors")
    run, train = ddjax.load(folder / "model"), data.load(path, "train", tokens=False)
    labels = np.repeat(np.arange(10, dtype=np.int32), each)
    tokens = run.sample(jax.random.key(0), len(labels), cond=labels)
    images = np.asarray(jax.jit(autoencoder.from_tokens)(params, tokens))
    png.write_png(folder / "samples.png", png.grid(train.to_images(images), columns=each, scale=4))
    items, test = train[:5000], data.load(path, "test", tokens=False)[:1000]
    read = label_reader(items["x0"], items["cond"])
    right = [np.mean(read(x) == y) for x, y in ((images, labels), (test["x0"], test["cond"]))]
    print(f"a classifier gives {right[0]:.1%} of the samples their own label, and {right[1]:.1%} of test images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenise", "decode"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--steps", type=int, default=600, help="of the tokeniser's training")
    parser.add_argument("--halvings", type=int, default=1)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--each", type=int, default=10, help="samples of each digit")
    given = parser.parse_args()
    if given.what == "tokenise":
        tokenise(given.folder, given.data, given.steps, given.halvings, given.bits, given.groups)
    else:
        decode(given.folder, given.data, given.each)
