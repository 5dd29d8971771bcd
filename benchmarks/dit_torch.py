"""DiT's forward pass and training step beside the same network in torch: the same weights, one run (ddjax[parity]).

    python benchmarks/dit_torch.py --size S/2 --batch 8 --rounds 7 --out dit_torch.json

The torch network is the tests' transcription of facebookresearch/DiT with torch's own fused attention; ours is loaded
from its weights, so that both compute the same numbers (checked before anything is timed). A training step is the mean
squared error of the noise, its gradient and AdamW; float32, eager torch and compiled JAX, each with all cores. All are
called in every round, in another order each; the ratios are within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "interop"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_transformers as theirs
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ddjax import interop
from ddjax.bench_samplers import interleaved, percentiles, spread

SIZES = {"S/2": (384, 12, 6, 2), "S/4": (384, 12, 6, 4), "B/2": (768, 12, 12, 2), "tiny": (64, 2, 2, 2)}
RATE = 1e-4


def attend(qkv: Any, heads: int) -> Any:
    """The transcription's attention as one call of torch's."""
    b, n, w = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, w // (3 * heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w // 3)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="S/2")
    parser.add_argument("--side", type=int, default=32, help="of the latents, of four channels (default: 32)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    width, depth, heads, patch = SIZES[arguments.size]
    rng = np.random.default_rng(0)
    theirs.attend = attend
    network = theirs.DiT(arguments.side, patch, 4, width, depth, heads, 1000)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.from_numpy(rng.normal(size=p.shape).astype(np.float32)) * 0.7 * p[0].numel() ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({name: p.clone().contiguous() for name, p in network.state_dict().items()}, path)
        ours = interop.load(path, "dit", heads=heads)

    shape = (arguments.batch, arguments.side, arguments.side, 4)
    x, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    steps, labels = rng.integers(0, 1000, arguments.batch), rng.integers(0, 1000, arguments.batch)
    batch = jax.tree.map(jnp.asarray, (x, (steps / 999).astype(np.float32), labels, noise))
    first_channels = lambda v: torch.from_numpy(v).permute(0, 3, 1, 2).contiguous()  # noqa: E731
    torch_batch = first_channels(x), torch.from_numpy(steps), torch.from_numpy(labels), first_channels(noise)

    forward = jax.jit(lambda params, x, t, y: ours.apply(params, x, t, y))
    optimizer = optax.adamw(RATE, weight_decay=0.0)

    def step(params, state, x, t, y, noise):
        def loss(params):
            return jnp.mean((ours.apply(params, x, t, y)[..., :4] - noise) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    held = {"params": jax.tree.map(jnp.array, ours.params)}
    held["state"] = optimizer.init(held["params"])
    torch_optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)

    def our_forward():
        return jax.block_until_ready(forward(ours.params, *batch[:3]))

    def their_forward():
        with torch.no_grad():
            return network(*torch_batch[:3])

    def our_step():
        held["params"], held["state"], loss = step(held["params"], held["state"], *batch)
        return float(loss)

    def their_step():
        torch_optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(network(*torch_batch[:3])[:, :4], torch_batch[3])
        loss.backward()
        torch_optimizer.step()
        return float(loss.detach())

    wanted = their_forward().permute(0, 2, 3, 1).numpy()
    error = np.abs(np.asarray(our_forward()) - wanted).max() / np.abs(wanted).max()
    losses = np.array([[our_step(), their_step()] for _ in range(3)])
    if error > 2e-5 or not np.allclose(losses[:, 0], losses[:, 1], rtol=1e-3):
        raise SystemExit(f"these are two networks: outputs differ by {error:.1e}, losses are {losses.tolist()}")
    calls = {"our_forward": our_forward, "their_forward": their_forward, "our_step": our_step, "their_step": their_step}
    seconds = interleaved(calls, arguments.rounds)
    result = {
        "size": arguments.size,
        "batch": arguments.batch,
        "threads": torch.get_num_threads(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "error": float(error),
        "seconds": {name: values.tolist() for name, values in seconds.items()},
        "step_over_torch": percentiles(seconds["our_step"] / seconds["their_step"]),
        "forward_over_torch": percentiles(seconds["our_forward"] / seconds["their_forward"]),
    }
    print(
        f"DiT-{arguments.size}, {arguments.batch} latents of {arguments.side} x {arguments.side} x 4: our time "
        f"over torch's: a training step {spread(result['step_over_torch'])}, "
        f"a forward pass {spread(result['forward_over_torch'])}"
    )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
