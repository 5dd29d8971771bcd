"""Self-attention guidance against diffusers' own functions (the `parity` extra)."""

import ast
import functools
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="install ddjax[parity] to compare with diffusers")
diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")

from ddjax import guidance, taps  # noqa: E402
from ddjax.predictions import Prediction  # noqa: E402
from ddjax.processes import Gaussian  # noqa: E402
from ddjax.schedules import Table  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]
STEP, HEADS, RNG = 300, 2, np.random.default_rng(5)
KINDS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
PROCESS = Gaussian(Table.ddpm_linear())
TIME = np.full(2, STEP / 999)  # their step on our clock
XT, MAP = RNG.normal(size=(2, 16, 12, 4)), RNG.dirichlet(np.full(12, 0.4), size=(2, HEADS, 12))


@functools.cache
def theirs():
    """The four functions by name, taken out of the pipeline's file, whose imports need transformers."""
    path = next(pathlib.Path(diffusers.__file__).parent.rglob("pipeline_stable_diffusion_sag.py"))
    module = ast.parse(path.read_text())
    names = {"sag_masking", "pred_x0", "pred_epsilon", "gaussian_blur_2d"}
    module.body = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name in names]
    found = {"torch": torch, "F": torch.nn.functional}
    exec(compile(module, path, "exec"), found)
    return types.SimpleNamespace(**{name: found[name] for name in names})


def first(x):
    """Channels first, in torch."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def last(x):
    """Channels last, in NumPy."""
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.fixture
def pipeline():
    """`pipeline(kind)`: what the pipeline's methods ask of it. All in float64, the weights of its filter too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)

    def pipeline(kind):
        scheduler = diffusers.DDPMScheduler(prediction_type=KINDS[kind])
        scheduler.alphas_cumprod = torch.from_numpy(np.asarray(PROCESS.schedule.alpha(np.arange(1000) / 999)) ** 2)
        unet = types.SimpleNamespace(config=types.SimpleNamespace(attention_head_dim=HEADS))
        return types.SimpleNamespace(scheduler=scheduler, unet=unet)

    yield pipeline
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_blurred_state_is_theirs(kind, pipeline):
    asked, said = [], RNG.normal(size=XT.shape)

    def denoise(x, t, cond=None):
        asked.append(x)
        taps.tap("part/attention/weights", jnp.asarray(MAP))
        return Prediction(jnp.asarray(said) + 0.1 * (len(asked) - 1), kind)

    scale = 0.75
    guided = guidance.self_attention(denoise, "part", PROCESS, scale=1 + scale)
    out = guided(jnp.asarray(XT), TIME)

    pipe, methods, step = pipeline(kind), theirs(), torch.tensor(STEP)
    x0 = methods.pred_x0(pipe, first(XT), first(said), step)
    noise = methods.pred_epsilon(pipe, first(XT), first(said), step)
    degraded = methods.sag_masking(pipe, x0, torch.tensor(MAP).flatten(0, 1), (4, 3), step, noise)
    assert np.abs(last(degraded) - XT).max() > 0.1
    np.testing.assert_allclose(asked[1], last(degraded), atol=1e-9)

    # Theirs adds up what the network predicts, of the state and of the blurred one; so do we where that is noise.
    plain, weak = first(said), first(said + 0.1)
    if kind != "noise":
        plain = noise
        weak = methods.pred_epsilon(pipe, degraded, weak, step)
        out = PROCESS.convert(out, "noise", jnp.asarray(XT), TIME)
    np.testing.assert_allclose(out.value, last(plain + scale * (plain - weak)), atol=1e-9)


@pytest.mark.parametrize(("kernel", "sigma"), [(9, 1.0), (5, 2.0), (1, 1.0)])
@pytest.mark.usefixtures("pipeline")
def test_the_filter_is_theirs(kernel, sigma):
    """Where all is blurred."""
    asked, even = [], jnp.full((2, 1, 192, 192), 1 / 192)

    def denoise(x, t, cond=None):
        asked.append(x)
        taps.tap("part/attention/weights", even)
        return Prediction(jnp.asarray(XT), "x0")

    guidance.self_attention(denoise, "part", PROCESS, scale=2.0, threshold=0.5, sigma=sigma, kernel=kernel)(
        jnp.zeros_like(XT), TIME
    )
    alpha = np.asarray(PROCESS.schedule.alpha(TIME))[0]
    blurred = last(theirs().gaussian_blur_2d(first(XT), kernel, sigma))
    np.testing.assert_allclose(asked[1] / alpha, blurred - XT, atol=1e-9)
