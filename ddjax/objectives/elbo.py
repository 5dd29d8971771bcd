"""The evidence lower bound as an objective, for any process that has one."""

from __future__ import annotations

from typing import Any

from ddjax.objectives.base import Objective, noised


def elbo(process: Any, kind: str, *, t_range: tuple[float, float] | None = None) -> Objective:
    """The continuous-time bound's diffusion term, one time per example, nats per site.

    For `Masked` this is MD4's and MDLM's objective (Shi et al. 2024, eq. 5), for `Uniform` UDLM's (Schiff et al. 2024, eq. 18), for
    `Gaussian` VDM's (Kingma et al. 2021, eq. 17). Times are uniform in the process's own coordinate (fraction of lost
    symbols; log-SNR).

    kind: what the network predicts. For `Masked` posterior and cavity are one; a network trained on `Uniform`'s bound as a
        `"cavity"` is one, and must be sampled as one.
    t_range: times to integrate; default `process.t_range`.
    """
    low_high = process.t_range if t_range is None else t_range
    return noised(process, kind, lambda u: process.time_at(u, low_high), process.path_kl)
