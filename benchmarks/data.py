"""The input pipeline against the training step, at named sizes: what a loop waits for its data.

    python benchmarks/data.py --text corpus.txt --images images.npz --out data.json

Prepares the text (as documents, by paragraph or as asked) and the images in each storage, then `ddjax bench data`:
named sizes on a named device are a pause of the time that its FLOPs take at 40 % utilisation, the small ones are real
steps of this machine.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from ddjax import data
from ddjax.bench_data import bench_data
from ddjax.config import load, overridden
from ddjax.data.prepare import prepare_items, prepare_text

CONFIGS = Path(__file__).parents[1] / "configs"
# name: (config, device, length or None, overrides)
XL = "{'width': 1152, 'depth': 28, 'heads': 16, 'patch': 2, 'scan': True, 'dtype': 'bfloat16'}"
SEVEN = "{'width': 4096, 'depth': 32, 'heads': 32, 'scan': True, 'dtype': 'bfloat16'}"
CASES = {
    "MD4, 12 x 768, 256 tokens": ("text8.py", "H100", 256, ["train.batch_size=512"]),
    "text, 7B, 2048 tokens": ("text8.py", "H100", 2048, ["train.batch_size=16", f"denoiser.options={SEVEN}"]),
    "DiT-XL/2, 32 x 32": ("cifar10.py", "H100", None, ["train.batch_size=256", f"denoiser.options={XL}"]),
    "text, 4 x 128, here": ("stdlib_masked.py", None, 256, []),
    "digits-sized DiT on 32 x 32, here": (
        "cifar10.py", None, None,
        ["train.batch_size=16", "denoiser.options={'width': 96, 'depth': 3, 'heads': 4, 'patch': 4}"],
    ),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--document", default="paragraph", help="what a document of the text is (ddjax data prepare)")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--storage", action="append", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    storages, results = arguments.storage or ("bin", "array_record", "parquet"), []
    with tempfile.TemporaryDirectory() as folder:
        images = data.load(arguments.images, "train", tokens=True)
        for storage in storages:
            prepare_text([arguments.text], f"{folder}/text_{storage}", document=arguments.document, storage=storage)
            prepare_items(images, [], f"{folder}/images_{storage}", storage=storage)
        print("| size | step | storage | pipeline / need | wait |\n|---|---|---|---|---|")
        for name, (file, device, length, changes) in CASES.items():
            if arguments.only and not any(word in name for word in arguments.only):
                continue
            for storage in storages:
                place = f"{folder}/{'images' if length is None else 'text'}_{storage}"
                options = {} if length is None else {"length": length, "pack": True}
                config = overridden(load(CONFIGS / file), [f"--config.{change}" for change in changes])
                config = dataclasses.replace(
                    config,
                    data=dataclasses.replace(config.data, name=place, options={**options, "fractions": [1, 0, 0]}),
                )
                found = bench_data(config, steps=arguments.steps, device=device)
                results.append({"size": name, "storage": storage, **found})
                print(
                    f"| {name} | {found['step_s'] * 1e3:.0f} ms, {device or 'this machine'} | {storage} "
                    f"| x{found['pipeline_over_step']:.1f} | {found['wait_share']:.2%} |",
                    flush=True,
                )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
