"""The probability-flow ODE with steps as long as its errors allow."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddjax.likelihood import integrators
from ddjax.processes.flow import Flow
from ddjax.solvers.base import Info


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """RK45 on the probability-flow ODE, on the device (Song et al. 2021, section 4.3, there SciPy's on the host).

    Each step of the grid is integrated by diffrax with as many steps of its own as each example needs, which does not
    depend on its neighbours; a grid [1, 0] will do. The ODE is in the coordinates and along the position of
    `process.flow()`, in which it is regular at t = 1 and where there is no noise: the angle between data and noise for
    Gaussian processes.

    process: any with `flow`; `AdaptiveGaussian`, given its latent in `cond["z"]`, too.
    rtol, atol, max_steps, method: as in `likelihood.Adaptive`; "Dopri5" is RK45. In float32 tolerances below 1e-6 are
        not reached.
    Predictions must say what the ODE is at the ends of the grid: one of the noise does not where alpha = 0, nor one of
    x0 where sigma = 0. The errors of a start there are those of the smallest steps; v, edm and velocity have none.
    `Info.nfe` counts every evaluation of each example, those of rejected steps too. (A batch runs as long as its
    slowest example.)
    Raises ValueError for a process without such an ODE, and as `likelihood.Adaptive` does; ImportError, at the first
    step, where diffrax is not installed.
    """

    process: Any
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 4096
    method: str = "Dopri5"

    def __post_init__(self):
        latents = getattr(self.process, "latents", None)
        if latents is None:
            fits = hasattr(self.process, "flow")
        else:  # of which a new one is drawn at each step, where they have no density
            fits = hasattr(latents(1), "log_prob")
        if not fits:
            raise ValueError(f"{type(self.process).__name__} has no probability-flow ODE (`flow`): use Ancestral")
        self._integrator  # noqa: B018 (checks the numbers)

    @property
    def _integrator(self) -> integrators.Adaptive:
        return integrators.Adaptive(self.rtol, self.atol, self.max_steps, self.method)

    def _flow(self, cond: Any) -> Flow:
        process = self.process
        return (process.given(cond["z"]) if hasattr(process, "latents") else process).flow()

    def init(self, xt, cond=None):
        """Nothing to carry."""
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """As many evaluations as each example needs."""
        ends = [jnp.broadcast_to(jnp.asarray(v, xt.dtype), xt.shape[:1]) for v in (t, s)]

        def slope(y, position, args):
            t, s, cond = args
            flow = self._flow(cond)
            time = jnp.clip(flow.time(position), s[0], t[0])
            return flow.slope(denoise(flow.leave(y, time), time[None], cond), y, time)

        def enter(x, t, s, cond):
            flow = self._flow(jax.tree.map(lambda a: a[None], cond))
            return flow.enter(x[None], t)[0][0], flow.position(t), flow.position(s)

        def leave(y, s, cond):
            return self._flow(jax.tree.map(lambda a: a[None], cond)).leave(y[None], s)[0]

        y, start, stop = jax.vmap(enter)(xt, *ends, cond)
        y, made = self._integrator.between(slope, y, start, stop, (*ends, cond))
        return jax.vmap(leave)(y, ends[1], cond), carry, Info(made)
