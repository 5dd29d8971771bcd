import itertools
from fractions import Fraction

import numpy as np
import pytest

from ddjax import data


def test_unigram_by_hand():
    # n = 4, d = 2, K = 4: p = (3 + 1/2)/6, (1 + 1/2)/6, (1/2)/6, (1/2)/6.
    train, evaluated = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3])
    expected = -np.mean(np.log2([3.5 / 6, 1.5 / 6, 0.5 / 6, 0.5 / 6]))
    assert data.unigram_entropy(train, evaluated, 4) == pytest.approx(expected, rel=1e-12)


def reference(train, evaluated, size):
    """The same rule, in exact fractions and loops."""
    flat = [b for row in train for b in row]
    kinds = len(set(flat))
    uni = [(flat.count(b) + Fraction(kinds, size)) / (len(flat) + kinds) for b in range(size)]
    pairs = [(a, b) for row in train for a, b in itertools.pairwise(row)]

    def pair(a, b):
        after = [y for x, y in pairs if x == a]
        if not after:
            return uni[b]
        return (after.count(b) + len(set(after)) * uni[b]) / Fraction(len(after) + len(set(after)))

    assert sum(uni) == 1
    assert all(sum(pair(a, b) for b in range(size)) == 1 for a in range(size))
    bits = [float(uni[row[0]]) for row in evaluated]
    bits += [float(pair(a, b)) for row in evaluated for a, b in itertools.pairwise(row)]
    return -np.mean(np.log2(bits))


@pytest.mark.parametrize("seed", range(5))
def test_bigram_against_exact_fractions(seed):
    rng = np.random.default_rng(seed)
    train, evaluated = rng.integers(0, 4, (3, 6)), rng.integers(0, 6, (2, 5))
    expected = reference(train.tolist(), evaluated.tolist(), 6)
    assert data.bigram_entropy(train, evaluated, 6) == pytest.approx(expected, rel=1e-12)
    one_row = reference([train.ravel().tolist()], [evaluated.ravel().tolist()], 6)
    assert data.bigram_entropy(train.ravel(), evaluated.ravel(), 6) == pytest.approx(one_row, rel=1e-12)


def test_both_reach_the_entropy_of_a_markov_chain():
    # Stay with probability 7/8: H(next | last) = h(1/8), the marginal is uniform, one bit.
    rng = np.random.default_rng(0)
    chain = (np.cumsum(rng.random(200_000) < 1 / 8) % 2).astype(np.int64)
    rate = -(1 / 8) * np.log2(1 / 8) - (7 / 8) * np.log2(7 / 8)
    assert data.unigram_entropy(chain[:100_000], chain[100_000:], 2) == pytest.approx(1, abs=0.01)
    assert data.bigram_entropy(chain[:100_000], chain[100_000:], 2) == pytest.approx(rate, abs=0.01)


def test_single_symbols_have_no_pairs():
    tokens = np.zeros((3, 1), int)
    assert data.bigram_entropy(tokens, tokens, 2) == data.unigram_entropy(tokens, tokens, 2)


@pytest.mark.parametrize("function", [data.unigram_entropy, data.bigram_entropy])
def test_baseline_errors(function):
    with pytest.raises(ValueError, match=r"tokens: token 5 at index \(1,\) is outside \[0, 4\)"):
        function(np.array([0, 5]), np.array([0]), 4)
    with pytest.raises(ValueError, match="expected tokens, got none"):
        function(np.array([0]), np.array([], int), 4)
