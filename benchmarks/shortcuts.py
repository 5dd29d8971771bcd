"""What shortcuts spare a trained model: `python benchmarks/shortcuts.py WORKDIR [--num N] [--fine STEPS] [PART ...]`.

Parts: teleport, redi, noise, lm; default all. Distances are root mean squares over all pixels, to the solution of the
probability-flow ODE by Heun in `fine` steps from the same noise. WORKDIR: a run on images as values, by a Gaussian
process (the results are of configs/mnist.py under cond_ot, predicting the velocity).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import ddjax
from ddjax import boundary, gaussian_law, retrieval, search, solvers
from ddjax.experiment import load_data
from ddjax.gaussian_law import GaussianLaw

KEY, COUNTS = jax.random.key(0), (4, 8, 16)


def setting(run, num):
    """The denoiser, labels, noise, and how samples are drawn from it."""
    labels = jnp.arange(num, dtype=jnp.int32) % run.data.num_classes
    denoise = run.experiment.denoiser(run.params, 1.0, labels)
    init = run.process.prior((num, *run.data.shape)).sample(ddjax.random.example_keys(KEY, num))

    def draw(solver, times, **options):
        settings = {"shape": init.shape, "solver": solver, "times": jnp.asarray(times), "cond": labels, "init": init}
        return ddjax.sample(KEY, denoise, run.process, **settings | options)

    return denoise, labels, init, draw


def rms(a, b):
    return float(jnp.sqrt(jnp.mean((a - b) ** 2)))


def row(*cells):
    print("| " + " | ".join(str(c) if not isinstance(c, float) else f"{c:.4f}" for c in cells) + " |", flush=True)


def solved(run, draw, steps):
    return draw(solvers.Heun(run.process), np.linspace(1, 0, steps + 1)).x0


def teleport(run, num, fine):
    _, labels, init, draw = setting(run, num)
    end = solved(run, draw, fine)
    whole = gaussian_law.fit(load_data(run.config, "train"), labels=True)
    names = ("means", "directions", "variances", "rest")
    laws = {"of each label": whole, "of all": GaussianLaw(*(getattr(whole, n).values[-1:] for n in names))}
    row("solver", "law", "from", *(f"{n} evaluations" for n in COUNTS))
    for name, make, each in (("heun", solvers.Heun, 2), ("dpm_solver_pp", solvers.dpm_solver_pp, 1)):
        steps, solver = [n // each for n in COUNTS], make(run.process)  # Heun's last step costs one: n - 1 in all
        row(name, "", 1.0, *(rms(draw(solver, np.linspace(1, 0, n + 1)).x0, end) for n in steps))
        for which, law in laws.items():
            for at in (0.98, 0.95, 0.9, 0.8, 0.7):
                # What Switched((Teleport(process, law), solver), (at,)) does, without compiling for each time.
                begun = law.flow(run.process, init, jnp.asarray(1.0), jnp.asarray(at), labels)
                row(name, which, at, *(rms(draw(solver, np.linspace(at, 0, n + 1), init=begun).x0, end) for n in steps))


def redi(run, num, fine):
    _, labels, _, draw = setting(run, num)
    solver, times = solvers.Heun(run.process), np.linspace(1, 0, 13)
    end = solved(run, draw, fine)
    row("base", "steps skipped of 12", "evaluations", "distance to the fine solution", "to the neighbour")
    plain = draw(solver, times)
    row("", "none", int(plain.nfe[0]), rms(plain.x0, end), "")
    for n in (32, 128):
        for early, late in ((2, 6), (4, 8)):
            base = retrieval.for_run(run, jax.random.key(1), n, early=early, late=late, steps=12, guidance=1.0)
            got = draw(retrieval.redi(solver, base), times, trajectory=True)
            far = retrieval.nearest(base, got.trajectory[early], labels)[1] / np.sqrt(end[0].size)
            row(n, f"{early} to {late}", int(got.nfe[0]), rms(got.x0, end), float(far.mean()))


def noise(run, num, fine):
    denoise, *_ = setting(run, num)
    items = load_data(run.config, "test")[:64]
    x0, labels = jnp.asarray(items["x0"]), jnp.asarray(items["cond"])
    settings = {"solver": solvers.Heun(run.process), "times": jnp.linspace(1, 0, 4), "chunk": 64}

    def search(rows, candidates):
        some = {"references": x0[rows], "cond": labels[rows], "candidates": candidates}
        return boundary.best_noise(KEY, denoise, run.process, **some, **settings)

    found = search(slice(32), 8)
    others = search(slice(32, 64), run.process.prior((8, *run.data.shape)).sample(ddjax.random.example_keys(KEY, 8)))
    row("references", "the best noise of the first 32", "mean of 8", "least", "largest")
    for name, scores in (("the first 32", found.scores), ("32 others", others.scores)):
        row(name, *(float(v) for v in (scores[found.index], scores.mean(), scores.min(), scores.max())))


def lm(run, num, fine):
    _, _, _, draw = setting(run, num)
    data = jnp.asarray(load_data(run.config, "test")[:]["x0"])
    data = data.reshape(len(data), -1)
    end = solved(run, draw, fine)
    row("damping", "memory", *(f"{n} evaluations: distance, kernel distance to data" for n in (5, 8)))
    base = solvers.dpm_solver_pp(run.process)
    rows = {("none", "none"): base}
    for damping, memory in ((0.1, 0.1), (1.0, 0.1), (100.0, 0.1)):
        rows[damping, memory] = solvers.Preconditioned(base, solvers.LevenbergMarquardt(damping, memory))
    for which, solver in rows.items():
        drawn = [draw(solver, np.linspace(0.999, 0, n + 1)).x0 for n in (5, 8)]
        row(*which, *(f"{rms(x, end):.4f}, {search.squared_mmd(x.reshape(num, -1), data):.4f}" for x in drawn))


if __name__ == "__main__":
    PARTS = {"teleport": teleport, "redi": redi, "noise": noise, "lm": lm}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--num", type=int, default=32, help="samples")
    parser.add_argument("--fine", type=int, default=500, help="steps of the fine solution")
    given = parser.parse_args()
    for part in given.parts or PARTS:
        PARTS[part](ddjax.load(given.workdir), given.num, given.fine)
