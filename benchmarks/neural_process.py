"""A neural diffusion process against the Gaussian process whose draws it learned, function by function.

    python benchmarks/neural_process.py --steps 4000

Trains `denoisers.NeuralProcess` on functions of a Gaussian process at random points (squared exponential, with
noise), then draws its values at new points given some, by RePaint's resampling, and compares means and standard
deviations with the exact posterior's. Last lines: the errors, in units of the prior's standard deviation 1, beside
those of the prior itself (which knows no values).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddjax
from ddjax import denoisers, objectives
from ddjax.sampling import Observed
from ddjax.training import Ema, init_state, make_train_step

NOISE, POINTS = 0.05, 24


def kernel(a, b, scale):
    return np.exp(-0.5 * ((a[..., :, None] - b[..., None, :]) / scale) ** 2)


def functions(rng, n, scale):
    """Points on [-1, 1], and values there."""
    x = rng.uniform(-1, 1, (n, POINTS))
    cov = kernel(x, x, scale) + NOISE**2 * np.eye(POINTS)
    y = np.einsum("bij,bj->bi", np.linalg.cholesky(cov), rng.normal(size=(n, POINTS)))
    return x[..., None].astype(np.float32), y.astype(np.float32)


def posterior(x, y, known, scale):
    """Of the values at the other points."""
    k = kernel(x, x, scale) + NOISE**2 * np.eye(len(x))
    gain = k[~known][:, known] @ np.linalg.inv(k[known][:, known])
    return gain @ y[known], np.sqrt(np.diag(k[~known][:, ~known] - gain @ k[known][:, ~known]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scale", type=float, default=0.4, help="the kernel's length")
    parser.add_argument("--functions", type=int, default=16, help="to compare")
    parser.add_argument("--samples", type=int, default=64, help="of each")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 5, 10])
    args = parser.parse_args()
    rng, process = np.random.default_rng(0), ddjax.processes.Gaussian(ddjax.schedules.VPCosine())
    init, apply = denoisers.functional_init(lambda rngs: denoisers.NeuralProcess(width=32, depth=4, heads=4, rngs=rngs))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, args.steps // 2), args.steps)),
    )
    step = jax.jit(make_train_step(objectives.gaussian(process, "noise"), apply, optimizer, ema=Ema(0.999)))
    state, began = init_state(init, optimizer, jax.random.key(0)), time.perf_counter()
    for i in range(args.steps):
        x, y = functions(rng, args.batch, args.scale)
        state, metrics = step(state, {"x0": y, "cond": {"points": x}})
        if (i + 1) % 500 == 0:
            print(f"step {i + 1}: loss {float(metrics['loss']):.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    denoise = ddjax.bind(apply, state.ema, process, "noise")
    rng = np.random.default_rng(1)
    x, y = functions(rng, args.functions, args.scale)
    known = np.arange(POINTS) < np.array([2, 4, 6, 8])[np.arange(args.functions) % 4][:, None]
    repeated = [np.repeat(v, args.samples, axis=0) for v in (x, y, known)]
    for rounds in args.rounds:
        drawn = ddjax.sample(
            jax.random.key(2),
            denoise,
            process,
            shape=repeated[1].shape,
            solver=ddjax.solvers.Resampled(ddjax.solvers.Ancestral(process), rounds),
            times=ddjax.grids.uniform(args.sampling_steps),
            cond={"points": jnp.asarray(repeated[0])},
            observed=Observed(jnp.asarray(repeated[2]), jnp.asarray(repeated[1])),
        ).x0
        drawn = np.asarray(drawn).reshape(args.functions, args.samples, POINTS)
        means, stds, prior = [], [], []
        for i in range(args.functions):
            mean, std = posterior(x[i, :, 0].astype(np.float64), y[i], known[i], args.scale)
            own = drawn[i][:, ~known[i]]
            means += list(own.mean(0) - mean)
            stds += list(own.std(0, ddof=1) - std)
            prior += list(np.stack([-mean, np.sqrt(1 + NOISE**2) - std], -1))
        rms = lambda v: np.sqrt(np.mean(np.square(v), axis=0))  # noqa: E731
        print(
            f"rounds {rounds}: root mean square error of the mean {rms(means):.3f} (prior {rms(prior)[0]:.3f}), of the "
            f"standard deviation {rms(stds):.3f} (prior {rms(prior)[1]:.3f}), {time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
