"""Several documents in a window: the network says of each what it says of it alone; nothing of one reaches another."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import TextTransformer, layers

LENGTH = 10
SMALL = {"length": LENGTH, "symbols_in": 5, "symbols_out": 4, "width": 8, "depth": 2, "heads": 2}
RNG = np.random.default_rng(3)
X0, XT = (RNG.integers(0, n, (2, LENGTH), np.int32) for n in (4, 5))
# Two rows: documents of 4, 4 and two sites of padding; of 2, 4 and 4. All begin at multiples of two.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]], np.int32)
# Where the documents of a length lie: rows (documents,) and sites (documents, length); padding is one, too.
DOCUMENTS = (
    (np.array([0, 0, 1, 1]), np.array([[0], [4], [2], [6]]) + np.arange(4)),
    (np.array([0, 1]), np.array([[8], [0]]) + np.arange(2)),
)


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"block": 2, "scan": True}, marks=pytest.mark.slow),
        pytest.param({"block": 2, "clean": True}, marks=pytest.mark.slow),
        pytest.param({"num_classes": 3, "remat": True}, marks=pytest.mark.slow),
    ],
    ids=lambda config: "-".join(config),
)
def test_a_packed_document_has_the_logits_that_it_has_alone(x64, build, config):
    clean = config.pop("clean", False)
    labels = np.array([2, 0], np.int32) if "num_classes" in config else None
    run, params = build(
        lambda rngs: TextTransformer(**SMALL, time="num_classes" in config, dtype=jnp.float64, **config, rngs=rngs)
    )
    t = np.array([0.3, 0.8])

    def shown(cond, x0):
        return {"clean": x0, "cond": cond} if clean else cond

    packed = run(params, XT, t, shown({"segments": SEGMENTS, "cond": labels}, X0))
    assert np.abs(packed - run(params, XT, t, shown(labels, X0))).max() > 1e-3  # without segments they are mixed up
    for row, sites in DOCUMENTS:
        own = None if labels is None else labels[row]
        alone = run(params, XT[row[:, None], sites], t[row], shown(own, X0[row[:, None], sites]))
        np.testing.assert_allclose(packed[row[:, None], sites], alone, atol=1e-5 if labels is not None else 1e-10)


def test_nothing_of_a_document_reaches_another(x64, build):
    run, params = build(lambda rngs: TextTransformer(**SMALL, time=False, dtype=jnp.float64, rngs=rngs))
    t, cond = np.array([0.3, 0.8]), {"segments": SEGMENTS, "cond": None}
    before, first = run(params, XT, t, cond), SEGMENTS == 1
    after = run(params, np.where(first, (XT + 1) % 5, XT), t, cond)
    np.testing.assert_array_equal((before != after).any(-1), first)


def test_positions_count_from_the_start_of_each():
    layout = layers.attention.within(jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(layout.positions, [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]])


def test_segments_must_fit(build):
    run, params = build(lambda rngs: TextTransformer(**SMALL, time=False, rngs=rngs))
    with pytest.raises(ValueError, match=r'cond\["segments"\] has shape \(2, 9\), int32; expected an int for each'):
        run(params, XT, None, {"segments": SEGMENTS[:, :9]})
