"""A Gaussian process run on the coordinates of an orthonormal basis: one schedule for each frequency.

    x_t = U diag(alpha(t)) U' x_0 + U diag(sigma(t)) U' z

Everything is what the inner process says of U' x. Squared distances and volumes are the same in any orthonormal
basis, so the bound is too; what is nats per site elsewhere is nats per coordinate here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import ArrayLike

from ddjax import schedules
from ddjax.frozen import Frozen
from ddjax.predictions import Prediction
from ddjax.processes.flow import GaussianFlow
from ddjax.processes.gaussian import Gaussian, X
from ddjax.types import Distribution, Keys, PyTree


class Basis(Protocol):
    """An orthonormal change of coordinates, hashable."""

    def forward(self, x: X) -> X:
        """Coordinates of states."""

    def inverse(self, y: X) -> X:
        """States with these coordinates."""


@dataclasses.dataclass(frozen=True)
class DCT:
    """Cosines (type 2, orthonormal) along `axes` of the state, axis 0 being the batch: `DCT((1, 2))` for images."""

    axes: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "axes", tuple(self.axes))
        if not self.axes or min(self.axes) < 1 or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"DCT needs different axes of sites, from 1 on (0 is the batch), got {self.axes}")

    def forward(self, x):
        """Frequencies, the lowest first."""
        for axis in self.axes:
            x = jax.scipy.fft.dct(x, axis=axis, norm="ortho")
        return x

    def inverse(self, y):
        """States with these frequencies."""
        for axis in self.axes:
            y = jax.scipy.fft.idct(y, axis=axis, norm="ortho")
        return y


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """The columns of an orthogonal matrix along the last axis: principal components, for one.

    Raises ValueError for a matrix that is not orthogonal.
    """

    columns: Frozen | ArrayLike

    def __post_init__(self):
        matrix = np.asarray(self.columns, np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Orthogonal needs a square matrix, got shape {matrix.shape}")
        error = np.abs(matrix.T @ matrix - np.eye(len(matrix))).max()
        if not error < 1e-6:
            raise ValueError(f"Orthogonal needs an orthogonal matrix, but U'U is off the identity by {error:.1e}")
        object.__setattr__(self, "columns", Frozen(matrix))

    def forward(self, x):
        """Coordinates."""
        return x @ np.asarray(self.columns, x.dtype)

    def inverse(self, y):
        """States with these coordinates."""
        return y @ np.asarray(self.columns, y.dtype).T


@dataclasses.dataclass(frozen=True)
class Turned:
    """The law of states whose coordinates follow `law`."""

    law: Distribution
    basis: Basis

    @property
    def mean(self) -> X:
        """Of the states."""
        return self.basis.inverse(self.law.mean)

    def sample(self, keys: Keys) -> X:
        """One draw, one key per example."""
        return self.basis.inverse(self.law.sample(keys))

    def noise(self, x: X) -> X:
        """The normals whose draw is x: of states, as white there as in any basis."""
        return self.basis.inverse(self.law.noise(self.basis.forward(x)))

    def drawn(self, noise: X | float = 0.0, fresh: X | float = 0.0) -> X:
        """The state with this `noise`, and fresh normals where there is something to draw."""
        parts = (self.basis.forward(jnp.broadcast_to(v, self.mean.shape)) for v in (noise, fresh))
        return self.basis.inverse(self.law.drawn(*parts))

    def log_prob(self, x: X) -> Array:
        """Log-density of each coordinate, nats; their sum is that of the state."""
        return self.law.log_prob(self.basis.forward(x))


@dataclasses.dataclass(frozen=True)
class TurnedFlow(GaussianFlow):
    """The ODE of the coordinates: no volume changes."""

    basis: Basis

    def start(self, x0, t):
        """The state whose coordinates are those of the data without noise."""
        y, volume = super().start(self.basis.forward(x0), t)
        return self.basis.inverse(y), volume

    def enter(self, xt, t):
        """What the coordinates enter as."""
        return super().enter(self.basis.forward(xt), t)

    def leave(self, y, t):
        """The state with the coordinates that y stands for."""
        return self.basis.inverse(super().leave(y, t))

    def slope(self, prediction, y, t):
        """That of the coordinates."""
        turned = Prediction(self.basis.forward(prediction.value), prediction.kind)
        return super().slope(turned, y, t)


@dataclasses.dataclass(frozen=True)
class InBasis:
    """`process` on the coordinates of `basis`: `InBasis(Gaussian(ShortestPath(power)), DCT((1, 2)))`.

    process: `Gaussian`, usually with a schedule from `schedules.spectral`; with equal schedules the basis says nothing.
    Networks see states and predict in them. Errors and bounds are per coordinate: no site can be known (`sitewise`).
    """

    process: Gaussian
    basis: Basis

    state = "gaussian"
    sitewise = False

    def __post_init__(self):
        if not isinstance(self.process, Gaussian):
            raise ValueError(f"InBasis needs a Gaussian process, got {self.process!r}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The process's."""
        return self.process.kinds

    @property
    def schedule(self) -> schedules.Gaussian:
        """That of the coordinates."""
        return self.process.schedule

    @property
    def data_std(self) -> float:
        """The process's."""
        return self.process.data_std

    @property
    def parameters(self) -> PyTree:
        """What learning changes: the process's. AttributeError where it has none."""
        return self.process.parameters

    def with_parameters(self, parameters: PyTree) -> InBasis:
        """The process with these."""
        return dataclasses.replace(self, process=self.process.with_parameters(parameters))

    @property
    def variance_parameters(self) -> tuple[str, ...]:
        """The process's."""
        return self.process.variance_parameters

    def flow(self) -> TurnedFlow:
        """The probability-flow ODE, for its likelihood."""
        return TurnedFlow(self.process, self.basis)

    def _coordinates(self, prediction: Prediction) -> Prediction:
        return Prediction(self.basis.forward(prediction.value), prediction.kind)

    def _turned(self, law: Distribution) -> Turned:
        return Turned(law, self.basis)

    def marginal(self, x0, t):
        """q(x_t | x_0)."""
        return self._turned(self.process.marginal(self.basis.forward(x0), t))

    def noiseless(self, x0, t):
        """The state at a time without noise."""
        return self.basis.inverse(self.process.noiseless(self.basis.forward(x0), t))

    def bridge(self, x0, xt, s, t):
        """q(x_s | x_t, x_0)."""
        return self._turned(self.process.bridge(self.basis.forward(x0), self.basis.forward(xt), s, t))

    def reverse(self, prediction, xt, s, t):
        """The bridge at the predicted x0."""
        return self._turned(self.process.reverse(self._coordinates(prediction), self.basis.forward(xt), s, t))

    def prior(self, shape: Sequence[int], t: float = 1.0) -> Turned:
        """What sampling starts from."""
        return self._turned(self.process.prior(shape, t))

    def observe(self, keys, x0, t):
        """What an observed site shows at time t."""
        return self.marginal(x0, t).sample(keys)

    def prior_kl(self, x0, t):
        """KL(q(x_t | x_0) || prior at t), nats per coordinate."""
        return self.process.prior_kl(self.basis.forward(x0), t)

    def path_kl(self, x0, prediction, xt, t):
        """The bound's integrand over t, nats per coordinate."""
        return self.process.path_kl(self.basis.forward(x0), self._coordinates(prediction), self.basis.forward(xt), t)

    def step_kl(self, x0, prediction, xt, s, t):
        """KL(bridge || reverse) of one step of a chain, nats per coordinate."""
        return self.process.step_kl(self.basis.forward(x0), self._coordinates(prediction), self.basis.forward(xt), s, t)

    def reconstruction(self, x0, prediction, xt, t):
        """-log p(x_0 | x_t), a density, nats per coordinate."""
        return self.process.reconstruction(
            self.basis.forward(x0), self._coordinates(prediction), self.basis.forward(xt), t
        )

    @property
    def t_range(self) -> tuple[float, float]:
        """The process's."""
        return self.process.t_range

    def time_at(self, u, t_range):
        """Times uniform in the schedule's common log-SNR, and dt/du."""
        return self.process.time_at(u, t_range)

    def network_inputs(self, xt, t, kind):
        """The state, scaled in the basis where the kind asks for it, and the time."""
        value, t = self.process.network_inputs(self.basis.forward(xt), t, kind)
        return (xt if kind != "edm" else self.basis.inverse(value)), t

    def network_outputs(self, output, xt, t, kind):
        """The prediction's value in what a network gives back: the output itself."""
        return output

    def convert(self, prediction, kind, xt, t):
        """The same statement as another kind."""
        converted = self.process.convert(self._coordinates(prediction), kind, self.basis.forward(xt), t)
        return Prediction(self.basis.inverse(converted.value), kind)
