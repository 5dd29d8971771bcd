import json
import pickle
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from ddjax import data
from ddjax.data.documents import documents
from ddjax.data.prepare import JOURNAL, prepare_items, prepare_text, verify
from ddjax.data.shards import MANIFEST, Folder, ShardError, read_manifest
from ddjax.data.splits import SPLITS

STORAGES = ("bin", "array_record", "parquet")
TEXTS = [("word " * (7 * i % 40) + f"end {i}") for i in range(60)] + [""]
ALL = {"fractions": (1, 0, 0)}


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture(params=STORAGES)
def storage(request):
    return request.param


def text_of(dataset, count):
    return b"".join(row.astype(np.uint8).tobytes() for row in dataset[:]["x0"])[:count]


def test_documents_come_back(tmp_path, jsonl, storage):
    manifest = prepare_text([jsonl], tmp_path / "out", storage=storage, shard_bytes=1000)
    assert (manifest.items, manifest.tokens) == (60, sum(map(len, TEXTS)))  # the empty one is none
    assert len(manifest.shards) > 3
    assert verify(tmp_path / "out") == []
    whole = "".join(TEXTS).encode()
    joined = data.load(tmp_path / "out", "train", length=16, **ALL)
    assert text_of(joined, len(whole)) == whole[: len(joined) * 16]
    assert joined.vocabulary == data.Bytes()
    overlapping = data.load(tmp_path / "out", "train", length=16, stride=5, **ALL)
    rows = np.array([37, 0, 101])  # across items and shards, in any order
    np.testing.assert_array_equal(overlapping[rows]["x0"], [list(whole[5 * i : 5 * i + 16]) for i in rows])
    parts = [data.load(tmp_path / "out", split, length=4, fractions=(0.5, 0.25, 0.25)) for split in SPLITS]
    cuts = np.cumsum([0, *(sum(map(len, TEXTS[a:b])) for a, b in ((0, 30), (30, 45), (45, 60)))])
    for part, start, stop in zip(parts, cuts, cuts[1:], strict=False):
        assert text_of(part, 10**6) == whole[start : start + (stop - start) // 4 * 4]
    packed = data.load(tmp_path / "out", "train", length=64, pack=True, **ALL)
    batch = pickle.loads(pickle.dumps(packed.source))[np.arange(len(packed))]
    rows = zip(batch["x0"], batch["segments"], strict=True)
    found = [bytes(x[s == k].astype(np.uint8)) for x, s in rows for k in range(1, s.max() + 1)]
    pieces = [text[i : i + 64].encode() for text in TEXTS for i in range(0, len(text), 64)]
    assert sorted(found) == sorted(pieces)
    counts = data.count_symbols(packed).counts
    np.testing.assert_array_equal(counts, np.bincount(list(whole), minlength=256))  # padding is no symbol


def test_items_and_labels_come_back(tmp_path, storage):
    digits = data.load("digits", "train")
    prepare_items(digits, ["digits"], tmp_path / "out", storage=storage, shard_bytes=20_000)
    rows = np.random.default_rng(0).permutation(1500)[:50]
    for tokens in (True, False):
        back = data.load(tmp_path / "out", "train", tokens=tokens, **ALL)
        own = data.load("digits", "train", tokens=tokens)
        for name in ("x0", "cond"):
            np.testing.assert_array_equal(back[rows][name], own[rows][name])
        assert (back.shape, back.num_symbols, back.num_classes) == (own.shape, own.num_symbols, 10)
    thirds = [data.load(tmp_path / "out", split) for split in SPLITS]
    assert [len(part) for part in thirds] == [1350, 75, 75]


def test_images_are_decoded_and_cropped_once(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for i in range(3):
            pillow.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).save(tmp_path / "in" / label / f"{i}.png")
    own = data.load(tmp_path / "in", "train", size=5, **ALL)
    prepare_items(own, [tmp_path / "in"], tmp_path / "out", options={"size": 5})
    back = data.load(tmp_path / "out", "train", **ALL)
    np.testing.assert_array_equal(back[:]["x0"], own[:]["x0"])
    np.testing.assert_array_equal(back[:]["cond"], [0, 0, 0, 1, 1, 1])
    assert back.is_image


def test_a_remote_folder(tmp_path, jsonl):
    whole = "".join(TEXTS).encode()
    memory = fsspec.filesystem("memory")
    for storage in STORAGES:
        prepare_text([jsonl], tmp_path / storage, storage=storage, shard_bytes=1000)
        memory.put(str(tmp_path / storage), f"/{storage}", recursive=True)
        if storage == "array_record":
            with pytest.raises(ValueError, match="ArrayRecord is read from local"):
                data.load(f"memory://{storage}", "train", length=16, **ALL)
            continue
        remote = data.load(f"memory://{storage}", "train", length=16, check="sha256", **ALL)
        assert text_of(remote, len(whole)) == whole[: len(remote) * 16]
        memory.rm(f"/{storage}/00001.{storage}")
        with pytest.raises(ShardError, match=rf"memory://{storage}: the shard 00001\.{storage} is missing"):
            data.load(f"memory://{storage}", "train", length=16)
        if storage == "bin":  # fetched by ranges, again and again
            with pytest.raises(ShardError, match=r"00001\.bin cannot be read"):
                remote[:]
    with pytest.raises(ValueError, match="shards are written to a local folder"):
        prepare_text([jsonl], "memory://x")


def test_parquet_files_of_others_in_a_remote_folder(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    memory, tokens = fsspec.filesystem("memory"), np.arange(80).reshape(20, 4) % 7
    for k in range(4):
        with memory.open(f"/tables/part-{k}.parquet", "wb") as file:
            parquet.write_table(arrow.table({"ids": tokens[5 * k : 5 * k + 5].tolist()}), file, row_group_size=2)
    options = {"columns": "ids", "num_symbols": 7, **ALL}
    for url in ("memory://tables", "memory://tables/*.parquet"):
        found = data.load(url, "train", **options)
        np.testing.assert_array_equal(found[:]["x0"], tokens)
        np.testing.assert_array_equal(found[np.array([19, 0, 7])]["x0"], tokens[[19, 0, 7]])
    one = data.load("memory://tables/part-2.parquet", "train", **options)
    np.testing.assert_array_equal(one[:]["x0"], tokens[10:15])
    for k in range(4):
        memory.get(f"/tables/part-{k}.parquet", str(tmp_path / f"part-{k}.parquet"))
    local = pickle.loads(pickle.dumps(data.load(tmp_path, "train", **options).source))
    np.testing.assert_array_equal(local[np.arange(20)]["x0"], tokens)
    parquet.write_table(arrow.table({"other": [1]}), tmp_path / "part-9.parquet")
    with pytest.raises(ValueError, match=r"part-9\.parquet: its columns are not those of"):
        data.load(tmp_path, "train", **options)
    with pytest.raises(FileNotFoundError, match="no such Parquet files"):
        data.load("memory://nowhere/*.parquet", "train", **options)


@pytest.mark.parametrize("sort", ["file", "line", "paragraph"])
def test_what_a_document_is(tmp_path, sort):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \nthree\n")
    found = [read() for _, read in documents([path], sort)]
    assert (
        found
        == {
            "file": [b"one\ntwo\n\n \nthree\n"],
            "line": [b"one", b"two", b"three"],
            "paragraph": [b"one\ntwo\n", b"three\n"],
        }[sort]
    )


def test_the_vocabulary_is_that_of_the_text_or_of_another_folder(tmp_path):
    (tmp_path / "a.txt").write_text("cabbage\n")
    (tmp_path / "b.txt").write_text("bag\n")
    manifest = prepare_text([tmp_path / "a.txt"], tmp_path / "A", vocabulary="characters", end="e")
    assert manifest.about["vocabulary"]["alphabet"] == "\nabceg"
    assert manifest.about["num_symbols"] == 6
    train = data.load(tmp_path / "A", "train", length=9, **ALL)
    assert train.to_text(train[:]["x0"]) == ["cabbage\ne"]  # with the end token
    prepare_text([tmp_path / "b.txt"], tmp_path / "B", vocabulary=str(tmp_path / "A"))
    assert data.load(tmp_path / "B", "train", length=4, **ALL)[:]["x0"].tolist() == [[2, 1, 5, 0]]
    with pytest.raises(ValueError, match="--end 'ab' must be one token of the vocabulary, and is 2"):
        prepare_text([tmp_path / "a.txt"], tmp_path / "C", vocabulary="characters", end="ab")
    with pytest.raises(ValueError, match="must be one token"):  # the same error when it is run again
        prepare_text([tmp_path / "a.txt"], tmp_path / "C", vocabulary="characters", end="ab")


def test_a_tokenizer_of_many_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(300)} | {"<end>": 300}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("w299 w1\nw2\n")
    options = {"vocabulary": str(tmp_path / "t.json"), "document": "line", "end": "<end>"}
    assert prepare_text([tmp_path / "a.txt"], tmp_path / "A", **options).about["dtype"] == "uint16"
    train = data.load(tmp_path / "A", "train", length=5, **ALL)
    assert train[:]["x0"].tolist() == [[299, 1, 300, 2, 300]]
    assert train.num_symbols == 301


class _Killed(Exception):
    pass


def test_an_interrupted_folder_is_finished_and_is_the_same(tmp_path, jsonl, storage):
    options = {"storage": storage, "shard_bytes": 500}
    whole = prepare_text([jsonl], tmp_path / "whole", **options)
    out, said = tmp_path / "out", []

    def stop(line):
        said.append(line)
        if len(said) in (2, 4):
            raise _Killed

    for _ in range(2):
        with pytest.raises(_Killed):
            prepare_text([jsonl], out, **options, say=stop)
        assert not (out / MANIFEST).exists()
        with pytest.raises(FileNotFoundError, match="`ddjax data prepare` has not made it, or not finished"):
            data.load(out, "train")
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    (out / f"00007.{storage}.99.tmp").write_bytes(b"half")  # of a process that was killed
    (out / f"00003.{storage}").write_bytes(b"renamed, and not yet in the journal")
    del stamps[f"00003.{storage}"], stamps["00003.lengths"]
    prepare_text([jsonl], out, **options, say=said.append)
    assert "3 of which were there" in said[-1]
    assert (out / MANIFEST).read_bytes() == (tmp_path / "whole" / MANIFEST).read_bytes()
    assert verify(out) == []
    assert not list(out.glob("*.tmp"))
    assert not (out / JOURNAL).exists()
    assert read_manifest(Folder(str(out))).shards == whole.shards
    assert len(stamps) == 6
    for name, stamp in stamps.items():
        assert (out / name).stat().st_mtime_ns == stamp


def test_a_finished_folder_is_mended(tmp_path, jsonl, storage):
    out, options, said = tmp_path / "out", {"storage": storage, "shard_bytes": 500}, []
    prepare_text([jsonl], out, **options)
    before = (out / MANIFEST).read_bytes()
    (out / f"00002.{storage}").unlink()
    content = bytearray((out / f"00004.{storage}").read_bytes())
    content[len(content) // 2] ^= 1
    (out / f"00004.{storage}").write_bytes(content)
    (out / "00001.lengths").write_bytes(b"")
    assert [line.removeprefix(f"{out}/") for line in verify(out)] == [
        "00001.lengths has 0 bytes and should have " + str((read_manifest(Folder(str(out))).shards[1].items) * 4),
        f"00002.{storage} is missing",
        f"00004.{storage} has the right size but another content (sha256 differs)",
    ]
    prepare_text([jsonl], out, **options, say=said.append)
    assert verify(out) == []
    assert (out / MANIFEST).read_bytes() == before
    assert len(said) == 4  # three shards and the end
    # What changed in the input, though its size did not, is no repair.
    jsonl.write_text(jsonl.read_text().replace("end 1", "END 1"))
    (out / f"00000.{storage}").unlink()
    with pytest.raises(ValueError, match=rf"the shard 00000\.{storage} is not what it was when it was first made"):
        prepare_text([jsonl], out, **options)


def test_other_options_are_refused(tmp_path, jsonl):
    out = tmp_path / "out"
    prepare_text([jsonl], out)
    with pytest.raises(ValueError, match=r"prepared by other options or from other input \(field: 'text' -> 'id'\)"):
        prepare_text([jsonl], out, field="id")
    with jsonl.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"from other input \(bytes: \d+ -> \d+; listing: "):
        prepare_text([jsonl], out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and was not prepared \(mine\.txt is in it\)"):
        prepare_text([jsonl], tmp_path / "full")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no text under 'words', it has text, id: give --field"):
        prepare_text([jsonl], tmp_path / "words", field="words")
    jsonl.write_text("{}\n[")
    with pytest.raises(ValueError, match=r"line 1: no text under 'text', it has : give --field"):
        prepare_text([jsonl], tmp_path / "none")
    jsonl.write_text("\n")
    with pytest.raises(ValueError, match="the input is empty"):
        prepare_text([jsonl], tmp_path / "empty")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_shard_that_goes_missing_or_bad_is_named(tmp_path, jsonl, storage):
    out, options = tmp_path / "out", {"length": 16, "stride": 1, **ALL}
    prepare_text([jsonl], out, storage=storage, shard_bytes=500)
    name = rf"00002\.{storage}"
    train = data.load(out, "train", **options)
    batches = data.batches(train, batch_size=64, seed=0, prefetch=2)
    next(batches)
    path = out / f"00002.{storage}"
    content = path.read_bytes()
    path.unlink()  # during training
    with pytest.raises(ShardError, match=rf"out: the shard {name} is missing: restore it from a copy, or run the same"):
        list(zip(batches, range(50), strict=False))
    path.write_bytes(content[:-8])
    size = len(content)
    with pytest.raises(ShardError, match=rf"the shard {name} has {size - 8} bytes and should have {size}"):
        train[:]
    with pytest.raises(ShardError, match=name):  # at the start
        data.load(out, "train", **options)
    path.write_bytes(content)
    train[:]
    flipped(path)
    with pytest.raises(ShardError, match=rf"the shard {name} has the right size but another content"):
        data.load(out, "train", check="sha256", **options)
    if storage != "bin":  # these have checksums of their own
        with pytest.raises(ShardError, match=rf"the shard {name} cannot be read"):
            data.load(out, "train", **options)[:]
    with pytest.raises(ValueError, match="check must be one of sizes, sha256, got 'all'"):
        data.load(out, "train", check="all", **options)
    (out / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of `ddjax data prepare` \('format'\)"):
        data.load(out, "train", **options)


def test_folders_of_their_own_for_each_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split:8}" * 10)
        prepare_text([tmp_path / f"{split}.txt"], tmp_path / "out" / split)
    train, test = (data.load(tmp_path / "out", split, length=8) for split in ("train", "test"))
    assert train.to_text(train[:1]["x0"]) == ["train   "]
    assert (len(test), test.to_text(test[:1]["x0"])) == (10, ["test    "])
    with pytest.raises(ValueError, match="has no 'valid' split, only train and test; valid_fraction=f"):
        data.load(tmp_path / "out", "valid", length=8)
    with pytest.raises(ValueError, match="has its own splits"):
        data.load(tmp_path / "out", "train", length=8, **ALL)
    for options, message in (
        ({"align": 2}, "align=2 is for packed documents"),
        ({"pack": True, "stride": 2}, "packed windows do not overlap"),
        ({"tokens": False}, "has no continuous form"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(tmp_path / "out", "train", length=8, **options)


def test_a_run_goes_on_with_the_same_data_only(tmp_path):
    states = []
    for name, text in (("a", "abcd"), ("b", "abce")):
        (tmp_path / f"{name}.txt").write_text(text * 10)
        prepare_text([tmp_path / f"{name}.txt"], tmp_path / name)
        batches = data.batches(data.load(tmp_path / name, "train", length=4, **ALL), batch_size=2, seed=0)
        states.append(batches.get_state())
    with pytest.raises(ValueError, match="the state is of a data iterator with data="):
        batches.set_state(states[0])


@pytest.mark.slow
def test_a_command_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(60_000)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ddjax", "data", "prepare", str(text), "--document", "line", "--vocabulary"]
    command += ["characters", "--shard-size", "0.02", "--storage", "array_record", "--out", str(out)]
    shards = -1
    for kill in range(40):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if len(list(out.glob("*.array_record"))) > shards + 1 and kill < 12:
                process.kill()
        assert process.wait() in (0, -9)
        if process.returncode == 0:
            break
        shards = len(list(out.glob("*.array_record")))
    assert kill >= 3
    whole = prepare_text([text], tmp_path / "whole", document="line", vocabulary="characters",
                         storage="array_record", shard_bytes=int(0.02 * 2**20))  # fmt: skip
    assert read_manifest(Folder(str(out))).shards == whole.shards
    assert verify(out) == []
