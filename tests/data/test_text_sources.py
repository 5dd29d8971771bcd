import gzip
import json
import lzma
import sys

import numpy as np
import pytest

from ddjax import data
from ddjax.data.vocabulary import BLOCK

TEXT = "".join(f"{i} Größe, the QUICK brown fox? " for i in range(40))
THIRDS = (0.6, 0.2, 0.2)


def all_splits(path, **options):
    return [data.load(path, split, **options) for split in ("train", "valid", "test")]


def joined(part):
    return "".join(part.to_text(part[:]["x0"]))


@pytest.mark.parametrize("pack", ["", ".xz", ".gz"])
def test_bytes_are_cut_by_position(tmp_path, pack):
    path = tmp_path / f"a.txt{pack}"
    raw = TEXT.encode()
    path.write_bytes({"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[pack](raw))
    parts = all_splits(path, length=7, fractions=THIRDS)
    cuts = [0, round(0.6 * len(raw)), round(0.8 * len(raw)), len(raw)]
    for part, start, stop in zip(parts, cuts, cuts[1:], strict=False):
        count = (stop - start) // 7
        assert (len(part), part.num_symbols, part.shape) == (count, 256, (7,))
        x0 = part[:]["x0"]
        assert x0.dtype == np.int32
        assert x0.astype(np.uint8).tobytes() == raw[start : start + 7 * count]
    strided = data.load(path, "train", length=7, stride=1, fractions=THIRDS)
    assert len(strided) == cuts[1] - 6
    assert len(data.load(path, "test", length=7, stride=1, fractions=THIRDS)) == len(parts[2])


def test_characters_are_the_training_texts(tmp_path):
    (tmp_path / "a.txt").write_text("cabbage " * 20, encoding="utf-8")
    parts = all_splits(tmp_path / "a.txt", length=4, vocabulary="characters", fractions=THIRDS)
    assert {part.vocabulary.alphabet for part in parts} == {" abceg"}
    assert parts[0].num_symbols == 6
    np.testing.assert_array_equal(parts[0][:2]["x0"], [[3, 1, 2, 2], [1, 5, 4, 0]])
    assert [joined(part) for part in parts] == ["cabbage " * 12, "cabbage " * 4, "cabbage " * 4]
    assert parts[0].to_text(np.array([[3, 1, 6, 0]])) == [f"ca{BLOCK} "]


def test_an_unknown_character_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 60 + "aaaß" + "a" * 36, encoding="utf-8")
    data.load(tmp_path / "a.txt", "train", length=4, vocabulary="characters", fractions=THIRDS)
    with pytest.raises(ValueError, match=r"a\.txt valid: character 'ß' at 3 is not among the 1 of the training"):
        data.load(tmp_path / "a.txt", "valid", length=4, vocabulary="characters", fractions=THIRDS)
    given = data.Characters("aß")
    assert "ß" in joined(data.load(tmp_path / "a.txt", "valid", length=4, vocabulary=given, fractions=THIRDS))
    with pytest.raises(ValueError, match="a character is given twice"):
        data.Characters("aa")


def test_text8_has_27_symbols(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    part = data.load(tmp_path / "a.txt", "train", length=5, vocabulary="text8", fractions=(1, 0, 0))
    assert part.num_symbols == 27
    clean = " gr e the quick brown fox" * 40
    assert joined(part) == clean[: len(clean) // 5 * 5]
    np.testing.assert_array_equal(part[:1]["x0"], [[0, 7, 18, 0, 5]])


def test_other_files_hold_the_other_splits(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name:8}" * 10)
    options = {"length": 8, "valid_path": tmp_path / "valid.txt"}
    train, valid = (data.load(tmp_path / "train.txt", split, **options) for split in ("train", "valid"))
    assert joined(train) == "train   " * 10
    assert joined(valid) == "valid   " * 10
    with pytest.raises(ValueError, match="has no 'test' split, only train and valid"):
        data.load(tmp_path / "train.txt", "test", **options)
    options = {"length": 8, "test_path": str(tmp_path / "test.txt")}
    with pytest.raises(ValueError, match="has no 'valid' split, only train and test; valid_fraction=f"):
        data.load(tmp_path / "train.txt", "valid", **options)
    parts = all_splits(tmp_path / "train.txt", valid_fraction=0.2, **options)
    assert [joined(part) for part in parts] == ["train   " * 8, "train   " * 2, "test    " * 10]
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such file"):
        data.load(tmp_path / "train.txt", "valid", valid_path=tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="has its own splits"):
        data.load(tmp_path / "train.txt", "train", fractions=THIRDS, **options)


def test_a_folder_is_joined_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("two")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "c.py").write_text("three")
    (tmp_path / "c.o").write_text("not text")
    part = data.load(tmp_path, "train", length=13, fractions=(1, 0, 0))
    assert joined(part) == "one\ntwo\nthree"
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text(name)
    assert joined(data.load(tmp_path, "test", length=4)) == "test"
    assert joined(data.load(tmp_path, "train", length=5)) == "train"


def test_text_errors(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xff" * 20)
    with pytest.raises(ValueError, match=r'a\.txt: not UTF-8 at byte 2: use vocabulary="bytes"'):
        data.load(path, "train", vocabulary="characters")
    with pytest.raises(ValueError, match=r"a\.txt valid: 3 tokens are fewer than one window of length=256"):
        data.load(path, "valid")
    with pytest.raises(ValueError, match=r"unknown vocabulary 'words': expected bytes, characters, text8 or a"):
        data.load(path, "train", vocabulary="words")
    with pytest.raises(ValueError, match=r"a\.txt is text: it has no continuous form"):
        data.load(path, "train", tokens=False)
    with pytest.raises(ValueError, match="use fractions, not valid_fraction"):
        data.load(path, "valid", valid_fraction=0.1)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"split 'train' of 0 items is empty"):
        data.load(path, "train")
    for pack, compress in ((".xz", lzma.compress), (".gz", gzip.compress)):
        broken = tmp_path / f"b.txt{pack}"
        broken.write_bytes(compress(TEXT.encode())[:-9])
        with pytest.raises(ValueError, match=rf"b\.txt\{pack}: cannot be unpacked .*is it complete"):
            data.load(broken, "train")
        broken.write_bytes(b"plain text")
        with pytest.raises(ValueError, match=rf"b\.txt\{pack}: cannot be unpacked"):
            data.load(broken, "train")


def test_hugging_face_tokenizer(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"the": 0, "fox": 1, "runs": 2, "[UNK]": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("the fox runs quickly " * 10)
    options = {"length": 4, "vocabulary": str(tmp_path / "t.json"), "fractions": (1, 0, 0)}
    part = data.load(tmp_path / "a.txt", "train", **options)
    assert part.num_symbols == 4
    np.testing.assert_array_equal(part[:]["x0"], [[0, 1, 2, 3]] * 10)
    assert part.to_text(np.array([[0, 1, 4, 2], [4, 4, 4, 4]])) == [f"the fox{BLOCK}runs", BLOCK * 4]
    (tmp_path / "t.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"t\.json: not a Hugging Face tokenizer file"):
        data.load(tmp_path / "a.txt", "train", **options)
    with pytest.raises(FileNotFoundError, match=r"u\.json: no such tokenizer file"):
        data.load(tmp_path / "a.txt", "train", vocabulary=str(tmp_path / "u.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs tokenizers: pip install 'ddjax\[text\]'"):
        data.load(tmp_path / "a.txt", "train", **options)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_streams_are_memory_mapped(tmp_path, dtype):
    path = tmp_path / "a.bin"
    stream = np.arange(1000) % 300
    stream.astype(dtype).tofile(path)
    parts = all_splits(path, num_symbols=300, dtype=dtype, length=10, fractions=THIRDS)
    assert [len(part) for part in parts] == [60, 20, 20]
    np.testing.assert_array_equal(np.concatenate([part[:]["x0"].ravel() for part in parts]), stream)
    assert isinstance(parts[1].source.tokens, np.memmap)
    assert parts[0].vocabulary is None
    small = data.load(path, "train", num_symbols=299, dtype=dtype, length=10)
    small[:29]
    with pytest.raises(ValueError, match=r"a\.bin train: token 299 at index \(29, 9\) is outside \[0, 299\)"):
        small[np.array([3, 29])]
    options = {"num_symbols": 300, "dtype": dtype, "length": 10, "test_path": path, "valid_fraction": 0.1}
    parts = all_splits(path, **options)
    assert [len(part) for part in parts] == [90, 10, 100]
    np.testing.assert_array_equal(parts[1][:]["x0"].ravel(), stream[900:])


def test_token_stream_errors(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"a\.bin: the option num_symbols must be given"):
        data.load(path, "train")
    with pytest.raises(ValueError, match=r"a\.bin: 3 bytes are not a whole number of uint16 tokens"):
        data.load(path, "train", num_symbols=5)
    with pytest.raises(ValueError, match="dtype must be uint8, uint16 or uint32, got 'int8'"):
        data.load(path, "train", num_symbols=5, dtype="int8")
    assert data.load(path, "train", num_symbols=128, dtype="uint8", length=1, vocabulary="bytes").to_text([[97]])


def test_shared_shakespeare(shared_data):
    path = shared_data / "tinyshakespeare" / "input.txt"
    train, valid = (data.load(path, split, vocabulary="characters") for split in ("train", "valid"))
    assert train.num_symbols == valid.num_symbols == 65
    assert train.to_text(train[:1]["x0"])[0].startswith("First Citizen:\nBefore we proceed")


def test_shared_novels(shared_data):
    path = shared_data / "novels" / "novels_valid.txt.xz"
    # The small file in both places: unpacking the large one takes ten seconds.
    valid = data.load(path, "valid", valid_path=path, vocabulary="text8")
    assert valid.num_symbols == 27
    assert data.unigram_entropy(valid[:]["x0"], valid[:]["x0"], 27) == pytest.approx(4.1, abs=0.1)  # Shannon: 4.03
