"""An interpolant from a Gaussian source is a Gaussian process: what the solvers of those step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array

from ddjax.predictions import GAUSSIAN_KINDS, Prediction, check_kind
from ddjax.processes.gaussian import Gaussian, X, divide
from ddjax.types import Time, left_broadcast

if TYPE_CHECKING:
    from ddjax.processes.interpolant import Interpolant

# Of two statements the one that says x_0 from noise to data: where beta is 0 x_1 says nothing, nor the noise where
# gamma is.
_TELLING = ("v", "edm", "x0", "velocity", "residual", "score", "x1", "noise")


@dataclasses.dataclass(frozen=True)
class FromSource(Gaussian):
    """The Gaussian process with the marginals of an interpolant from x_1 ~ N(0, s^2), independent of x_0.

    x_t = alpha x_0 + sigma e, sigma e = beta x_1 + gamma z (`schedules.OfPath`). Given x_t and x_0 the normals x_1 and
    z have the means s^2 beta / sigma e and gamma / sigma e: so one statement is enough, and

        velocity  alpha' x_0 + sigma' e       score  -e / sigma

    are those of this process. Predictions are read as the interpolant states them: "noise" is its z, and of a pair what
    is not stated follows from the more telling of the two. What is asked for is a kind of this process: "noise" is e.
    """

    interpolant: Interpolant | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What networks state, and what solvers ask for."""
        return tuple(dict.fromkeys((*self.interpolant.kinds, *GAUSSIAN_KINDS)))

    def convert(self, prediction: Prediction, kind: str, xt: X, t: Time) -> Prediction:
        """An interpolant's prediction as a kind of Gaussian processes. Raises ValueError for unknown kinds."""
        check_kind(kind, GAUSSIAN_KINDS, self)
        if kind != "noise" and kind in (said := self.interpolant.said(prediction, xt)):
            return Prediction(said[kind], kind)
        return Prediction(self._value(kind, *self._x0_and_noise(prediction, xt, t), xt, t), kind)

    def statement(self, name: str, prediction: Prediction, xt: X, t: Time) -> Array:
        """The value of one of the interpolant's statements."""
        if name in GAUSSIAN_KINDS and name != "noise":
            return self.convert(prediction, name, xt, t).value
        if name == "residual":
            return self.statement("x1", prediction, xt, t) - self.statement("x0", prediction, xt, t)
        noise, sigma = self.convert(prediction, "noise", xt, t).value, self._coefficients(xt, t)[1]
        return divide(self._shares(xt, t)[name], sigma) * noise

    def _shares(self, xt: X, t: Time) -> dict[str, Array]:
        """E[x_1] and E[z] over e / sigma."""
        path, t = self.interpolant.schedule, left_broadcast(jnp.asarray(t), xt)
        return {"x1": self.interpolant.source_std**2 * path.beta(t), "noise": path.gamma(t)}

    def _x0_and_noise(self, prediction: Prediction, xt: X, t: Time) -> tuple[X, X]:
        """From what is said: value = p x_0 + q e / sigma, x_t = alpha x_0 + sigma e."""
        said = self.interpolant.said(prediction, xt)
        name = min(said, key=_TELLING.index)
        if name in GAUSSIAN_KINDS and name != "noise":
            return super()._x0_and_noise(Prediction(said[name], name), xt, t)
        alpha, sigma, _ = self._coefficients(xt, t)
        p, q = (-1.0, self._shares(xt, t)["x1"]) if name == "residual" else (0.0, self._shares(xt, t)[name])
        det, value = alpha * q - p * sigma**2, said[name]
        # Where nothing is said, the state is data if there are any in it.
        x0, noise = divide(xt, alpha), jnp.where(alpha == 0, divide(xt, sigma), 0.0)
        some = jnp.where(det == 0, 1.0, det)
        return (
            jnp.where(det == 0, x0, (q * xt - sigma**2 * value) / some),
            jnp.where(det == 0, noise, sigma * (alpha * value - p * xt) / some),
        )
