"""Which blocks of a U-Net are scanned, and that a scan changes nothing (the rest: test_all_networks)."""

import functools

import jax
import numpy as np
import pytest

from ddjax.denoisers import (
    EDM2,
    DiffiT,
    UNet,
    UNetDesign,
    freeu,
    functional_init,
    stack_blocks,
    taps,
    unstack_blocks,
)

NARROW = UNetDesign(groups=4)
SMALL = {"shape": (8, 8, 2), "width": 8, "multipliers": (1, 2), "blocks": 3, "attend_at": (4,), "num_classes": 3}


def made(scan, kind=UNet, **options):
    options = {**SMALL, **({"design": NARROW} if kind is UNet else {}), **options}
    return functional_init(lambda rngs: kind(**options, scan=scan, rngs=rngs))


@functools.cache
def names(kind=UNet, **options):
    shapes = jax.eval_shape(made(True, kind, **options)[0], jax.random.key(0))
    return {part: sorted(shapes[part], key=lambda n: int(n.split("-")[0])) for part in shapes if part in PARTS}


PARTS = ("encoder", "middle", "decoder")


def inputs(batch=3):
    rng = np.random.default_rng(1)
    xt = rng.normal(size=(batch, 8, 8, 2)).astype(np.float32)
    return xt, rng.uniform(size=batch).astype(np.float32), rng.integers(0, 3, batch, np.int32)


def test_equal_neighbours_are_scanned():
    """By hand: 8 features, then 16 with attention; the skips are 8, 3 x 8, 8 (down), 3 x 16."""
    up = ["0-2", "3", "4", "5", "6-8"]  # 16 + 16; 16 + 8 (down); up; 16 + 8; 8 + 8
    assert names() == {"encoder": ["0-2", "3", "4", "5-6"], "middle": ["0", "1"], "decoder": up}


@pytest.mark.slow
def test_which_are_equal_in_other_networks():
    plain = {"design": UNetDesign(groups=4, middle_attention=False), "multipliers": (1, 1), "attend_at": ()}
    assert names(**plain) == {"encoder": ["0-2", "3", "4-6"], "middle": ["0-1"], "decoder": ["0-3", "4", "5-8"]}
    assert names(design="vdm", width=32, multipliers=(1,), attend_at=()) == {
        "encoder": ["0-2"], "middle": ["0", "1"], "decoder": ["0-3"],
    }  # fmt: skip
    assert names(EDM2, head_width=8) == names()
    # DiffiT's last block of a resolution alone gives a skip connection, and the first one on the way up has it.
    options = {"blocks": 4, "heads": 2, "attend_at": None}
    found = {k: v for k, v in {**SMALL, **options}.items() if v is not None}
    shapes = jax.eval_shape(
        functional_init(lambda rngs: DiffiT(**found, scan=True, rngs=rngs))[0], jax.random.key(0)
    )  # fmt: skip
    assert set(shapes["encoder"]) == {"0-2", "3", "4", "5-8"}
    assert set(shapes["decoder"]) == {"0-3", "4", "5", "6-8"}


def test_equal_sums_of_other_parts_are_not_equal_blocks():
    """16 + 8 features and 8 + 16 are as many: the kernels have one shape, and what goes round another."""
    options = {"multipliers": (2, 1, 2), "blocks": 1, "attend_at": ()}
    with pytest.raises(ValueError, match="no two neighbouring blocks"):
        made(True, **options)
    shapes = jax.eval_shape(made(False, **options)[0], jax.random.key(0))["decoder"]
    assert jax.tree.map(np.shape, shapes["3"]) == jax.tree.map(np.shape, shapes["4"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"design": "ncsn++", "width": 16}, {"kind": EDM2, "head_width": 8}])
def test_dropout_and_weights_are_the_same(jit, options):
    (init, plain), (scan_init, scanned) = (made(s, **options, dropout=0.3, remat=s) for s in (False, True))
    first, stacked = (jit(f)(jax.random.key(3)) for f in (init, scan_init))
    like = jax.eval_shape(scan_init, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(first, like), stacked)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), first)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), first)
    call = lambda f: jit(lambda p: f(p, *inputs(), rng=jax.random.key(5), train=True))
    out, wanted = call(scanned)(stack_blocks(params, like)), call(plain)(params)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    still = jit(lambda p: plain(p, *inputs()))(params)
    assert np.abs(still - wanted).max() > 1e-2  # dropout acts


@pytest.mark.slow
def test_taps_of_scanned_blocks_are_refused():
    init, apply = made(True)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0)))
    refused = pytest.raises(ValueError, match="blocks are scanned; build the network with scan=False")
    for name in ("encoder/0", "encoder/3", "decoder/7/attention", "skip/0", "backbone/2"):
        with refused, taps.record(name):
            apply(params, *inputs())
    with pytest.raises(ValueError, match="scan=False"), taps.override(freeu(blocks=3)):
        apply(params, *inputs())
    with taps.record("condition", "middle/0", "final") as seen:
        apply(params, *inputs())
    assert seen["middle/0"].shape == (3, 4, 4, 16)


def test_parameters_of_another_network_are_refused():
    few = {"multipliers": (1,), "blocks": 2, "attend_at": ()}
    params, like = (jax.eval_shape(made(s, **few)[0], jax.random.key(0)) for s in (False, True))
    params = jax.tree.map(lambda x: np.zeros(x.shape), params)
    with pytest.raises(ValueError, match="of a U-Net say which blocks are scanned"):
        stack_blocks(params)
    more = jax.eval_shape(made(False, **few | {"blocks": 3})[0], jax.random.key(0))
    with pytest.raises(ValueError, match=r"it has no place for [0-9,]+ of these numbers"):
        stack_blocks(jax.tree.map(lambda x: np.zeros(x.shape), more), like)
    wide = jax.tree.map(lambda x: np.zeros((*x.shape[:-1], 2 * x.shape[-1])), params)
    with pytest.raises(ValueError, match=r"like is of another network: .* here and .* there"):
        stack_blocks(wide, like)
    del params["encoder"]["1"]
    with pytest.raises(ValueError, match="there is no encoder/1 among these parameters"):
        stack_blocks(params, like)
    assert unstack_blocks({"stack": {"blocks": {"0": {"kernel": 1}}}}) == {"stack": {"blocks": {"0": {"kernel": 1}}}}
