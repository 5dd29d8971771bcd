"""The same arrays for both: channels last for ours, before the rows for torch."""

import numpy as np


def drawn(*shape, seed=0):
    """Normals, ours and theirs (channels before rows)."""
    import torch

    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x, torch.from_numpy(np.moveaxis(x, -1, -3).copy())


def close(ours, wanted, rtol=2e-4):
    """Equal but for `rtol` of the largest number of theirs."""
    wanted = wanted.detach().permute(0, 2, 3, 1).numpy()
    assert np.isfinite(wanted).all()
    assert wanted.std() > 0.05
    np.testing.assert_allclose(np.asarray(ours), wanted, rtol=0, atol=rtol * np.abs(wanted).max())
