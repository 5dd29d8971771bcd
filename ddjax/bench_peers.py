"""The time of whole samplers beside diffusers': the same tiny network, the same grid, the same start, one run.

A network that costs almost nothing leaves what the loops themselves cost. Both libraries use all the cores they find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import presets
from ddjax.bench_samplers import interleaved, percentiles, spread
from ddjax.data.dataset import require
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.sampling import sample
from ddjax.schedules import Table
from ddjax.training.provenance import versions

# By the name of ours in `presets.DIFFUSERS`: their class, and its options.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm_solver_multistep": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
CASES = {"images": ((64, 32, 32, 3), 64), "points": ((256, 2), 64)}  # shape, width of the network


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of two layers on the last axis, which is told the time; noise out. Weights are NumPy arrays."""

    inner: np.ndarray  # (channels, width)
    time: np.ndarray  # (width,)
    outer: np.ndarray  # (width, channels)

    @classmethod
    def initial(cls, channels: int, width: int) -> Network:
        """Random weights, of the size that keeps the output of the input's."""
        rng = np.random.default_rng(0)
        shapes = (channels, width), (width,), (width, channels)
        inner, time, outer = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        return cls(inner / channels**0.5, time, outer / width**0.5)

    def in_jax(self) -> Callable[..., Prediction]:
        """As a denoiser of ours."""
        inner, time, outer = map(jnp.asarray, (self.inner, self.time, self.outer))

        def denoise(xt, t, cond=None):
            told = t.reshape(t.shape + (1,) * (xt.ndim - 1)) * time
            return Prediction(jnp.tanh(xt @ inner + told) @ outer, "noise")

        return jax.tree_util.Partial(denoise)

    def in_torch(self, torch: Any) -> Callable[[Any, Any], Any]:
        """As a function of a tensor and a time in [0, 1]."""
        inner, time, outer = map(torch.from_numpy, (self.inner, self.time, self.outer))
        return lambda x, t: torch.tanh(x @ inner + t * time) @ outer


def bench_diffusers(
    *,
    solvers: Sequence[str] = tuple(SCHEDULERS),
    cases: Sequence[str] = tuple(CASES),
    steps: int = 50,
    rounds: int = 10,
) -> dict[str, Any]:
    """Measure `ddjax.sample` beside diffusers' loop and beside the bare calls of the network.

    solvers: names of `SCHEDULERS`. cases: of `CASES`, images 64 x 32 x 32 x 3 and 256 points in the plane.
    steps: of each sampler, one call of the network each. rounds: each times one batch of everything, in another order.

    Returns a dict that JSON can hold; ratios are medians over the rounds with their p10 and p90: `over_network`, our
    time over that of as many calls of the compiled network, one after the other; `over_program`, over that of as many
    calls in one compiled program, which nothing can beat; `speedup`, their time over ours; `difference`, the largest
    of their sample from ours, of the sample's size.
    Raises ImportError where diffusers or torch is missing, ValueError for an unknown name or a number below 1.
    """
    for what, chosen, known in (("solver", solvers, SCHEDULERS), ("case", cases, CASES)):
        for name in chosen:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r} to compare with diffusers; it is one of {', '.join(known)}")
    if steps < 1 or rounds < 1:
        raise ValueError(f"steps and rounds must be at least 1, got {steps} and {rounds}")
    torch = require("torch", "parity", "bench --vs diffusers")
    diffusers = require("diffusers", "parity", "bench --vs diffusers")
    found = {f"{case}, {name}": _compare(torch, diffusers, name, *CASES[case], steps, rounds)
             for case in cases for name in solvers}  # fmt: skip
    return {
        "benchmark": "diffusers",
        "environment": {
            **versions(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "device_kind": jax.devices()[0].device_kind,
        },
        "steps": steps,
        "rounds": rounds,
        "cases": found,
    }


def _compare(torch, diffusers, name, shape, width, steps, rounds) -> dict[str, Any]:
    network = Network.initial(shape[-1], width)
    process, preset = Gaussian(Table.ddpm_linear()), presets.diffusers(name)
    solver, times = preset.solver(process, steps), preset.times(process, steps)
    denoise, key = network.in_jax(), jax.random.key(0)
    noise = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    start = jnp.asarray(noise)  # where it is used: no copy is timed

    def ours():
        drawn = sample(key, denoise, process, shape=shape, solver=solver, times=times, init=start)
        return np.asarray(drawn.x0)

    call = jax.jit(lambda x, t: denoise(x, t).value)
    told = jnp.full(shape[:1], 0.5)

    def calls():
        for _ in range(steps):
            jax.block_until_ready(call(start, told))

    @jax.jit
    def program(x):
        return jax.lax.scan(lambda x, _: (denoise(x, told).value, None), x, None, length=steps)[0]

    make, options = SCHEDULERS[name]
    theirs_of, begin = network.in_torch(torch), torch.from_numpy(noise)

    @torch.no_grad()
    def theirs():
        # A scheduler remembers: each batch needs a new one, or `set_timesteps` again.
        scheduler.set_timesteps(steps)
        x = begin
        for t in scheduler.timesteps:
            x = scheduler.step(theirs_of(scheduler.scale_model_input(x, t), t / (entries - 1)), t, x).prev_sample
        return x.numpy()

    @torch.no_grad()
    def their_calls():
        for _ in range(steps):
            theirs_of(begin, 0.5)

    scheduler = getattr(diffusers, make)(beta_schedule="linear", **options)
    entries = scheduler.config.num_train_timesteps
    sample_of_ours, sample_of_theirs = ours(), theirs()
    seconds = interleaved(
        {
            "ours": ours,
            "calls": calls,
            "program": lambda: jax.block_until_ready(program(start)),
            "theirs": theirs,
            "their_calls": their_calls,
        },
        rounds,
    )
    return {
        "shape": list(shape),
        "batch_s": float(np.median(seconds["ours"])),
        "over_network": percentiles(seconds["ours"] / seconds["calls"]),
        "over_program": percentiles(seconds["ours"] / seconds["program"]),
        "theirs_over_their_network": percentiles(seconds["theirs"] / seconds["their_calls"]),
        "speedup": percentiles(seconds["theirs"] / seconds["ours"]),
        "difference": float(np.abs(sample_of_theirs - sample_of_ours).max() / sample_of_ours.std()),
    }


def format_diffusers(result: Mapping[str, Any]) -> str:
    """The result of `bench_diffusers` as lines to read."""
    about = result["environment"]
    lines = [
        f"{result['steps']} steps with a tiny network, diffusers {about['diffusers']} on torch {about['torch']}, "
        f"jax {about['jax']}, {about['device_kind']}; medians of {result['rounds']} rounds (p10 - p90)"
    ]
    for name, row in result["cases"].items():
        shape = " x ".join(map(str, row["shape"]))
        lines += [
            f"{name} ({shape}): {spread(row['speedup'])} as fast as diffusers; samples within {row['difference']:.1e}",
            f"    over bare network calls {spread(row['over_network'])}, over them in one program "
            f"{spread(row['over_program'])}; theirs {spread(row['theirs_over_their_network'])}",
        ]
    return "\n".join(lines)
