"""Entries that load and save: exact round trips, and a name for everything that does not fit."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddjax.interop import mapping, tensors
from ddjax.interop.mapping import Change, Entry, Fixed, by_heads, convolution, joined, linear, norm, reshaped, taken

HEADS, HEAD, WIDTH = 2, 3, 6
ENTRIES = [
    *linear("out", "proj"),
    *norm("norm", "ln"),
    *convolution("conv", "c", bias=False),
    Entry(
        "qkv/kernel",
        ("q.weight", "k.weight", "v.weight"),
        joined([WIDTH] * 3).then(by_heads(HEADS)).then(mapping.TRANSPOSED),
    ),
    Entry(("gate", "up"), "gate_up", mapping.split([4, 5])),
    Entry("position", "pos", reshaped((1, 4, 2), (8,)).then(taken([3, 1, 0, 2, 7, 6, 5, 4]))),
    Fixed("freq", np.arange(3.0), written=True),
    Fixed("cache"),
]
SHAPES = {
    "out/kernel": (2, 5), "out/bias": (5,), "norm/scale": (4,), "norm/bias": (4,), "conv/kernel": (3, 4, 2, 7),
    "qkv/kernel": (5, 3 * WIDTH), "gate": (4, 2), "up": (5, 2), "position": (8,),
}  # fmt: skip
THEIRS = {
    "proj.weight": (5, 2), "proj.bias": (5,), "ln.weight": (4,), "ln.bias": (4,), "c.weight": (7, 2, 3, 4),
    "q.weight": (WIDTH, 5), "k.weight": (WIDTH, 5), "v.weight": (WIDTH, 5), "gate_up": (9, 2), "pos": (1, 4, 2),
}  # fmt: skip


@pytest.fixture
def theirs():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in THEIRS.items()} | {"freq": np.arange(3.0, dtype="f4")}


def test_ours_are_theirs_and_theirs_ours(theirs):
    params, report = mapping.load(ENTRIES, theirs, SHAPES)
    assert report.whole
    assert report.checked == ("freq",)
    x = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
    np.testing.assert_array_equal(x @ params["out"]["kernel"], x @ theirs["proj.weight"].T)
    assert params["conv"]["kernel"][1, 2, 0, 4] == theirs["c.weight"][4, 0, 1, 2]
    qkv = params["qkv"]["kernel"].reshape(5, HEADS, 3, HEAD)
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(
            qkv[:, :, i].reshape(5, WIDTH), theirs[f"{name}.weight"].T, err_msg="(head, part, feature)"
        )
    np.testing.assert_array_equal(params["up"], theirs["gate_up"][4:])
    np.testing.assert_array_equal(params["position"], theirs["pos"].ravel()[[3, 1, 0, 2, 7, 6, 5, 4]])

    again = mapping.save(ENTRIES, params)
    assert again.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_everything_that_does_not_fit_is_named(theirs):
    del theirs["ln.bias"], theirs["k.weight"]
    theirs |= {"proj.weight": theirs["proj.weight"].T, "extra": np.zeros(2, "f4"), "freq": np.arange(3.0) + 1}
    with pytest.raises(ValueError) as error:
        mapping.load(ENTRIES, theirs, SHAPES)
    for line in (
        "unknown: extra",
        "missing: ln.bias",
        "missing: k.weight",
        "mis-shaped: proj.weight has (2, 5), expected (5, 2)",
        "not the fixed values that the network computes: freq",
    ):
        assert line in str(error.value)
    assert "q.weight" not in str(error.value)

    initial = mapping.nested({path: np.full(shape, 7.0) for path, shape in SHAPES.items()})
    params, report = mapping.load(ENTRIES, theirs, SHAPES, initial=lambda: initial)
    assert (report.unknown, report.missing, report.different) == (("extra",), ("ln.bias", "k.weight"), ("freq",))
    assert (params["norm"]["bias"] == 7).all()
    assert (params["qkv"]["kernel"] == 7).all()
    assert (params["out"]["kernel"] == 7).all()
    np.testing.assert_array_equal(params["norm"]["scale"], theirs["ln.weight"])


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        (ENTRIES[1:], r"without an entry \['out/kernel'\]"),
        ([*ENTRIES, Entry("other", "o")], r"without a parameter \['other'\]"),
        ([*ENTRIES, Entry("gate", "o")], r"named twice \['gate'\]"),
        ([*ENTRIES, Fixed("pos")], r"named twice \['pos'\]"),
    ],
)
def test_entries_are_one_for_each_parameter(theirs, entries, match):
    with pytest.raises(ValueError, match=match):
        mapping.load(entries, theirs, SHAPES)


def test_half_precision_files_and_shards(tmp_path, theirs):
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    low = {n: v.astype(kinds[i % 3]) for i, (n, v) in enumerate(theirs.items())}
    names = sorted(low)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in shards.items():
        save_file({n: low[n] for n in held}, tmp_path / file)
    index = {"weight_map": {n: file for file, held in shards.items() for n in held}}
    (tmp_path / tensors.INDEX[0]).write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"width": 6}')
    read, config, _ = tensors.open_tensors(tmp_path)
    assert config == {"width": 6}
    params, report = mapping.load(ENTRIES, read, SHAPES)
    wanted, _ = mapping.load(ENTRIES, {n: v.astype(np.float32) for n, v in low.items()}, SHAPES)
    assert report.whole
    for path, value in mapping.flat(wanted).items():
        found = mapping.flat(params)[path]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value, err_msg=path)
    small, _ = mapping.load(ENTRIES, read, SHAPES, dtype=jnp.bfloat16)
    assert small["out"]["kernel"].dtype == jnp.bfloat16

    index["weight_map"]["proj.bias"] = "c.safetensors"
    (tmp_path / tensors.INDEX[0]).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the file c\.safetensors"):
        tensors.open_tensors(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    for name in ("DiT-XL-2.pt", "x.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=r"(?s)weights_only=True.*save_file"):
            tensors.open_tensors(tmp_path / name)
        (tmp_path / name).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"(?s)pytorch_model\.bin is a pickle.*save_file"):
        tensors.open_tensors(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        tensors.open_tensors(tmp_path / "broken.safetensors")


def test_integers_are_no_weights(tmp_path):
    save_file({"a": np.zeros(2, np.int64)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="a has dtype I64"):
        tensors.open_tensors(tmp_path / "m.safetensors")[0]["a"]


@pytest.mark.parametrize(
    ("names", "prefix", "aside"),
    [
        (["a.w", "b.w"], "", []),
        (["module.a.w", "module.b.w"], "module.", []),
        (["model.a.w", "model.b.w", "ema.a.w", "ema.b.w", "step.w"], "ema.", ["model.a.w", "model.b.w"]),
        (["a.w", "c.w"], None, []),
    ],
)
def test_prefixes_and_averages(names, prefix, aside):
    assert tensors.prefix_of(names, ["a.w", "b.w"]) == (prefix, aside)


def test_changes_undo_each_other():
    x = np.random.default_rng(0).normal(size=(12, 3))
    for change in (by_heads(2), by_heads(2).then(mapping.TRANSPOSED), taken([2, 0, 1], axis=1), Change(np.exp, np.log)):
        np.testing.assert_allclose(change.save(change.load(x)), x, rtol=1e-12)
