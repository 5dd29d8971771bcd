import json

import numpy as np
import pytest

import ddjax
from ddjax.data.describe import describe, differing, from_description


def round_trip(data):
    description = json.loads(json.dumps(describe(data)))
    again = from_description(description)
    assert describe(again) == describe(data) == description
    for name in ("name", "shape", "num_symbols", "num_classes", "is_image"):
        assert getattr(again, name) == getattr(data, name)
    assert len(again) == 0
    with pytest.raises(LookupError, match=r"use ddjax.data.load"):
        again[:1]
    return again


@pytest.mark.parametrize("tokens", [True, False])
def test_images(tokens):
    data = ddjax.data.load("digits", "test", tokens=tokens)
    again, x0 = round_trip(data), data[:5]["x0"]
    np.testing.assert_array_equal(again.to_images(x0), data.to_images(x0))
    if tokens:
        assert again.levels is None
    else:
        assert again.levels.dtype == np.float32
        np.testing.assert_array_equal(again.levels, data.levels)


TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.mark.parametrize("vocabulary", ["bytes", "characters", "text8", "tokenizer"])
def test_text(tmp_path, vocabulary):
    (tmp_path / "a.txt").write_text(TEXT)
    if vocabulary == "tokenizer":
        tokenizers = pytest.importorskip("tokenizers")
        words = {w: i for i, w in enumerate(["[UNK]", *sorted(set(TEXT.split()))])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        vocabulary = str(tmp_path / "words.json")
        tokenizer.save(vocabulary)
    data = ddjax.data.load(tmp_path / "a.txt", "train", length=8, vocabulary=vocabulary)
    again, x0 = round_trip(data), data[:3]["x0"]
    for path in tmp_path.iterdir():
        path.unlink()  # the description needs no file
    assert again.to_text(x0) == data.to_text(x0)
    assert any(word in again.to_text(x0)[0] for word in ("the", "quick"))
    mask = np.full((1, 8), again.num_symbols)
    assert again.to_text(mask) == ["\u2588" * 8]


def test_neither_image_nor_text():
    data = ddjax.data.from_arrays(np.zeros((4, 3)), name="points")
    again = round_trip(data)
    with pytest.raises(ValueError, match="not images"):
        again.to_images(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="not text"):
        again.to_text(np.zeros((4, 3)))


def test_counts_of_symbols_go_along():
    data = ddjax.data.load("digits", "train")
    counted = ddjax.data.count_symbols(data)
    np.testing.assert_array_equal(counted.counts, [(data[:]["x0"] == v).sum() for v in range(17)])
    again = round_trip(counted)
    np.testing.assert_array_equal(again.counts, counted.counts)
    assert ddjax.data.count_symbols(again) is again  # with no items to read
    with pytest.raises(ValueError, match="no symbols to count"):
        ddjax.data.count_symbols(ddjax.data.load("digits", "train", tokens=False))


def test_what_differs_between_descriptions():
    """The name may change and the autoencoder move; its scale is measured, and may round otherwise."""
    one = describe(ddjax.data.load("digits", "train", tokens=False))
    latents = lambda path, scale: {**one, "latents": {"path": path, "scale": scale}}
    assert differing(one, {**one, "name": "moved"}) == []
    assert differing({k: v for k, v in one.items() if k not in ("interval", "conditions", "latents")}, one) == []
    assert differing(latents("a", 0.7), latents("b", 0.70001)) == []
    assert differing(latents("a", 0.7), latents("a", 0.71)) == differing(one, latents("a", 0.7)) == ["latents"]
    assert differing(one, {**one, "num_classes": 3, "conditions": {"vector": [3]}}) == ["conditions", "num_classes"]
