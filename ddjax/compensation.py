"""DC-Solver's ratios where none were searched: cascade polynomial regression (Zhao et al. 2024, section 3.3).

    searched = [compensation.Searched(steps, scale, found.solver.compensation) for ...]    # `search.Compensation`
    cascade = compensation.regress(searched)
    solver = dataclasses.replace(solvers.unipc(process), compensation=cascade.ratios(8, 2.5))

The ratio of step i of n under guidance w is a polynomial in i / n; its coefficients are polynomials in w, and theirs in
n. Multiplied out that is one polynomial, linear in its coefficients, and all settings fit it at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Key

from ddjax import files, search
from ddjax.frozen import Frozen

FORMAT = "ddjax compensation 1"
GUIDANCE, STEPS = 12.0, 50.0  # the units of guidance and of the number of steps (the authors' code)


class Searched(NamedTuple):
    """What a search of `search.Compensation` found in one setting."""

    steps: int
    guidance: float  # classifier-free scale; 1 is none
    ratios: Sequence[float]  # one for each step


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Ratios as a polynomial: coefficients[j, k, l] multiplies (i / n)^j (guidance / 12)^k (n / 50)^l.

    steps, guidance: the least and the most that were searched.
    """

    coefficients: Frozen
    steps: tuple[int, int]
    guidance: tuple[float, float]

    def __post_init__(self):
        made = self.coefficients if isinstance(self.coefficients, Frozen) else Frozen(self.coefficients)
        if made.values.ndim != 3 or not np.isfinite(made.values).all():
            raise ValueError(f"a cascade has finite coefficients with three axes, got shape {made.values.shape}")
        object.__setattr__(self, "coefficients", made)
        object.__setattr__(self, "steps", (int(self.steps[0]), int(self.steps[1])))
        object.__setattr__(self, "guidance", (float(self.guidance[0]), float(self.guidance[1])))

    def ratios(self, steps: int, guidance: float = 1.0) -> tuple[float, ...]:
        """For `solvers.Multistep(compensation=...)`: one for each step; that of the first, which has no past, is 1.

        Raises ValueError outside the settings searched, where a polynomial is worth nothing.
        """
        for name, value, (low, high) in (("steps", steps, self.steps), ("guidance", guidance, self.guidance)):
            if not low <= value <= high:
                raise ValueError(
                    f"ratios were searched for {name} from {low:g} to {high:g} and are not known for {value:g}: search "
                    "that far"
                )
        degrees = tuple(n - 1 for n in self.coefficients.values.shape)
        return (1.0, *(_features(steps, guidance, degrees) @ self.coefficients.values.ravel()).tolist())


def _features(steps: int, guidance: float, degrees: Sequence[int]) -> Float[np.ndarray, "steps-1 terms"]:
    """The polynomial's terms at each step but the first."""
    places = np.arange(2, steps + 1) / steps
    of_step, of_guidance, of_steps = (
        np.asarray(v, np.float64)[..., None] ** np.arange(degree + 1)
        for v, degree in zip((places, guidance / GUIDANCE, steps / STEPS), degrees, strict=True)
    )
    return np.einsum("ij,k,l->ijkl", of_step, of_guidance, of_steps).reshape(len(places), -1)


def regress(searched: Sequence[Searched], degrees: tuple[int, int, int] | None = None) -> Cascade:
    """The polynomial closest to all the ratios, by least squares.

    degrees: in the step's place, the guidance, the number of steps; default at most (3, 2, 2), less where fewer
        settings cannot tell.
    Raises ValueError for settings that do not determine it, and for ratios that are not one for each step.
    """
    if not searched:
        raise ValueError("a regression needs at least one setting that was searched")
    for setting in searched:
        if len(setting.ratios) != setting.steps or setting.steps < 2:
            raise ValueError(
                f"each setting has two steps or more, and a ratio for each: got {len(setting.ratios)} for "
                f"{setting.steps} steps"
            )
    numbers, scales = ([v[at] for v in searched] for at in (0, 1))
    if degrees is None:
        degrees = (min(3, min(numbers) - 2), min(2, len(set(scales)) - 1), min(2, len(set(numbers)) - 1))
    rows = np.concatenate([_features(v.steps, v.guidance, degrees) for v in searched])
    values = np.concatenate([np.asarray(v.ratios, np.float64)[1:] for v in searched])
    size = np.linalg.norm(rows, axis=0)
    found, _, rank, _ = np.linalg.lstsq(rows / size, values, rcond=1e-13)
    if rank < rows.shape[1]:
        raise ValueError(
            f"these {len(searched)} settings cannot tell polynomials of degrees {tuple(degrees)} (step, guidance, "
            f"number of steps) apart: search more of them, each number of steps under each guidance, or lower degrees"
        )
    shape = tuple(degree + 1 for degree in degrees)
    ends = [(min(v), max(v)) for v in (numbers, scales)]
    return Cascade(Frozen((found / size).reshape(shape)), *ends)


class Report(NamedTuple):
    """Ratios for a trained model."""

    cascade: Cascade
    searched: tuple[Searched, ...]
    losses: tuple[tuple[float, float], ...]  # of each setting on examples not searched on: without ratios, and with


def for_run(
    run: Any,
    key: Key[Array, ""],
    *,
    steps: Sequence[int],
    guidance: Sequence[float | None] = (None,),
    degrees: tuple[int, int, int] | None = None,
    solver: str = "dpm_solver_pp",
    **options: Any,
) -> Report:
    """Search ratios of a trained run for each number of steps under each guidance scale, and regress on them.

    Every setting begins with the same noise. options: those of `search.for_run` and `search.search`.
    Raises ValueError where that does, and where `regress` does.
    """
    scale = run.config.sample.guidance
    settings = [(n, scale if w is None else w) for n in steps for w in guidance]
    regress([Searched(n, w, (1.0,) * n) for n, w in settings], degrees)  # an error now, not after the search
    searched, losses = [], []
    for n, w in settings:
        found = search.for_run(run, key, steps=n, guidance=w, family="compensation", solver=solver, **options)
        searched.append(Searched(n, float(w), found.found.solver.compensation))
        losses.append((found.before, found.after))
    return Report(regress(searched, degrees), tuple(searched), tuple(losses))


def save(path: str | Path, cascade: Cascade, process: Any, solver: str, /, **about: Any) -> None:
    """Write a cascade, and the process and the solver (of `names.SOLVERS`) that it is for, as JSON."""
    own = {"coefficients": cascade.coefficients.values.tolist(), "steps": list(cascade.steps)}
    own |= {"guidance": list(cascade.guidance), "solver": solver, "about": about}
    files.write(path, FORMAT, process, **own)


def load(path: str | Path, process: Any) -> tuple[Cascade, str] | None:
    """Read a cascade and its solver's name; None where the file is of another format.

    Raises ValueError for cascades of other processes, and for damaged ones.
    """
    if files.form_of(path) != FORMAT:
        return None
    content = files.read(path, FORMAT, process, "a cascade of ratios")
    try:
        return Cascade(Frozen(content["coefficients"]), content["steps"], content["guidance"]), content["solver"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
