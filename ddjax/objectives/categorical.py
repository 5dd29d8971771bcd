"""Cross-entropies for mixture processes: what is asked of the network, at which sites.

A site is **corrupted** when its symbol did not survive, though the noise may have drawn the same symbol again. Given
clean and noisy states that has probability 1 - [x_t = x_0] alpha / (alpha + noise(x_t)), which stands here wherever a
paper uses the coin itself: the same expectation, with less variance. At a corrupted site x_t says nothing about x_0, so
what there is to learn is the cavity law; over all sites it is the posterior. Times are uniform on the clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.grids import check_grid
from ddjax.objectives.base import Objective, at_times, noised, on_grid
from ddjax.predictions import Prediction
from ddjax.processes.categorical import cross_entropy as nats
from ddjax.processes.mixture import Mixture, PerSite, Tokens
from ddjax.types import Time, left_broadcast


def cross_entropy(process: Mixture, kind: str = "posterior", *, at: str = "all") -> Objective:
    """The cross-entropy of the clean symbols, unweighted, nats per site; not a bound.

    at: `"all"` sites: -log posterior(x_0), the loss of discrete flow matching (Gat et al. 2024; Campbell et al. 2024)
        and of DiGress (Vignac et al. 2023; its factor for edges is a weight per site). Its optimum is the exact
        posterior. `"corrupted"` sites: P(corrupted | x_0, x_t) times -log cavity(x_0), the loss of DDPD's denoiser (Liu
        et al. 2024). Its optimum is the exact cavity. For `Masked` the two are one, the loss of mask models (Chang et
        al. 2022; Hu & Ommer 2024).
    kind: what the network predicts; it is converted, so its own optimum is exact whichever kind that is.
    Raises ValueError for another `at`.
    """
    if at not in ("all", "corrupted"):
        raise ValueError(f"at must be 'all' or 'corrupted' (sites), got {at!r}")

    def site_loss(x0, prediction, xt, t):
        if at == "all":
            return process.reconstruction(x0, prediction, xt, t)
        return _denoising(process, x0, prediction, xt, t)

    return noised(process, kind, at_times(process, _uniform, site_loss))


def planner(process: Mixture) -> Objective:
    """DDPD's planner: the binary cross-entropy of "this site is corrupted", nats per site (Liu et al. 2024).

    The network predicts a `"planner"`, log odds shaped like the state; the optimum is exact.
    """
    return noised(process, "planner", at_times(process, _uniform, lambda *at: _planning(process, *at)))


def ddpd(process: Mixture, kind: str = "cavity") -> Objective:
    """Planner and denoiser at once: `planner` + `cross_entropy(at="corrupted")` (Liu et al. 2024).

    The network has two heads on the last axis, `(batch, *sites, num_symbols + 1)`: the denoiser's logits, of the given
    kind, then the planner's. Two networks are one such function: `lambda params, *inputs, **options:
    concatenate([denoiser(params["denoiser"], ...), planner(params["planner"], ...)[..., None]], -1)`; nothing couples
    their losses. Raises ValueError (while tracing) for an output of another shape.
    """

    def site_loss(x0, prediction, xt, t):
        value = prediction.value
        if value.shape != (*xt.shape, process.num_symbols + 1):
            raise ValueError(
                f"ddpd needs a denoiser's and a planner's head, an output of shape "
                f"{(*xt.shape, process.num_symbols + 1)}, got {value.shape}"
            )
        where, what = Prediction(value[..., -1], "planner"), Prediction(value[..., :-1], kind)
        return _planning(process, x0, where, xt, t) + _denoising(process, x0, what, xt, t)

    return noised(process, kind, at_times(process, _uniform, site_loss))


def d3pm_hybrid(
    process: Mixture,
    kind: str = "cavity",
    *,
    times: Float[Array, " steps+1"] | Sequence[float],
    ce_weight: float = 1e-3,
) -> Objective:
    """The bound of a chain plus ce_weight times the cross-entropy of the network's logits (Austin et al. 2021, eq. 5).

    As published, the same logits are plugged into the steps' KL (`kind="cavity"`) and read as p(x_0 | x_t) by the
    cross-entropy. Off the absorbing case these are two things, the KL's optimum the cavity and the cross-entropy's the
    posterior, and with ce_weight > 0 the loss has neither as its minimum. With `kind="posterior"` the KL converts, and
    both terms have one optimum; that network must be sampled as a posterior.

    times: a decreasing grid; `steps` of them make the sum that the bound is. ce_weight: of the mean over steps. The
        released code averages the KLs as well, so its 0.001 is 0.001 * steps here.
    Raises ValueError for a kind other than `"cavity"` and `"posterior"`, or a grid that is none.
    """
    if kind not in ("cavity", "posterior"):
        raise ValueError(
            f"d3pm_hybrid reads the network's outputs as logits of x_0: kind must be 'cavity' or 'posterior', "
            f"got {kind!r}"
        )
    chain = on_grid(process, check_grid(times))

    def draw(u, keys, x0):
        xt, t, kl = chain(u, keys, x0)

        def errors(prediction):
            return kl(prediction) + ce_weight * nats(prediction.value, x0)

        return xt, t, errors

    return noised(process, kind, draw)


def p_corrupted(process: Mixture, x0: Tokens, xt: Tokens, t: Time) -> PerSite:
    """P(the symbol did not survive to t | x_0, x_t) at each site."""
    alpha, noise = process.schedule.alpha(left_broadcast(jnp.asarray(t), x0)), process.noise_of(xt, t)
    by_chance = noise / jnp.where(alpha + noise > 0, alpha + noise, 1.0)
    return jnp.where(xt == x0, by_chance, 1.0)


def _uniform(u: Array) -> tuple[Time, Array]:
    return u, jnp.ones_like(u)


def _planning(process, x0, prediction, xt, t):
    logit, p = prediction.value, p_corrupted(process, x0, xt, t)
    if logit.shape != xt.shape:
        raise ValueError(f"a planner's prediction is shaped like the state, {xt.shape}; got {logit.shape}")
    return p * jax.nn.softplus(-logit) + (1.0 - p) * jax.nn.softplus(logit)


def _denoising(process, x0, prediction, xt, t):
    p = p_corrupted(process, x0, xt, t)
    return jnp.where(p > 0, p * nats(process.convert(prediction, "cavity", xt, t).value, x0), 0.0)
