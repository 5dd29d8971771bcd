"""Learned grids and samplers against the best hand-made ones, on noise that neither was chosen by.

    python benchmarks/learned.py mixture --out learned.json
    python benchmarks/learned.py mnist --run RUN --out learned.json --seeds 1 --num 64 --batch 16 --iterations 150
    python benchmarks/learned.py mnist --run RUN --loss kernel --out kernel.json --seeds 0 --num 512 --seen 2048
    python benchmarks/learned.py mnist --run RUN --loss labels --out labels.json --seeds 0 --num 512
    python benchmarks/learned.py mnist --run RUN --loss both --guidance 1.5 --out both.json --num 256 --seen 1024
    python benchmarks/learned.py table --out learned.json

For each seed three sets of noises: one is searched on; on the second, all is chosen (the best solver and its best grid
of `ddjax.grids`, the iteration and the learning rate of each search, where it begins); the third is reported, and was
looked at by nothing. At equal NFE: solvers of several evaluations a step take fewer steps. `--seen` makes the second
and third sets larger: kernel distances of 512 pictures are right to 0.0015 in pixels and 0.0036 in features.

    hand-made       the best of all solvers, each on its best grid
    fixed grid      the best solver of one evaluation a step, on its best grid
    learned grid    the same solver: `search.Grid` from there (by another loss than `fine`, with `--grid-rates`)
    learned         `search.General` from there; by `fine` from the learned grid too

What "best" means is `--loss`, for hand-made ones as for what is learned:

    fine     the distance to a fine solution from the same noise
    kernel   the kernel distances of samples to training pictures, in pixels and in the features of a small network that
             reads digits
    labels   the cross-entropy of the labels that this network reads
    both     the sum of these, a nat counted as 0.1

What is reported was seen by none: the kernel distances to all test pictures, in pixels and in the features of another
network, of other training pictures; and labels by a support vector classifier.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import pathlib
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import nfe
import numpy as np
import optax

from ddjax import grids, random, schedules, search, solvers
from ddjax.fixtures import GaussianMixture
from ddjax.processes import Gaussian
from ddjax.solvers.learned import written_out

STEPS = (5, 6, 10)
ONE_EVALUATION = {
    "ddim", "dpm_solver_pp 2M", "dpm_solver_pp 3M", "dpm_solver_multistep 2", "dpm_solver_multistep 3", "unipc 2",
    "unipc 3", "deis tAB 3", "deis rhoAB 3", "deis log-rho AB 3", "ipndm 4", "lms 4", "ghvb 2", "gradient_estimation",
}  # fmt: skip


def fixed_grids(schedule: Any, start: float, last: float, sigma_max: float) -> dict[str, Any]:
    """All of `ddjax.grids` that need nothing but a number of steps, from `start`; last: a time near data."""
    low, high = (float(schedule.log_snr(jnp.asarray(t))) for t in (start, last))
    low = max(low, -2.0 * float(np.log(sigma_max)))
    ends = {"sigma_min": float(np.exp(-high / 2)), "sigma_max": float(np.exp(-low / 2))}

    def by_levels(n):
        return grids.uniform_log_snr(schedule, n, start=low, end=high)

    made = {
        "uniform": grids.uniform,
        "cosine": grids.cosine,
        "quadratic": grids.quadratic,
        "log_linear": lambda n: grids.log_linear(n, end=last),
        "beta": grids.beta,
        "shifted 3": grids.uniform_shifted,
        "shifted 1/3": lambda n: grids.uniform_shifted(n, shift=1 / 3),
        "log_snr": by_levels,
        "log_snr, then data": lambda n: [start, 0.0] if n == 1 else [*by_levels(n - 1), 0.0],
        "karras": lambda n: grids.karras(schedule, n, **ends),
        "exponential": lambda n: grids.exponential(schedule, n, **ends),
    }

    def from_start(make):
        def grid(n):
            times = np.asarray(make(n), np.float64)
            return np.append(start, np.minimum(times[1:] * (start if times[0] == 1 else 1.0), start * (1 - 1e-6)))

        return grid

    return {name: from_start(make) for name, make in made.items()}


@functools.cache
def reader(first: int, widths: tuple[int, ...]) -> Any:
    """A small network, `pictures -> (features, logits)`, that reads digits; of 20,000 training pictures.

    The features are its last hidden layer, of mean square 1 over these.
    """
    pictures, labels = (x[first : first + 20_000] for x in nfe.mnist_images(60_000))
    sizes, rng = (pictures[0].size, *widths, 10), np.random.default_rng(first)
    weights = [
        (jnp.asarray(rng.normal(size=(i, o)) * (2 / i) ** 0.5, jnp.float32), jnp.zeros(o))
        for i, o in itertools.pairwise(sizes)
    ]
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, 3000), weight_decay=1e-2)

    def read(weights, x):
        h = x.reshape(len(x), -1)
        for w, b in weights[:-1]:
            h = jax.nn.relu(h @ w + b)
        return h, h @ weights[-1][0] + weights[-1][1]

    @jax.jit
    def step(weights, state, x, y):
        def loss(weights):
            return optax.softmax_cross_entropy_with_integer_labels(read(weights, x)[1], y).mean()

        change, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, change), state

    state = optimizer.init(weights)
    for _ in range(3000):
        rows = rng.integers(0, len(pictures), 128)
        noisy = pictures[rows] + 0.2 * rng.normal(size=(128, *pictures.shape[1:]))  # samples are not quite clean
        weights, state = step(weights, state, jnp.asarray(noisy, jnp.float32), jnp.asarray(labels[rows]))
    scale = jnp.sqrt(jnp.mean(read(weights, jnp.asarray(pictures, jnp.float32))[0] ** 2))

    def scaled(x):
        features, logits = read(weights, x)
        return features / scale, logits

    return scaled


def taught() -> Any:
    """The network by which samplers are searched and chosen."""
    return reader(40_000, (256, 128))


def judging() -> Any:
    """Another one, of other pictures, by which what was found is reported."""
    return reader(0, (400, 64))


@functools.cache
def shown() -> tuple[Any, Any]:
    """400 training pictures of each label, from which neither network learned: the features, and the pixels."""
    pictures, own = (x[20_000:40_000] for x in nfe.mnist_images(40_000))
    rows = np.concatenate([np.flatnonzero(own == label)[:400] for label in range(10)])
    return taught()(jnp.asarray(pictures[rows]))[0], jnp.asarray(pictures[rows].reshape(len(rows), -1))


def kernel(x0: Any, examples: search.Examples) -> Any:
    """The kernel distances to many training pictures, in the network's features and in pixels.

    Without the pixels a search finds samples that only this network takes for digits.
    """
    pictures = jax.lax.optimization_barrier(shown())  # constants, XLA would spend minutes on them
    pairs = zip((taught()(x0)[0], x0.reshape(len(x0), -1)), pictures, strict=True)
    return sum(search.squared_mmd(x, y.astype(x.dtype)) for x, y in pairs)


def labels(x0: Any, examples: search.Examples) -> Any:
    """The cross-entropy of the labels asked for, as the network reads the samples; nats."""
    return optax.softmax_cross_entropy_with_integer_labels(taught()(x0)[1], examples.cond).mean()


def both(x0: Any, examples: search.Examples) -> Any:
    """The sum of the two. At 0.1 a nat they are of one size where guidance is 1.5."""
    return kernel(x0, examples) + 0.1 * labels(x0, examples)


LOSSES = {"fine": search.to_fine, "kernel": kernel, "labels": labels, "both": both}


@functools.cache
def in_features() -> Any:
    """The kernel distance to all test pictures in the features of the network that judges."""
    judge = judging()
    pictures = jnp.asarray(nfe.mnist_images(10_000, split="test")[0])
    distance = nfe.kernel_to(judge(pictures)[0])
    return lambda x: distance(judge(x)[0])


class Case:
    """A problem, and the noises of one seed. seen: the same of those that are chosen by and reported. by: the loss."""

    def __init__(
        self, problem: nfe.Problem, seen: nfe.Problem, fixed: dict[str, Any], start: float, seed: int, fine: int,
        rates: Any, by: Any,
    ):  # fmt: skip
        self.problem, self.judged, self.fixed, self.rates, self.by = problem, seen, fixed, rates, by
        steps = (fine, fine, fine) if by is search.to_fine else (1, 1, fine)  # what is not compared with is not solved
        sets = [
            search.fine_examples(
                jax.random.fold_in(jax.random.key(seed), which), one.denoise, one.process, shape=one.shape,
                times=[start, 0.0], fine=grids.uniform(steps[which], start=start),
                solver=solvers.dpm_solver_pp(one.process), cond=one.cond,
            )
            for which, one in enumerate((problem, seen, seen))
        ]  # fmt: skip
        self.searched, self.choosing, self.reported = sets

    def end(self, solver: Any, times: Any, examples: search.Examples) -> Any:
        """Samples, as many at a time as are searched on."""
        size = len(self.searched.init)
        if (count := len(examples.init)) > size:
            parts = [jax.tree.map(lambda v, i=i: v[i : i + size], examples) for i in range(0, count, size)]
            return jnp.concatenate([self.end(solver, times, part) for part in parts])
        keys = random.example_keys(jax.random.key(0), count)
        times, steps = np.asarray(times, np.float64), len(times) - 1
        if not hasattr(solver, "times"):  # of any number of steps: one program
            times = np.concatenate([times, np.full(max(nfe.BUDGETS) + 1 - len(times), times[-1])])
        return nfe.reach(
            keys, nfe.as_pytree(self.problem.denoise), solver, jnp.asarray(times, float), steps, examples.init,
            examples.cond,
        )[0]  # fmt: skip

    def loss(self, solver: Any, times: Any, count: int | None = None) -> float:
        """By which all is chosen, on all of the second noises or the first `count`."""
        examples = jax.tree.map(lambda v: v[:count], self.choosing)
        value = float(self.by(self.end(solver, times, examples), examples))
        return value if np.isfinite(value) else np.inf

    def learn(self, family: Any, rates: Any, **options: Any) -> tuple[float, search.Found, float]:
        """The best of all learning rates: its loss, what was found, the rate."""
        found = []
        for rate in rates:
            one = search.search(
                jax.random.key(1), self.problem.denoise, family, self.by, self.searched, choose=self.choosing,
                learning_rate=rate, **options,
            )  # fmt: skip
            found.append((self.loss(one.solver, one.times), one, rate))
        return min(found, key=lambda one: one[0])

    def seen(self, x: Any) -> dict[str, float]:
        """The distance in features, but where all is by the distance to a fine solution."""
        return {} if self.by is search.to_fine else {"features": in_features()(x)}

    def report(self, solver: Any, times: Any) -> dict[str, float]:
        """On noise not chosen by."""
        x = self.end(solver, times, self.reported)
        found = {"rms": float(jnp.sqrt(search.to_fine(x, self.reported))), "law": self.judged.law(x)} | self.seen(x)
        return found | ({"label": self.judged.label(x)} if self.judged.label else {})


def compare(case: Case, steps: int, names: Any, **options: Any) -> dict[str, Any]:
    """All rows at one NFE."""
    process, hand = case.problem.process, []
    for name in names:
        solver = nfe.DETERMINISTIC[name](process)
        for grid_name, grid in case.fixed.items():
            count = steps if name in ONE_EVALUATION else nfe.most_steps(case.problem, solver, grid, steps)
            if count > 1:
                hand.append((case.loss(solver, grid(count), len(case.searched.init)), name, grid_name, count))

    def first(some: list) -> tuple:  # the best few, on all of the noises
        made = [(nfe.DETERMINISTIC[name](process), case.fixed[grid](n)) for _, name, grid, n in sorted(some)[:4]]
        return min((case.loss(*one), *row[1:]) for one, row in zip(made, sorted(some)[:4], strict=True))

    best = first(hand)
    of_one = best if best[1] in ONE_EVALUATION else first([row for row in hand if row[1] in ONE_EVALUATION])
    solver, times = nfe.DETERMINISTIC[of_one[1]](process), case.fixed[of_one[2]](steps)
    own = nfe.DETERMINISTIC[best[1]](process), case.fixed[best[2]](best[3])
    rows = {
        "fine": {"law": case.judged.law(case.reported.target)} | case.seen(case.reported.target),
        "hand-made": {"what": f"{best[1]}, {best[2]}"} | case.report(*own),
        "fixed grid": {"what": f"{of_one[1]}, {of_one[2]}"} | case.report(solver, times),
    }
    if case.judged.label:
        rows["fine"]["label"] = case.judged.label(case.reported.target)
    starts = {"fixed": times}
    if case.rates[0]:
        _, grid, rate = case.learn(search.Grid(solver, times), case.rates[0], **options)
        rows["learned grid"] = {"what": f"rate {rate}, iteration {grid.iteration}"}
        rows["learned grid"] |= case.report(grid.solver, grid.times)
        if case.by is search.to_fine:
            starts["learned"] = grid.times
    found = {
        name: case.learn(search.General(written_out(solver, t)), case.rates[1], **options) for name, t in starts.items()
    }
    start = min(found, key=lambda name: found[name][0])
    _, general, rate = found[start]
    rows["learned"] = {"what": f"from the {start} grid, rate {rate}, iteration {general.iteration}"}
    rows["learned"] |= case.report(general.solver, general.times)
    return rows


def mixture() -> tuple[nfe.Problem, dict[str, Any], float]:
    """Three overlapping Gaussians in the plane, cosine schedule."""
    law, process, start = GaussianMixture(), Gaussian(schedules.VPCosine()), 0.99
    held_out = law.sample(random.example_keys(jax.random.key(77), 8192))
    problem = nfe.Problem(process, law.denoise(process), (1024, 2), {}, nfe.energy_to(held_out))
    return problem, fixed_grids(process.schedule, start, 0.01, 80.0), start


def table(found: dict[str, Any]) -> None:
    """Markdown: means over seeds and the range."""
    for problem, by_seed in found.items():
        steps = sorted({s for rows in by_seed.values() for s in rows}, key=int)
        measures = [
            m for m in ("rms", "law", "features", "label") if m in next(iter(by_seed.values()))[steps[0]]["learned"]
        ]
        print(f"\n{problem}, seeds {', '.join(by_seed)}\n")
        print(f"| NFE | sampler | {' | '.join(measures)} | chosen (each seed) |\n|---|---|{'---|' * len(measures)}---|")
        for n in steps:
            some = [rows[n] for rows in by_seed.values() if n in rows]
            for row in (r for r in ("hand-made", "fixed grid", "learned grid", "learned", "fine") if r in some[0]):
                cells = []
                for m in measures:
                    values = [one[row].get(m, np.nan) for one in some]
                    spread = f" ({min(values):.3g} - {max(values):.3g})" if len(values) > 1 else ""
                    cells.append("" if np.isnan(values[0]) else f"{np.mean(values):.3g}{spread}")
                what = "; ".join(dict.fromkeys(one[row].get("what", "") for one in some))
                print(f"| {n} | {row} | {' | '.join(cells)} | {what} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("mixture", "mnist", "table"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON of all that was measured")
    parser.add_argument("--run", help="trained run, for mnist")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--num", type=int, default=64, help="noises in each set, for mnist")
    parser.add_argument("--seen", type=int, help="of the second and third sets; default as many")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free, of all samplers, for mnist")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--every", type=int, default=25, help="iterations between looks at the second set")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates of the sampler's search")
    parser.add_argument("--grid-rates", type=float, nargs="*", help="of the grid's; none: no grid is searched")
    parser.add_argument("--fine", type=int, default=1000, help="steps of the fine solution")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="fine", help="what all is learned and chosen by")
    parser.add_argument("--only", nargs="+", metavar="SOLVER", default=list(nfe.DETERMINISTIC), help="hand-made ones")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.what == "table":
        table(found)
        return
    if arguments.what == "mixture":
        seen, fixed, start = mixture()
        problem = seen
        rates = (0.02, 0.05, 0.2), (0.003, 0.01, 0.03)
    else:
        problem, start = nfe.mnist(arguments.run, arguments.num, arguments.guidance), 1.0
        seen = nfe.mnist(arguments.run, arguments.seen or arguments.num, arguments.guidance)
        fixed, rates = fixed_grids(problem.process.schedule, start, 0.02, 20.0), ((0.1,), (0.02,))
    if arguments.loss != "fine":
        shown()  # now: a search is traced
    if arguments.loss != "fine":
        rates = (), rates[1]
    rates = (rates[0] if arguments.grid_rates is None else arguments.grid_rates, arguments.rates or rates[1])
    for seed in arguments.seeds:
        case = Case(problem, seen, fixed, start, seed, arguments.fine, rates, LOSSES[arguments.loss])
        for steps in arguments.steps:
            began = time.time()
            options = {"batch": arguments.batch, "iterations": arguments.iterations, "every": arguments.every}
            rows = compare(case, steps, arguments.only, **options)
            found.setdefault(arguments.what, {}).setdefault(str(seed), {})[str(steps)] = rows
            arguments.out.write_text(json.dumps(found, indent=1))
            print(f"seed {seed}, {steps} steps, {time.time() - began:.0f} s: {rows}", flush=True)


if __name__ == "__main__":
    main()
