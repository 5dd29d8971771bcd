"""Training on prepared, packed text: a shard that disappears stops it with one line, and it goes on once mended."""

import jax
import numpy as np
import pytest
import tiny

from ddjax.data import ShardError
from ddjax.data.packing import PackedSource
from ddjax.data.prepare import prepare_text
from ddjax.training.loop import train


@pytest.mark.slow
@pytest.mark.parametrize("device_prefetch", [0, 2])
def test_a_shard_that_disappears_costs_nothing_once_it_is_back(tmp_path, monkeypatch, device_prefetch):
    text, shards = tmp_path / "a.txt", tmp_path / "shards"
    text.write_text("".join(f"line {i} of the text\n" * (1 + i % 3) for i in range(300)))

    def prepare():
        prepare_text([text], shards, document="line", shard_bytes=3000)

    prepare()
    config = tiny.config(
        data={"name": str(shards), "options": {"length": 32, "pack": True}},
        denoiser={"name": "text", "options": {"width": 8, "depth": 1, "heads": 2}},
        train={**tiny.BASE["train"], "steps": 6, "eval_every": 6, "sample_every": 0, "prefetch": 0,
               "device_prefetch": device_prefetch},
    )  # fmt: skip
    whole = train(config, tmp_path / "whole", show=False)
    calls, read = [], PackedSource.__getitem__

    def lose(source, index):
        if len(index) == 8:  # a batch, and no look at the first items
            calls.append(None)
            if len(calls) == 5:
                (shards / "00000.bin").unlink()
        return read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(PackedSource, "__getitem__", lose)
        with pytest.raises(
            ShardError, match=r"00000\.bin is missing: .* \(at step 4; the last good checkpoint is step 4\)"
        ):
            train(config, tmp_path / "run", show=False)
    with pytest.raises(ShardError, match=r"00000\.bin is missing"):  # now at the start
        train(config, tmp_path / "run", show=False)
    prepare()
    run = train(config, tmp_path / "run", show=False)
    jax.tree.map(np.testing.assert_array_equal, run.params, whole.params)
