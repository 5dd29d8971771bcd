"""What a count of symbols or of pairs achieves: numbers that a text model must beat.

Both are proper code lengths: the probabilities come from the training text alone, sum to 1 and are never
zero. Counts are interpolated with the next lower order by Witten and Bell's rule (IEEE Trans. Inf. Theory
37(4), 1991, method C): having seen `n` symbols of `d` different kinds, the next is of a kind not yet seen
with probability d / (n + d). Nothing is tuned.
"""

from __future__ import annotations

import numpy as np

from ddjax.data.sources import check_tokens


def unigram_entropy(tokens_train: np.ndarray, tokens_eval: np.ndarray, num_symbols: int) -> float:
    """The cross-entropy of text under the frequencies of the training text, bits per symbol.

    p(b) = (count(b) + d / num_symbols) / (n + d).

    Args:
        tokens_train: integers in `[0, num_symbols)`, of any shape.
        tokens_eval: the same; what is coded.
        num_symbols: how many symbols there are.

    Raises:
        ValueError: no tokens, or tokens out of range.
    """
    train, evaluated = (_rows(tokens, num_symbols) for tokens in (tokens_train, tokens_eval))
    return float(-np.log2(_unigram(train, num_symbols)[evaluated]).mean())


def bigram_entropy(tokens_train: np.ndarray, tokens_eval: np.ndarray, num_symbols: int) -> float:
    """The cross-entropy of text under the pairs of the training text, bits per symbol.

    p(b | a) = (count(ab) + d(a) p(b)) / (count(a.) + d(a)), with d(a) the kinds of symbol seen after a
    and p(b) the unigram's; after an `a` never seen, p(b).

    Args:
        tokens_train: integers in `[0, num_symbols)`: one text `(n,)`, or windows `(rows, length)`.
        tokens_eval: the same. A row's first symbol has no context and is coded by its frequency, so for
            windows the number is comparable with a model's on the same windows.
        num_symbols: how many symbols there are.

    Raises:
        ValueError: no tokens, or tokens out of range.
    """
    train, evaluated = (_rows(tokens, num_symbols) for tokens in (tokens_train, tokens_eval))
    unigram = _unigram(train, num_symbols)
    # Pairs are one integer each, counted by sorting: a table of num_symbols ** 2 may not fit.
    pairs, counts = np.unique(train[:, :-1] * num_symbols + train[:, 1:], return_counts=True)
    context = pairs // max(num_symbols, 1)
    seen = np.bincount(context, weights=counts, minlength=num_symbols)
    kinds = np.bincount(context, minlength=num_symbols)
    before, after = evaluated[:, :-1].ravel(), evaluated[:, 1:].ravel()
    wanted = before * num_symbols + after
    count = np.zeros(len(wanted))
    if len(pairs):
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        count = np.where(pairs[place] == wanted, counts[place], 0)
    total = seen[before] + kinds[before]
    back_off = unigram[after]
    pair = np.where(total > 0, (count + kinds[before] * back_off) / np.maximum(total, 1), back_off)
    bits = -np.log2(unigram[evaluated[:, 0]]).sum() - np.log2(pair).sum()
    return float(bits / evaluated.size)


def _unigram(train: np.ndarray, num_symbols: int) -> np.ndarray:
    counts = np.bincount(train.ravel(), minlength=num_symbols)
    kinds = np.count_nonzero(counts)
    return (counts + kinds / num_symbols) / (train.size + kinds)


def _rows(tokens: np.ndarray, num_symbols: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        raise ValueError("expected tokens, got none")
    check_tokens(tokens, num_symbols, "tokens")
    tokens = tokens.astype(np.int64)
    return tokens[None] if tokens.ndim == 1 else tokens.reshape(len(tokens), -1)
