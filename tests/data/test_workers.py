"""Worker processes give what one process gives, also after a resume; a bad shard is named by the one that trains."""

import subprocess
import sys

import pytest

SCRIPT = """
import json, pathlib, sys
import numpy as np
from ddjax import data
from ddjax.data.prepare import prepare_text

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    (folder / "a.txt").write_text("".join(f"line {i} of the text\\n" for i in range(900)))
    for storage in sys.argv[2:]:
        out = folder / storage
        prepare_text([folder / "a.txt"], out, storage=storage, document="line", shard_bytes=3000)
        train = data.load(out, "train", length=32, pack=storage == "bin")
        make = lambda **options: data.batches(train, batch_size=8, seed=3, **options)
        plain = [batch for _, batch in zip(range(40), make())]
        batches = make(workers=2, prefetch=2)

        def same(batch, other):
            return batch.keys() == other.keys() and all(np.array_equal(batch[k], other[k]) for k in batch)

        assert all(same(next(batches), plain[step]) for step in range(11))
        state = json.loads(json.dumps(batches.get_state()))
        assert state["next_index"] == 11
        for workers in (0, 1):  # as many as one likes go on from there
            resumed = make(workers=workers, prefetch=1)
            resumed.set_state(state)
            assert all(same(next(resumed), plain[step]) for step in range(11, 30)), workers
        (out / f"00001.{storage}").unlink()
        try:
            for _ in range(60):
                next(batches)
        except data.ShardError as error:
            print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bin", "array_record"])
def test_workers(tmp_path, storage):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), storage]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{tmp_path}/{storage}: the shard 00001.{storage} is missing: restore it"), (
        done.stdout
    )
