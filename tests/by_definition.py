"""What a bound must cost, by the definition of a reverse process: NumPy alone, nothing of the library's formulas.

The corruption of one site is a `Forward`: matrices from their definition. `Enumerated` makes from it the law's own
marginals p_t and the KL from the true reverse process to the model's,

    KL(p_1 || prior) + integral over t of E sum_i sum_{y != x_i} [R log(R / R_model) - R + R_model]
                     + E KL(p(x_0 | x_low) || product over sites of the decoder),
    R = R_t(y -> x_i) p_t(x with y at i) / p_t(x),

which is NELBO - H for any denoiser. Of a chain it is the KL of trajectories, all of them enumerated.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import scipy.linalg

from ddjax.fixtures.categorical import all_states

# -- corruption of one site, by definition ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Forward:
    """`matrix(t)` = Q_{t|0}, (states, states), and its generator `rate(t)`: off the diagonal, rows from, columns to."""

    matrix: Callable[[float], np.ndarray]
    rate: Callable[[float], np.ndarray] | None = None


def slope(f, t):
    """df/dt by a complex step: exact to rounding, for f written with functions that take complex numbers."""
    return np.imag(f(t + 1e-30j)) / 1e-30


def linear(t):
    return 1.0 - t


def cosine(t):
    return 2.0 * np.sin(np.pi / 4 * (1.0 - t)) ** 2


def mixture(alpha, noise):
    """A symbol survives with alpha(t); noise(t) is a vector over all states. `Mixture`'s definition."""

    def rate(t):
        into = slope(noise, t) - slope(alpha, t) / alpha(t) * noise(t)
        return np.tile(into, (len(into), 1))

    return Forward(lambda t: alpha(t) * np.eye(len(noise(t))) + noise(t)[None, :], rate)


def fixed(alpha, pi):
    """Noise of one shape."""
    return mixture(alpha, lambda t: (1.0 - alpha(t)) * np.asarray(pi))


def hybrid(symbols, share):
    """GIDD: odds of data, mask and a random symbol 1 - t : t : c_t, c_t = 2p / (1 - p) sqrt(t (1 - t))."""
    odds = lambda t: 2 * share / (1 - share) * np.sqrt(t) * np.sqrt(1 - t)
    noise = lambda t: np.append(np.full(symbols, 1 / symbols) * odds(t), t) / (1 + odds(t))
    return mixture(lambda t: (1 - t) / (1 + odds(t)), noise)


def by_symbol(alphas):
    """alphas(t): survival of each symbol; the lost are masks."""

    def matrix(t):
        alpha = alphas(t)
        lost = np.append(1 - alpha, 1.0)[:, None] * np.eye(len(alpha) + 1)[-1]
        return np.diag(np.append(alpha, 0.0)) + lost

    def rate(t):
        return np.append(-slope(alphas, t) / alphas(t), 0.0)[:, None] * np.eye(len(alphas(t)) + 1)[-1]

    return Forward(matrix, rate)


def kernel(alpha, rates, absorb=0.0):
    """The exponential of the rates, by SciPy; with a mask, the share `absorb` of the rate leads there."""
    full = (1 - absorb) * np.asarray(rates)
    if absorb:
        full = np.pad(full, (0, 1))
        full[:-1, -1] = absorb
        full[:-1, :-1] -= absorb * np.eye(len(full) - 1)
    return Forward(
        lambda t: scipy.linalg.expm(-np.log(max(alpha(t), 1e-30)) * full), lambda t: -slope(alpha, t) / alpha(t) * full
    )


def thinning(alpha, symbols):
    """Each individual survives with alpha: binomial numbers, and deaths one at a time."""

    def matrix(t):
        a = alpha(t)
        return np.array(
            [[math.comb(x, y) * a**y * (1 - a) ** max(x - y, 0) for y in range(symbols)] for x in range(symbols)]
        )

    return Forward(matrix, lambda t: np.diag(np.arange(1.0, symbols), -1) * -slope(alpha, t) / alpha(t))


def in_window(forward, start, stop):
    """The same on a clock that runs from start to stop."""
    own = lambda t: min(max((t - start) / (stop - start), 0.0), 1.0)
    inside = lambda t: forward.rate(own(t)) / (stop - start) if start < t < stop else 0.0 * forward.matrix(0.5)
    return Forward(lambda t: forward.matrix(own(t)), inside)


def products(matrices):
    """A chain in discrete time: the product of the first t T matrices."""
    return Forward(
        lambda t: functools.reduce(np.matmul, matrices[: round(t * len(matrices))], np.eye(len(matrices[0])))
    )


# -- the KL ----------------------------------------------------------------------------------------------------


class Enumerated:
    """A law corrupted by a `Forward` at each site, and a denoiser that is the exact one with its logits moved.

    base: "posterior" or "cavity", the law whose logits are moved. moved: `(configurations, sites, symbols)`.
    poisson: the decoder draws x_0 - x_low from Poisson laws with the predicted means, not from the posterior.
    """

    def __init__(self, law, forwards, base, moved, poisson=False):
        self.law, self.k, self.forwards = law, law.symbols, forwards
        self.base, self.moved, self.poisson = base, moved, poisson
        self.states = len(forwards[0].matrix(0.5))
        self.clean, self.noisy = all_states(law.sites, self.k), all_states(law.sites, self.states)
        self.p = np.exp(np.asarray(law.log_p, np.float64))

    def neighbours(self, i):
        """The index of each noisy state with each symbol in the place of site i, `(noisy, states)`."""
        power = self.states ** (self.law.sites - 1 - i)
        return np.arange(len(self.noisy))[:, None] + power * (np.arange(self.states) - self.noisy[:, [i]])

    def at(self, t):
        """q of each site; p(x_0, x_t), `(clean, noisy)`; at each site what is predicted, and it as a posterior."""
        q = [f.matrix(t)[: self.k] for f in self.forwards]
        sites = [q[i][self.clean[:, i][:, None], self.noisy[:, i][None]] for i in range(self.law.sites)]
        joint = self.p[:, None] * np.prod(sites, axis=0)
        predicted, posterior = [], []
        for i in range(self.law.sites):
            others = np.prod([1.0 + 0.0 * joint, *(s for j, s in enumerate(sites) if j != i)], axis=0)
            evidence = joint if self.base == "posterior" else self.p[:, None] * others
            law = np.stack([evidence[self.clean[:, i] == k].sum(0) for k in range(self.k)], -1)
            law = normalised(law * np.exp(self.moved[:, i]))
            predicted.append(law)
            posterior.append(law if self.base == "posterior" else normalised(law * q[i][:, self.noisy[:, i]].T))
        return q, joint, predicted, posterior

    def ratios(self, i, q, predicted):
        """The model's q_t(y) / q_t(x_t) at site i, `(noisy, states)`: a cavity plugged in, or a posterior's mean."""
        here = q[:, self.noisy[:, i]].T  # (noisy, symbols)
        if self.base == "posterior":
            return divide(predicted, here) @ q
        return divide(predicted @ q, (predicted * here).sum(-1, keepdims=True))

    def true_ratios(self, t):
        """p_t(x with y at i) / p_t(x), `(noisy, sites, states)`."""
        p = self.at(t)[1].sum(0)
        return np.stack([divide(p[self.neighbours(i)], p[:, None]) for i in range(self.law.sites)], 1)

    def path(self, t, ratios=None):
        """E sum of R log(R / R_model) - R + R_model at t. ratios: of another model, `(noisy, sites, states)`."""
        q, joint, predicted, _ = self.at(t)
        p, total = joint.sum(0), 0.0
        for i in range(self.law.sites):
            into = self.forwards[i].rate(t).T[self.noisy[:, i]]  # (noisy, states y): R_t(y -> x_i)
            moves = (np.arange(self.states) != self.noisy[:, [i]]) & (into > 0) & (p > 0)[:, None]
            true = p[self.neighbours(i)] / np.where(p > 0, p, 1)[:, None]
            model = self.ratios(i, q[i], predicted[i]) if ratios is None else ratios[:, i]
            total += np.sum(p[:, None] * np.where(moves, into * bregman(true, np.where(moves, model, 1)), 0))
        return total

    def prior(self, q):
        """The product over sites of the noised law of uniform data."""
        return functools.reduce(np.multiply.outer, [m.mean(0) for m in q]).ravel()

    def start(self):
        """KL(p_1 || the prior, the noised law of uniform data)."""
        q, joint, *_ = self.at(1.0)
        return np.sum(kl(joint.sum(0), self.prior(q)))

    def decoder(self, low):
        """E -log of the decoder, less the entropy of x_0 given x_low."""
        _, joint, _, posterior = self.at(low)
        total = np.sum(xlogx(joint)) - np.sum(xlogx(joint.sum(0)))
        for i in range(self.law.sites):
            p = posterior[i].T[self.clean[:, i]]
            if self.poisson:
                dead = np.maximum(self.clean[:, [i]] - self.noisy[:, i], 0)
                mean = posterior[i] @ np.arange(self.k) - self.noisy[:, i]
                p = np.exp(-mean) * np.maximum(mean, 0) ** dead / np.vectorize(math.factorial)(dead)
            total -= np.sum(np.where(joint > 0, joint * np.log(np.where(joint > 0, p, 1)), 0))
        return total

    def step(self, s, t):
        """The model's p(x_s | x_t), `(noisy at s, noisy at t)`: Bayes' rule with the predicted law in x_0's place."""
        q, _, predicted, _ = self.at(t)
        sites = []
        for i, forward in enumerate(self.forwards):
            before = forward.matrix(s)
            q_s = before[: self.k]
            between = np.linalg.lstsq(before, forward.matrix(t), rcond=None)[0]  # Q_{t|s}, rows x_s
            here = q[i][:, self.noisy[:, i]].T
            law = predicted[i]
            if self.base == "posterior":
                law = divide(law, here)
            sites.append(normalised((law @ q_s) * between[:, self.noisy[:, i]].T))  # (noisy, x_s)
        return np.prod([sites[i].T[self.noisy[:, i]] for i in range(self.law.sites)], axis=0)

    def between(self, s, t):
        """Q_{t|s} of whole states, `(noisy at s, noisy at t)`."""
        steps = [np.linalg.lstsq(f.matrix(s), f.matrix(t), rcond=None)[0] for f in self.forwards]
        sites = [m[self.noisy[:, i][:, None], self.noisy[:, i][None]] for i, m in enumerate(steps)]
        return np.maximum(np.prod(sites, axis=0), 0)

    def ends_given_data(self, low, high=1.0):
        """E KL(q(x_high | x_0) || prior) and E -log of the decoder: what a bound adds to its diffusion term."""
        q, joint, *_ = self.at(high)
        _, at_low, *_ = self.at(low)
        prior = np.sum(kl(joint, self.p[:, None] * self.prior(q)))
        return prior, self.decoder(low) + np.sum(xlogx(at_low.sum(0))) - np.sum(xlogx(at_low))

    def gap(self, low, breaks=(), ratios=None):
        """NELBO - H in continuous time. breaks: times at which the integrand has a corner."""
        nodes = tanh_sinh([low, *breaks, 1.0])
        path = sum(w * self.path(t, None if ratios is None else ratios(t)) for t, w in nodes)
        return self.start() + path + self.decoder(low)

    def chain_gap(self, times):
        """KL(q(x_0, ..., x_1) || p), which is NELBO - H: every trajectory on the grid."""
        first, index = times[-2], self.clean @ self.states ** np.arange(self.law.sites - 1, -1, -1)
        true = self.p[:, None] * self.between(0.0, first)[index]  # (x_0, x_s)
        model = self.step(0.0, first)[index]
        for s, t in itertools.pairwise(times[-2::-1]):
            true = true[..., None] * self.between(s, t)
            model = model[..., None] * self.step(s, t)
        q = [f.matrix(times[0])[: self.k] for f in self.forwards]
        return np.sum(kl(true, model * self.prior(q)))


def tanh_sinh(edges, h=0.08, most=3.7):
    """Nodes and weights between each two edges, whatever (integrable) the integrand does there."""
    x = np.arange(-most, most + h / 2, h)
    for a, b in itertools.pairwise(edges):
        # The distance from the nearer edge, without cancellation.
        from_edge = (b - a) / (1 + np.exp(np.pi * np.sinh(np.abs(x))))
        t = np.where(x < 0, a + from_edge, b - from_edge)
        weights = (b - a) * h * np.pi / 4 * np.cosh(x) / np.cosh(np.pi / 2 * np.sinh(x)) ** 2
        yield from ((t, w) for t, w in zip(t.tolist(), weights.tolist(), strict=True) if a < t < b)


def bregman(true, model):
    """true log(true / model) - true + model."""
    positive = true > 0
    logs = np.log(np.where(positive, true, 1)) - np.log(np.where(positive, np.maximum(model, 1e-300), 1))
    return true * logs - true + model


def divide(a, b):
    """a / b, 0 where b is."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), 0)


def normalised(p):
    return divide(p, p.sum(-1, keepdims=True))


def xlogx(p):
    return p * np.log(np.where(p > 0, p, 1))


def kl(p, q):
    return np.where(p > 1e-15, p * (np.log(np.where(p > 0, p, 1)) - np.log(np.maximum(q, 1e-300))), 0)
