"""What shortcuts spare a trained model: `python benchmarks/shortcuts.py WORKDIR [teleport] [redi] [noise] [lm]`.

Distances are root mean squares over all pixels, to the solution of the probability-flow ODE in 1,000 evaluations from
the same noise. WORKDIR: a run on images as values, by a Gaussian process (the results are of configs/mnist.py under
cond_ot, predicting the velocity).
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import ddjax
from ddjax import boundary, gaussian_law, retrieval, search, solvers
from ddjax.experiment import load_data
from ddjax.gaussian_law import GaussianLaw

NUM, FINE, KEY = 32, 500, jax.random.key(0)


def setting(workdir, scale=1.0):
    """The run, its denoiser, and what samples are drawn from."""
    run = ddjax.load(workdir)
    labels = jnp.arange(NUM, dtype=jnp.int32) % run.data.num_classes
    denoise = run.experiment.denoiser(run.params, scale, labels)
    init = run.process.prior((NUM, *run.data.shape)).sample(ddjax.random.example_keys(KEY, NUM))

    def draw(solver, times, **options):
        settings = {"shape": init.shape, "solver": solver, "times": jnp.asarray(times), "cond": labels, "init": init}
        return ddjax.sample(KEY, denoise, run.process, **settings | options)

    return run, denoise, draw


def rms(a, b):
    return float(jnp.sqrt(jnp.mean((a - b) ** 2)))


def row(*cells):
    print("| " + " | ".join(str(c) if not isinstance(c, float) else f"{c:.4f}" for c in cells) + " |", flush=True)


def laws(run):
    """Of each label, and of all items alone."""
    whole = gaussian_law.fit(load_data(run.config, "train"), labels=True)
    return {
        "of each label": whole,
        "of all": GaussianLaw(*(getattr(whole, n).values[-1:] for n in ("means", "directions", "variances", "rest"))),
    }


def teleport(workdir):
    for scale in (1.0, 1.5):
        run, _, draw = setting(workdir, scale)
        fine = draw(solvers.Heun(run.process), np.linspace(1, 0, FINE + 1)).x0
        print(f"\nTeleportation, guidance {scale}: distance to the fine solution, {NUM} samples")
        row("solver", "law", "from", *(f"{n} evaluations" for n in (4, 8, 16, 24)))
        inner = {"heun": (solvers.Heun, 2), "dpm_solver_pp": (solvers.dpm_solver_pp, 1), "euler": (solvers.euler, 1)}
        for name, (make, each) in inner.items():
            solver = make(run.process)
            counts = [(n + 1) // each if each == 2 else n for n in (4, 8, 16, 24)]  # Heun's last step costs one
            row(name, "", 1.0, *(rms(draw(solver, np.linspace(1, 0, n + 1)).x0, fine) for n in counts))
            for which, law in laws(run).items():
                jump = solvers.Teleport(run.process, law)
                for at in (0.95, 0.9, 0.8, 0.7):
                    switched = solvers.Switched((jump, solver), (at,))
                    grids = [np.concatenate([[1.0], np.linspace(at, 0, n + 1)]) for n in counts]
                    row(name, which, at, *(rms(draw(switched, times).x0, fine) for times in grids))


def redi(workdir):
    run, _denoise, draw = setting(workdir)
    solver, times = solvers.Heun(run.process), np.linspace(1, 0, 13)
    fine = draw(solver, np.linspace(1, 0, FINE + 1)).x0
    row("base", "steps skipped of 12", "evaluations", "distance to the fine solution", "distance to its data")
    plain = draw(solver, times)
    row("", "none", int(plain.nfe[0]), rms(plain.x0, fine), "")
    labels = jnp.arange(NUM, dtype=jnp.int32) % run.data.num_classes
    for n in (256, 1024):
        for early, late in ((1, 4), (2, 6), (4, 8)):
            base = retrieval.for_run(run, jax.random.key(1), n, early=early, late=late, steps=12, guidance=1.0)
            got = draw(retrieval.redi(solver, base), times, trajectory=True)
            far = retrieval.nearest(base, got.trajectory[early], labels)[1] / np.sqrt(fine[0].size)
            row(n, f"{early} to {late}", int(got.nfe[0]), rms(got.x0, fine), float(far.mean()))


def noise(workdir):
    run, denoise, _ = setting(workdir)
    items = load_data(run.config, "test")[:192]
    x0, labels = jnp.asarray(items["x0"]), jnp.asarray(items["cond"])
    settings = {"solver": solvers.Heun(run.process), "times": jnp.linspace(1, 0, 5)}
    found = boundary.best_noise(
        KEY, denoise, run.process, references=x0[:64], cond=labels[:64], candidates=32, **settings
    )
    held_out = boundary.best_noise(
        KEY, denoise, run.process, references=x0[64:], cond=labels[64:], candidates=found.noise[None], **settings
    )
    each = boundary.best_noise(
        KEY, denoise, run.process, references=x0[64:], cond=labels[64:], candidates=8, **settings
    )
    print("mean squared error on the references: best, mean, worst of 32 noises; on 128 others: the best, 8 of them")
    row(
        *(float(f(found.scores)) for f in (jnp.min, jnp.mean, jnp.max)),
        float(held_out.scores[0]),
        np.round(each.scores, 4),
    )


def lm(workdir):
    run, _denoise, draw = setting(workdir)
    data = jnp.asarray(load_data(run.config, "test")[:1000]["x0"]).reshape(1000, -1)
    fine = draw(solvers.Heun(run.process), np.linspace(1, 0, FINE + 1)).x0
    row("solver", "damping", "memory", *(f"{n} evaluations: distance, kernel distance" for n in (5, 8)))
    base = solvers.dpm_solver_multistep(run.process)
    rows = {("", ""): base}
    for damping in (1e-3, 1.0, 100.0):
        for memory in (0.01, 0.1):
            made = solvers.LevenbergMarquardt(damping, memory)
            rows[damping, memory] = solvers.Preconditioned(base, made)
    for which, solver in rows.items():
        drawn = [draw(solver, np.linspace(0.999, 0, n + 1)).x0 for n in (5, 8)]
        numbers = (f"{rms(x, fine):.4f}, {search.squared_mmd(x.reshape(NUM, -1), data):.4f}" for x in drawn)
        row("dpm_solver_multistep", *which, *numbers)


if __name__ == "__main__":
    for part in sys.argv[2:] or ("teleport", "redi", "noise", "lm"):
        {"teleport": teleport, "redi": redi, "noise": noise, "lm": lm}[part](sys.argv[1])
