"""A number and two symbols of different alphabets, drawn together: every posterior is known by enumeration.

p(a, b) is any table over 3 x 2 symbols, x given both a normal. Formulas are written again here, in NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked, Product, Uniform
from ddjax.schedules import Cosine, Linear, VPCosine

P = np.array([[0.3, 0.05], [0.1, 0.25], [0.05, 0.25]])  # of a, b
MEAN = np.array([[-1.0, 0.2], [0.5, -0.3], [1.2, 0.8]])
STD = 0.4
# Numbers by cosines, one alphabet by uniform noise and another by masks, each at its own pace.
PROCESS = Product({"x": Gaussian(VPCosine(s=0.0)), "a": Uniform(3, Cosine()), "b": Masked(2, Linear())})
KIND = "x0+posterior"


def entropy():
    return -(P * np.log(P)).sum() + 0.5 * np.log(2 * np.pi * np.e * STD**2)


def transition(name, s, t):
    """Q_{t|s} of one symbol, `(from, to)`, written out."""
    schedule = PROCESS[name].schedule
    keep = float(schedule.alpha(jnp.asarray(t)) / schedule.alpha(jnp.asarray(s)))
    if name == "a":
        return keep * np.eye(3) + (1 - keep) / 3
    masks = np.zeros((3, 3))
    masks[:, 2] = 1.0
    return keep * np.eye(3) + (1 - keep) * masks


def posterior(xp, xt, alpha, sigma, q_a, q_b):
    """p(a), p(b), E[x] given all noised parts, `(batch, .)`; q: `(batch, symbols)`, likelihoods of what was seen."""
    p, mean = (xp.asarray(v, xt.dtype) for v in (P, MEAN))
    var = (alpha**2 * STD**2 + sigma**2)[:, None, None]
    off = xt[:, None, None] - alpha[:, None, None] * mean
    w = p * xp.exp(-0.5 * off**2 / var) * q_a[:, :, None] * q_b[:, None, :]
    w = w / w.sum((1, 2), keepdims=True)
    x0 = (w * (mean + alpha[:, None, None] * STD**2 / var * off)).sum((1, 2))
    return w.sum(2), w.sum(1), x0


def denoise(xt, t, cond=None):
    """The exact denoiser of the library's contract."""
    x, a, b = (xt[name][:, 0] for name in ("x", "a", "b"))
    schedule = PROCESS["x"].schedule
    keep = PROCESS["a"].schedule.alpha(t)[:, None]
    q_a = keep * (a[:, None] == jnp.arange(3)) + (1 - keep) / 3
    q_b = jnp.where((b == 2)[:, None], 1.0, b[:, None] == jnp.arange(2))  # factors of all symbols left out
    p_a, p_b, x0 = posterior(jnp, x, schedule.alpha(t), schedule.sigma(t), q_a, q_b)
    logs = {"a": jnp.log(jnp.maximum(p_a, 1e-30)), "b": jnp.log(jnp.maximum(p_b, 1e-30))}
    return Prediction({"x": x0[:, None], **{name: v[:, None] for name, v in logs.items()}}, KIND)


def draw(seed, n):
    rng = np.random.default_rng(seed)
    index = rng.choice(6, size=n, p=P.ravel())
    a, b = np.unravel_index(index, P.shape)
    x = MEAN[a, b] + STD * rng.normal(size=n)
    state = {"x": jnp.asarray(x, float), "a": jnp.asarray(a, jnp.int32), "b": jnp.asarray(b, jnp.int32)}
    return jax.tree.map(lambda v: v[:, None], state)


def shape(n):
    return dict.fromkeys(PROCESS.processes, (n, 1))
