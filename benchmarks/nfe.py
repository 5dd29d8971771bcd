"""Error against the number of network evaluations (NFE), of every solver for Gaussian states at equal NFE.

    python benchmarks/nfe.py measure mixture2 mixture16 images --out nfe.json    # exact denoisers, minutes
    python benchmarks/nfe.py measure mnist --run RUN --out nfe.json              # a trained model
    python benchmarks/nfe.py table --out nfe.json
    python benchmarks/nfe.py plot --out nfe.json --png docs/images/nfe.png

Deterministic solvers: the distance to the 1,000-step solution from the same noise, RMS over sites and examples, and
for pictures the fraction that is given its own label. Stochastic ones (and, beside them, the deterministic): the
energy distance to data, or for pictures the kernel distance (Binkowski et al. 2018) in pixels.

A solver that takes several evaluations a step gets fewer steps: as many as stay within the NFE. Each is measured on
every grid of `GRIDS`, and its best one, by the geometric mean over the NFE, is reported for all of them. `images` is
the setting in which the published ranking was measured (diff-sampler's README): EDM's process, Karras et al.'s grid
(rho 7) from 80 to 0.002, no last step to 0, on the law of training images with a little noise. `images_vp` has the
same noise levels under DDPM's schedule, in whose time the DEIS that was published interpolates; the solvers that know
noise levels alone are the same there.

Each solver is compiled once for all NFE: the number of steps is an argument of the compiled loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import grids, random, schedules, search, solvers
from ddjax.fixtures import GaussianMixture
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.pytrees import as_pytree
from ddjax.solvers.base import first_carry

BUDGETS = (5, 6, 8, 10, 15, 20, 30, 50)
MNIST = "../shared/data/mnist/mnist.npz"

# Order 1 of DPM-Solver, DPM-Solver++ and UniP is DDIM.
DETERMINISTIC = {
    "euler": solvers.euler,
    "ddim": solvers.DDIM,
    "heun": solvers.Heun,
    "heun_in_noise": solvers.heun_in_noise,
    "bogacki_shampine": solvers.bogacki_shampine,
    "rk4": solvers.rk4,
    "dpm_solver 2": solvers.dpm_solver,
    "dpm_solver 3": lambda p: solvers.dpm_solver(p, 3),
    "dpm_solver_pp 2S": solvers.dpm_solver_pp_singlestep,
    "dpm_solver_pp 3S": lambda p: solvers.dpm_solver_pp_singlestep(p, 3),
    "dpm_solver_multistep 2": solvers.dpm_solver_multistep,
    "dpm_solver_multistep 3": lambda p: solvers.dpm_solver_multistep(p, 3),
    "dpm_solver_pp 2M": solvers.dpm_solver_pp,
    "dpm_solver_pp 3M": lambda p: solvers.dpm_solver_pp(p, 3),
    "unipc 2": solvers.unipc,
    "unipc 3": lambda p: solvers.unipc(p, 3),
    "deis tAB 3": lambda p: solvers.deis(p, 4),  # named by the degree of the polynomial
    "deis rhoAB 3": lambda p: solvers.deis(p, 4, variant="rhoab"),
    "deis log-rho AB 3": lambda p: solvers.deis(p, 4, variant="logrhoab"),
    "ipndm 4": solvers.ipndm,
    "pndm": solvers.pndm,
    "plms": solvers.plms,
    "lms 4": solvers.lms,
    "adams_bashforth 2": solvers.adams_bashforth,
    "ghvb 2": solvers.ghvb,
    "gradient_estimation": solvers.gradient_estimation,
}
# The same with lower orders at the end, as diff-sampler has it: made for a number of steps, so compiled for each.
LOWER_FINAL = {f"{name}, lower final": DETERMINISTIC[name] for name in ("dpm_solver_pp 3M", "unipc 3")}
DETERMINISTIC |= LOWER_FINAL
STOCHASTIC = {
    "ancestral": solvers.Ancestral,
    "ddim, eta 0.5": lambda p: solvers.DDIM(p, 0.5),
    "euler_maruyama": solvers.EulerMaruyama,
    "sde_dpm_solver_pp 2M": solvers.sde_dpm_solver_pp,
    "sde_dpm_solver_pp 3M": lambda p: solvers.sde_dpm_solver_pp(p, 3),
    "sa_solver 2": solvers.sa_solver,
    "dpm_solver_pp_2s_ancestral": solvers.dpm_solver_pp_2s_ancestral,
    "edm_stochastic": lambda p: solvers.edm_stochastic(p, 20),
    "edm_restart": lambda p: solvers.edm_restart(p, [(0.06, 0.3, 3, 1)]),  # Xu et al. 2023, table 3, one interval
    "predictor_corrector": solvers.predictor_corrector,
}
# Its own steps, whatever the grid: NFE is what a tolerance takes, the mean over the noises.
TOLERANCES = (3e-1, 1e-1, 3e-2, 1e-2, 1e-3, 1e-4)


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """The exact denoiser of images, each with a little Gaussian noise of its own: the mixture law of all of them."""

    process: Gaussian
    images: Any  # (n, sites)
    width: float

    def __call__(self, xt, t, cond=None):
        """E[x0 | xt]."""
        alpha, sigma = (v(jnp.asarray(t))[:, None] for v in (self.process.schedule.alpha, self.process.schedule.sigma))
        variance = (alpha * self.width) ** 2 + sigma**2
        inner = alpha * xt @ self.images.T - 0.5 * alpha**2 * (self.images**2).sum(1)
        mean = jax.nn.softmax(inner / variance, axis=-1) @ self.images
        x0 = mean + alpha * self.width**2 / variance * (xt - alpha * mean)
        return Prediction(x0, "x0")


jax.tree_util.register_dataclass(Smoothed, ["images"], ["process", "width"])


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is solved: a denoiser, first states, and what the ends are judged by."""

    process: Any
    denoise: Any
    shape: tuple[int, ...]
    grids: dict[str, Callable[[int], Any]]
    law: Callable[[Any], float]  # distance of samples to data
    label: Callable[[Any], float] | None = None  # fraction that is given its own label
    cond: Any = None
    fine: int = 1000


def flat(x: Any) -> np.ndarray:
    """Vectors."""
    return np.asarray(x, np.float64).reshape(len(x), -1)


def energy_to(y: Any) -> Callable[[Any], float]:
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias, as a function of x (Szekely & Rizzo 2013)."""

    def distance(a, b):
        return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0))

    def within(a):
        return distance(a, a).sum() / (len(a) * (len(a) - 1))

    y = flat(y)
    own = within(y)
    return lambda x: float(2 * distance(flat(x), y).mean() - within(flat(x)) - own)


def kernel_to(y: Any) -> Callable[[Any], float]:
    """The squared kernel distance of `search.squared_mmd`, as a function of x."""
    y = jnp.asarray(flat(y), float)
    distance = jax.jit(search.squared_mmd)
    return lambda x: float(distance(jnp.reshape(x, (len(x), -1)), y))


def mixture(dims: int) -> Problem:
    """Components that overlap little, under DDPM's schedule in continuous time."""
    law = GaussianMixture(dims, components=3 if dims == 2 else 8, seed=1, scale=0.3 if dims == 2 else 0.15)
    process = Gaussian(schedules.VPLinear())
    schedule = process.schedule
    start = 0.999
    low, high = (float(schedule.log_snr(jnp.asarray(t))) for t in (start, 1e-3))
    held_out = law.sample(random.example_keys(jax.random.key(77), 4096))
    return Problem(
        process,
        law.denoise(process),
        (256, dims),
        {
            "uniform": lambda n: grids.uniform(n, start=start),
            "log_snr": lambda n: jnp.append(grids.uniform_log_snr(schedule, max(n - 1, 1), start=low, end=high), 0.0)
            if n > 1 else jnp.asarray([start, 0.0]),
            "karras": lambda n: grids.karras(schedule, n, sigma_min=math.exp(-high / 2), sigma_max=math.exp(-low / 2)),
        },
        energy_to(held_out),
    )  # fmt: skip


def mnist_images(count: int, size: int = 16, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Of MNIST in [-1, 1], and their labels."""
    from ddjax.data import load

    data = load(MNIST, split, tokens=False, size=size)
    items = data[np.arange(count)]
    return np.asarray(items["x0"]), np.asarray(items["cond"])


def images(schedule: Any = schedules.EDM(), count: int = 1000, width: float = 0.1) -> Problem:
    """The published setting, on the law of training images with noise. Any schedule: the same noise levels."""
    process = Gaussian(schedule)
    x, _ = mnist_images(count)
    x = x.reshape(count, -1) * 0.5 / x.std()  # EDM's width of data
    held_out = x + width * np.random.default_rng(7).normal(size=x.shape)
    return Problem(
        process,
        Smoothed(process, jnp.asarray(x, float), width),
        (256, x.shape[1]),
        {"karras, no step to 0": lambda n: grids.karras(schedule, n + 1)[:-1]},
        kernel_to(held_out),
    )


def judge(real: np.ndarray, labels: np.ndarray) -> Callable[[Any, Any], float]:
    """The fraction of samples to which a support vector classifier gives their own label, fitted once."""
    from sklearn.svm import SVC

    fitted = SVC().fit(real.reshape(len(real), -1), labels)
    return lambda x, own: float(np.mean(fitted.predict(np.asarray(x).reshape(len(x), -1)) == own))


def mnist(run: str, num: int = 64, guidance: float = 1.0) -> Problem:
    """A trained model, class by class."""
    import ddjax

    run = ddjax.load(run)
    labels = np.arange(num) % run.data.num_classes
    denoise = run.experiment.guided(run.denoise, guidance, jnp.asarray(labels)) if guidance != 1 else run.denoise
    real, real_labels = mnist_images(4000)
    held_out = mnist_images(10_000, split="test")[0]  # all: the first 1,000 are thinner than the rest, by 0.027
    right = judge(real, real_labels)
    return Problem(
        run.process,
        denoise,
        (num, *run.experiment.state_shape),
        {"uniform": grids.uniform},
        kernel_to(held_out),
        lambda x: right(x, labels),
        jnp.asarray(labels),
    )


@functools.partial(jax.jit, static_argnames=("solver",))
def reach(keys, denoise, solver, times, steps, init, cond):
    """The end, and the NFE of each example, of the first `steps` steps of a grid."""

    def step(i, state):
        x, carry, nfe = state
        moved, carry, info = solver.step(random.fold_in(keys, i), carry, x, times[i], times[i + 1], denoise, cond)
        return moved.astype(x.dtype), carry, nfe + info.nfe

    first = init, first_carry(solver, init, cond, denoise), jnp.zeros(init.shape[0], jnp.int32)
    x, _, nfe = jax.lax.fori_loop(0, steps, step, first)
    return x, nfe


@functools.cache
def padded(grid: Callable[[int], Any], steps: int) -> np.ndarray:
    """Its times, as many for all numbers of steps."""
    times = np.asarray(grid(steps))
    return np.concatenate([times, np.full(max(BUDGETS) + 1 - len(times), times[-1])])


@dataclasses.dataclass(frozen=True)
class Zero:
    """Predicts 0, to count evaluations."""

    def __call__(self, xt, t, cond=None):
        """0."""
        return Prediction(jnp.zeros_like(xt), "x0")


def most_steps(problem: Problem, solver: Any, grid: Callable, budget: int) -> int:
    """The most steps that stay within the NFE; 0 where one costs more."""
    keys, init = random.example_keys(jax.random.key(0), 1), jnp.zeros((1, *problem.shape[1:]))
    low, high = 0, budget
    while low < high:
        steps = (low + high + 1) // 2
        _, nfe = reach(keys, as_pytree(Zero()), solver, padded(grid, steps), steps, init, None)
        low, high = (steps, high) if int(nfe[0]) <= budget else (low, steps - 1)
    return low


def measure(
    problem: Problem,
    budgets: Sequence[int],
    names: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
    seed: int = 0,
) -> None:
    """Solver -> grid -> NFE -> {"rms", "law", "label"}, handed to `keep` after each solver."""
    key = jax.random.key(seed)
    keys = random.example_keys(key, problem.shape[0])
    denoise = as_pytree(problem.denoise)
    found = {}
    starts, ends = {}, {}
    for name, grid in problem.grids.items():  # grids may begin at different times
        t = round(float(grid(5)[0]), 6)
        if t not in starts:
            starts[t] = problem.process.prior(problem.shape, jnp.asarray(t, float)).sample(keys)
            fine = grid(problem.fine)
            began = time.time()
            ends[t], _ = reach(
                keys, denoise, solvers.dpm_solver_pp(problem.process), fine, problem.fine, starts[t], problem.cond
            )
            ends[t].block_until_ready()
            print(f"fine solution from {t:.4f}, {name}: {time.time() - began:.0f} s, law {problem.law(ends[t]):.3g}, "
                  f"label {problem.label and problem.label(ends[t])}", flush=True)  # fmt: skip
    found["fine"] = {
        "law": float(problem.law(ends[t])),
        "label": problem.label and problem.label(ends[t]),
    }
    for name in names:
        began = time.time()
        solver = (DETERMINISTIC | STOCHASTIC)[name](problem.process)
        by_grid = {}
        for grid_name, grid in problem.grids.items():
            t = round(float(grid(5)[0]), 6)
            rows = {}
            for budget in budgets:
                steps = most_steps(problem, solver, grid, budget)
                if not steps:
                    continue
                used = dataclasses.replace(solver, lower_order_final=steps) if name in LOWER_FINAL else solver
                x, nfe = reach(keys, denoise, used, padded(grid, steps), steps, starts[t], problem.cond)
                rms = float(jnp.sqrt(jnp.mean((x - ends[t]) ** 2)))
                rows[budget] = {"nfe": int(nfe[0]), "steps": steps, "rms": rms, "law": problem.law(x)}
                if problem.label:
                    rows[budget]["label"] = problem.label(x)
            by_grid[grid_name] = rows
        found[name] = by_grid
        keep(found)
        errors = " ".join(f"{b}:{v['rms']:.3g}" for b, v in rows.items())
        print(f"{name}, {time.time() - began:.0f} s, {grid_name}: {errors}", flush=True)


def adaptive(problem: Problem, seed: int = 0) -> None:
    """RK45 by its tolerance: evaluations, and the distances."""
    key = jax.random.key(seed)
    keys, denoise, grid = random.example_keys(key, problem.shape[0]), as_pytree(problem.denoise), problem.grids
    start = float(next(iter(grid.values()))(5)[0])
    init = problem.process.prior(problem.shape, jnp.asarray(start, float)).sample(keys)
    fine = solvers.dpm_solver_pp(problem.process), next(iter(grid.values()))(problem.fine)
    end, _ = reach(keys, denoise, *fine, problem.fine, init, problem.cond)
    print("| tolerance | NFE | rms | law | label |\n|---|---|---|---|---|")
    for tolerance in TOLERANCES:
        solver = solvers.Adaptive(problem.process, rtol=tolerance, atol=tolerance)
        x, nfe = reach(keys, denoise, solver, jnp.asarray([start, 0.0]), 1, init, problem.cond)
        rms, label = float(jnp.sqrt(jnp.mean((x - end) ** 2))), f"{problem.label(x):.3f}" if problem.label else ""
        print(f"| {tolerance:g} | {float(nfe.mean()):.1f} | {rms:.3g} | {problem.law(x):.3g} | {label} |", flush=True)


def best_grid(by_grid: dict[str, dict], measure: str) -> tuple[str, dict]:
    """Of a solver: the grid with the lowest geometric mean over the NFE (the highest, of labels)."""
    rows = {name: row for name, row in by_grid.items() if row}

    def mean(name):
        values = [v[measure] for v in rows[name].values()]
        return -np.mean(values) if measure == "label" else np.mean(np.log(np.maximum(values, 1e-12)))

    name = min(rows, key=mean)
    return name, rows[name]


def table(found: dict[str, Any]) -> None:
    """Markdown: the RMS distance of deterministic solvers; the distance to data, and labels, of all."""
    for problem, results in found.items():
        fine, budgets = results.pop("fine"), None
        for measure, names in (("rms", DETERMINISTIC), ("law", results), ("label", results)):
            if fine.get(measure, 0.0) is None:
                continue
            by = {name: "rms" if name in DETERMINISTIC else "law" for name in names if name in results}
            rows = [(name, *best_grid(results[name], by[name])) for name in by]
            budgets = sorted({int(b) for _, _, row in rows for b in row})
            note = f"; fine solution {fine[measure]:.3g}" if measure in fine else ""
            print(f"\n{problem}, {measure}{note}\n\n| solver | grid | {' | '.join(map(str, budgets))} |")
            print(f"|---|---|{'---|' * len(budgets)}")
            sign = -1 if measure == "label" else 1
            for name, grid, row in sorted(rows, key=lambda one: sign * one[2][max(one[2], key=int)][measure]):
                cells = (f"{row[str(b)][measure]:.3g}" if str(b) in row else "" for b in budgets)
                print(f"| {name} | {grid} | {' | '.join(cells)} |")
        results["fine"] = fine


SHOWN = ("ddim", "heun", "dpm_solver 2", "dpm_solver_pp 2M", "dpm_solver_pp 3M", "unipc 3", "deis tAB 3", "ipndm 4",
         "rk4")  # fmt: skip


def plot(found: dict[str, Any], path: str) -> None:
    """One panel a problem."""
    import matplotlib.pyplot as plt

    panels = [(problem, "law" if problem == "images" else "rms") for problem in found if problem != "images_vp"]
    titles = {
        "rms": "RMS distance to the fine solution",
        "law": "kernel distance to data",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.4), layout="constrained", squeeze=False)
    for axis, (problem, measure) in zip(axes[0], panels, strict=True):
        for name in (n for n in DETERMINISTIC if n in found[problem]):
            if f"{name}, lower final" in found[problem]:  # that is how these are published
                continue
            _, row = best_grid(found[problem][name], "rms")
            nfe, values = (
                [v["nfe"] for v in row.values()],
                [max(v[measure], 1e-5 if measure == "rms" else 1e-4) for v in row.values()],
            )
            plain = name.removesuffix(", lower final")
            if plain not in SHOWN:
                axis.plot(nfe, values, color="0.85", lw=0.8, zorder=0)
                continue
            axis.plot(nfe, values, marker=".", lw=1.2, color=f"C{SHOWN.index(plain)}", label=plain)
        axis.set(title=f"{problem}: {titles[measure]}", xlabel="NFE", xscale="log")
        axis.title.set_size(9)
        shown = [
            b for b in BUDGETS if b <= max(int(b) for row in best_grid(found[problem]["ddim"], "rms")[1:] for b in row)
        ]
        axis.set_xticks(shown, map(str, shown))
        axis.minorticks_off()
        axis.set_yscale("log")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=70)  # small enough for a repository


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("measure", "adaptive", "table", "plot"))
    parser.add_argument("problems", nargs="*", help="mixture2, mixture16, images, images_vp, mnist")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON of all that was measured")
    parser.add_argument("--run", help="trained run, for mnist")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--num", type=int, default=64, help="noises, for mnist")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="NFE, at most 50")
    parser.add_argument("--only", nargs="+", metavar="SOLVER", help="of those in this file; default all")
    parser.add_argument("--fine", type=int, default=1000, help="steps of the fine solution")
    parser.add_argument("--png", help="file of the plot")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.problems if arguments.what in ("measure", "adaptive") else ():
        jax.config.update("jax_enable_x64", name.startswith("mixture"))
        problem = {
            "images": images,
            "images_vp": lambda: images(schedules.VPLinear()),
            "mnist": lambda: mnist(arguments.run, arguments.num, arguments.guidance),
        }.get(name, lambda name=name: mixture(int(name.removeprefix("mixture"))))()
        problem = dataclasses.replace(problem, fine=arguments.fine)
        if arguments.what == "adaptive":
            adaptive(problem)
            continue

        def keep(results, name=name):
            found[name] = json.loads(json.dumps(found.get(name, {}) | results))
            arguments.out.write_text(json.dumps(found))

        measure(problem, arguments.budgets, arguments.only or [*DETERMINISTIC, *STOCHASTIC], keep)
    if arguments.what == "table":
        table(found)
    if arguments.what == "plot":
        plot(found, arguments.png)


if __name__ == "__main__":
    main()
