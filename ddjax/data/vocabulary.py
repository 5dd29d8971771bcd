"""Vocabularies: bytes, characters, text8's 27 symbols, a Hugging Face tokenizer."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from ddjax.data.dataset import require

BLOCK = "\u2588"  # what a token outside the vocabulary, such as a mask, is shown as
_TEXT8 = " abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Every byte is a token: 256 symbols, any file."""

    num_symbols: int = 256

    def prepare(self, raw: bytes, name: str) -> bytes:
        """A file's content in the form that is cut into splits."""
        return raw

    def encode(self, piece: bytes, name: str) -> np.ndarray:
        """Tokens, uint8."""
        return np.frombuffer(piece, np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        """Text; bytes that are not UTF-8 show as the replacement character, masks as a block."""
        ids = np.asarray(ids)
        inside = (ids >= 0) & (ids < 256)
        return b"".join(bytes([int(k)]) if ok else BLOCK.encode() for k, ok in zip(ids, inside, strict=True)).decode(
            "utf-8", errors="replace"
        )


@dataclasses.dataclass(frozen=True)
class Characters:
    """Every character of an alphabet is a token, numbered in the alphabet's order.

    Attributes:
        alphabet: the distinct characters, or None to learn them: the sorted set of those in the training
            text.
        text8: whether text is first brought to text8's form: lower case, and every run of anything but a
            to z one space.
    """

    alphabet: str | None = None
    text8: bool = False

    def __post_init__(self):
        if self.alphabet is not None and len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError("alphabet: a character is given twice")

    @property
    def num_symbols(self) -> int:
        """How many characters the alphabet has."""
        if self.alphabet is None:
            raise ValueError("the alphabet is not known before the training text is read")
        return len(self.alphabet)

    def learn(self, text: str) -> Characters:
        """The same vocabulary with its alphabet, learnt from the training text where none was given."""
        return self if self.alphabet is not None else Characters("".join(sorted(set(text))), self.text8)

    def prepare(self, raw: bytes, name: str) -> str:
        """A file's content as text.

        Raises:
            ValueError: it is not UTF-8.
        """
        text = _utf8(raw, name)
        return re.sub("[^a-z]+", " ", text.lower()) if self.text8 else text

    def encode(self, piece: str, name: str) -> np.ndarray:
        """Tokens, uint8 or uint32.

        Raises:
            ValueError: a character is not in the alphabet; names it.
        """
        codes = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
        known = np.frombuffer(self.alphabet.encode("utf-32-le"), np.uint32)
        table = np.full(0x110000, -1, np.int32)
        table[known] = np.arange(len(known))
        tokens = table[codes]
        if tokens.size and tokens.min() < 0:
            position = int(np.argmax(tokens < 0))
            raise ValueError(
                f"{name}: character {piece[position]!r} at {position} is not among the {len(known)} of the "
                'training text: use vocabulary="bytes", or Characters(alphabet) with all of them'
            )
        return tokens.astype(np.uint8 if len(known) <= 256 else np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        """Text, masks shown as a block."""
        return "".join(self.alphabet[k] if 0 <= k < len(self.alphabet) else BLOCK for k in np.asarray(ids))


def text8() -> Characters:
    """The 27 symbols of text8: space is 0, a is 1, z is 26."""
    return Characters(_TEXT8, text8=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Subwords:
    """The tokens of a Hugging Face `tokenizers` JSON file; special tokens are never added.

    Attributes:
        path: the JSON file.
        tokenizer: the `tokenizers.Tokenizer` read from it.
    """

    path: Path
    tokenizer: Any = dataclasses.field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Subwords:
        """Reads the JSON file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a tokenizer.
            ImportError: `tokenizers` is not installed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer file")
        tokenizers = require("tokenizers", "text", "a tokenizer JSON file")
        try:
            return cls(path, tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"{path}: not a Hugging Face tokenizer file ({error})") from error

    @property
    def num_symbols(self) -> int:
        """The size of the tokenizer's vocabulary, added tokens included."""
        return self.tokenizer.get_vocab_size()

    @property
    def unknown(self) -> int | None:
        """The token that stands for what the tokenizer lacks; None where it has none."""
        token = getattr(self.tokenizer.model, "unk_token", None)
        return None if token is None else self.tokenizer.token_to_id(token)

    def prepare(self, raw: bytes, name: str) -> str:
        """A file's content as text."""
        return _utf8(raw, name)

    def encode(self, piece: str, name: str) -> np.ndarray:
        """Tokens, uint32."""
        return np.asarray(self.tokenizer.encode(piece, add_special_tokens=False).ids, np.uint32)

    def encode_many(self, pieces: list[str], name: str) -> list[np.ndarray]:
        """Tokens of several texts, on all cores."""
        encoded = self.tokenizer.encode_batch(pieces, add_special_tokens=False)
        return [np.asarray(found.ids, np.uint32) for found in encoded]

    def decode(self, ids: np.ndarray) -> str:
        """Text, special tokens shown by name; runs of tokens outside the vocabulary as blocks."""
        ids = np.asarray(ids)
        inside = (ids >= 0) & (ids < self.num_symbols)
        text, start = "", 0
        cuts = [*(np.flatnonzero(inside[1:] != inside[:-1]) + 1).tolist(), len(ids)]
        for stop in cuts:
            run = ids[start:stop]
            if len(run):
                known = inside[start]
                text += self.tokenizer.decode(run.tolist(), skip_special_tokens=False) if known else BLOCK * len(run)
            start = stop
        return text


def resolve(vocabulary) -> Bytes | Characters | Subwords:
    """A vocabulary from its name in a config: "bytes", "characters", "text8" or a tokenizer's JSON file."""
    if not isinstance(vocabulary, str | Path):
        return vocabulary
    named = {"bytes": Bytes, "characters": Characters, "text8": text8}
    if vocabulary in named:
        return named[vocabulary]()
    if str(vocabulary).endswith(".json"):
        return Subwords.read(vocabulary)
    raise ValueError(f"unknown vocabulary {vocabulary!r}: expected {', '.join(named)} or a tokenizer's .json file")


def _utf8(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f'{name}: not UTF-8 at byte {error.start}: use vocabulary="bytes"') from error
