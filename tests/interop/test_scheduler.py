"""A diffusers pipeline by one call: what its own scheduler says, against the scheduler itself; what is refused."""

import functools
import json

import beside_torch
import jax
import numpy as np
import pytest
from beside_torch import drawn
from safetensors.numpy import load_file, save_file

from ddjax import interop, solvers
from ddjax.interop import scheduler, tensors
from ddjax.processes import Gaussian

SIDE, B, CLASSES = 8, 2, 5
CHAIN = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

close = functools.partial(beside_torch.close, rtol=3e-4)


def said(found=None, **given):
    return scheduler.settings({} if found is None else {"scheduler": found}, given)


# -- without torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler 'ScoreSdeVeScheduler' is not known: expected one of DDPM"),
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace' is not known: expected one of 'linear', 'scaled_l"),
        ({"prediction_type": "flow"}, "prediction_type='flow' is not known: expected one of 'epsilon', 'sample'"),
        ({"prediction_type": "flow_prediction"}, "is of FlowMatchEulerDiscreteScheduler, not of DDPMScheduler"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is not known"),
        ({"variance_type": "learned"}, "variance_type='learned' is not known: expected one of 'fixed_small'"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous' is not known: expected 'discrete'"),
        ({"rescale_betas_zero_snr": True}, "prediction_type='epsilon': where nothing is left of the data"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for num_train_timesteps=1000"),
        ({"beta_start": ...}, "does not say beta_start, nor trained_betas"),
        ({"beta_schedule": ...}, "does not say beta_schedule"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, message):
    found = {n: v for n, v in (CHAIN | changes).items() if v is not ...}
    with pytest.raises(ValueError, match=message):
        said(found)


@pytest.mark.parametrize(
    "option", ["use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "stochastic_sampling"]
)
def test_flows_of_other_kinds_are_refused(option):
    with pytest.raises(ValueError, match=rf"{option}=True is not known: expected False"):
        said(FLOW | {option: True})


def test_what_the_file_leaves_out_is_its_class_own():
    ddpm = said(CHAIN)
    assert (ddpm["timestep_spacing"], ddpm["clip_sample"]) == ("leading", True)
    euler = said(CHAIN | {"_class_name": "EulerDiscreteScheduler"})
    assert (euler["timestep_spacing"], euler["clip_sample"]) == ("linspace", False)
    assert said() == scheduler.CHAIN
    assert said(CHAIN, clip_sample=False, prediction_type="sample")["prediction_type"] == "sample"
    assert said(prediction_type="flow_prediction", shift=2) == scheduler.STRAIGHT | {"shift": 2.0}
    with pytest.raises(ValueError, match="gives no variances"):
        scheduler.model(said(CHAIN | {"variance_type": "learned_range"}), learned=False)


def test_steps_of_a_chain():
    def steps(n, spacing, chain=1000, offset=0):
        return np.round(scheduler.spaced_steps(n, chain=chain, spacing=spacing, offset=offset) * (chain - 1))

    np.testing.assert_array_equal(steps(4, "leading", offset=1), [751, 501, 251, 1])
    np.testing.assert_array_equal(steps(4, "trailing"), [999, 749, 499, 249])
    np.testing.assert_array_equal(steps(4, "linspace"), [999, 666, 333, 0])
    np.testing.assert_array_equal(steps(3, "leading", chain=10), [6, 3, 0])
    for wrong in (1, 11):
        with pytest.raises(ValueError, match="expected 2 to 10"):
            steps(wrong, "trailing", chain=10)
    with pytest.raises(ValueError, match="steps_offset=1 begin at 10"):
        steps(10, "leading", chain=10, offset=1)
    np.testing.assert_allclose(scheduler.flow_steps(2, chain=4, shift=1.0), [1.0, 0.25, 0.0])
    # 1/4 is moved to 3/6, and once more to (3/2)/2.
    np.testing.assert_allclose(scheduler.flow_steps(2, chain=4, shift=3.0), [1.0, 0.75, 0.0])


def test_a_chain_that_ends_in_noise_alone():
    s = said(CHAIN | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    schedule, plain = scheduler.model(s)["process"].schedule, scheduler.model(said(CHAIN))["process"].schedule
    assert float(schedule.alpha(np.float32(1.0))) < 2e-6
    a = np.asarray(plain.alpha(np.float32(np.arange(1000) / 999)), np.float64)
    wanted = (a - a[-1]) * a[0] / (a[0] - a[-1])  # Lin et al. 2024, algorithm 1
    np.testing.assert_allclose(schedule.alpha(np.float32(np.arange(1000) / 999)), wanted, rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_no_pipeline_of_ours(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match="a pipeline of vae: expected one of unet or transformer"):
        tensors.open_tensors(tmp_path)


@pytest.mark.parametrize("index", tensors.INDEX)
def test_an_index_of_either_name(tmp_path, index):
    wanted = {"a": np.arange(3, dtype=np.float32), "b": np.ones(2, np.float32)}
    for i, name in enumerate(wanted):
        save_file({name: wanted[name]}, tmp_path / f"{i}.safetensors")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}))
    read = tensors.open_tensors(tmp_path)[0]
    assert set(read) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(read[name], wanted[name])


def test_where_the_scheduler_is_found(tmp_path):
    weights = {"a": np.ones(1, np.float32)}
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    save_file(weights, tmp_path / "unet/model.safetensors")
    for path in (tmp_path / "unet", tmp_path / "unet/model.safetensors"):
        assert tensors.open_tensors(path)[1] == {}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(CHAIN))
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    for path in (tmp_path, tmp_path / "unet", tmp_path / "unet/model.safetensors"):
        assert tensors.open_tensors(path)[1] == {"scheduler": CHAIN}
    (tmp_path / "unet/scheduler_config.json").write_text(json.dumps(FLOW))
    assert tensors.open_tensors(tmp_path)[1] == {"scheduler": FLOW}  # what lies nearest


# -- against diffusers ---------------------------------------------------------------------------------------------


def diffusers():
    pytest.importorskip("torch", reason="install ddjax[parity] to compare with diffusers")
    return pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")


def randomised(module):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.state_dict().values():
            std = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return module.eval()


def unet(**options):
    return randomised(
        diffusers().UNet2DModel(
            sample_size=SIDE, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **options,
        )
    )  # fmt: skip


def looped(sampler, module, y, steps, **more):
    """The pipelines' loop."""
    import torch

    sampler.set_timesteps(steps)
    with torch.no_grad():
        for t in sampler.timesteps:
            out = module(y, t.expand(len(y)) if t.ndim == 0 else t, **more).sample
            y = sampler.step(out, t, y).prev_sample
    return y


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULERS = {
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "cosine": COSINE,
    "cosine v trailing": {**COSINE, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    "short": {"num_train_timesteps": 40, "beta_end": 0.3, "prediction_type": "v_prediction"},
    "given": {"num_train_timesteps": 40, "trained_betas": list(np.linspace(1e-3, 0.3, 40) ** 1.5)},
    "no end": {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_ddim_of_a_pipeline(tmp_path, name):
    sampler = diffusers().DDIMScheduler(clip_sample=False, **SCHEDULERS[name])
    module = unet()
    diffusers().DDIMPipeline(module, sampler).save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    assert model.report.whole
    assert "DDIMScheduler: predicts" in str(model.report)
    x, y = drawn(B, SIDE, SIDE, 3)
    wanted = looped(sampler, module, y, 5)
    close(model.sample(jax.random.key(0), B, steps=5, init=x).x0, wanted)
    # As ours, and in the place of no file, by name.
    model.save(tmp_path / "ours.safetensors")
    again = interop.load(tmp_path / "ours.safetensors")
    assert again.settings == model.settings
    close(again.sample(jax.random.key(0), B, steps=5, init=x).x0, wanted)
    (tmp_path / "scheduler/scheduler_config.json").unlink()
    given = {"clip_sample": False, "scheduler": "DDIMScheduler", **SCHEDULERS[name]}
    told = interop.load(tmp_path, **({"timestep_spacing": "leading"} | given))
    close(told.sample(jax.random.key(0), B, steps=5, init=x).x0, wanted)


DDPM = {
    "clipped": {},
    "clipped v, its widest": {"prediction_type": "v_prediction", "variance_type": "fixed_large"},
    "wide": {"clip_sample_range": 2.5, "variance_type": "fixed_small_log", "prediction_type": "sample"},
    "dynamic": {"thresholding": True, "sample_max_value": 1.7, "dynamic_thresholding_ratio": 0.9},
    "sigmoid": {"beta_schedule": "sigmoid", "clip_sample": False},
    "learned": {"variance_type": "learned_range"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DDPM)
def test_ddpm_of_a_pipeline(tmp_path, monkeypatch, name):
    sampler = diffusers().DDPMScheduler(**DDPM[name])
    module = unet(out_channels=6 if name == "learned" else 3)
    diffusers().DDPMPipeline(module, sampler).save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    x, y = drawn(B, SIDE, SIDE, 3)
    z, normals = drawn(5, B, SIDE, SIDE, 3, seed=1)
    left = list(normals)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: left.pop(0))
    wanted = looped(sampler, module, y, 5)
    ours = model.sample(
        jax.random.key(0), B, steps=5, init=x, solver=solvers.Ancestral(model.process, solvers.noise.Given(z[:4]))
    )
    close(ours.x0, wanted)
    assert isinstance(model.model.solver(model.process), solvers.Ancestral)


@pytest.mark.slow
def test_a_dit_with_labels_and_guidance(tmp_path):
    import torch

    sampler = diffusers().DDIMScheduler(clip_sample=False, prediction_type="v_prediction", num_train_timesteps=200)
    module = randomised(
        diffusers().DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=SIDE,
            patch_size=2, num_embeds_ada_norm=CLASSES,
        )
    )  # fmt: skip
    vae = diffusers().AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=SIDE)
    diffusers().DiTPipeline(module, vae, sampler).save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    assert (model.family, model.kind, model.report.whole) == ("diffusers_dit", "v", True)
    labels = np.int32([1, 4])
    x, y = drawn(B, SIDE, SIDE, 4)
    sampler.set_timesteps(4)
    with torch.no_grad():
        for t in sampler.timesteps:
            every = [torch.from_numpy(labels).long(), torch.full((B,), CLASSES)]
            with_, without = (module(y, t.expand(B), class_labels=one).sample[:, :4] for one in every)
            y = sampler.step(without + 1.5 * (with_ - without), t, y).prev_sample
    close(model.sample(jax.random.key(0), B, labels, guidance=1.5, steps=4, init=x).x0, y)
    assert interop.load(tmp_path / "vae").family == "diffusers_vae"


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow(tmp_path, shift):
    sampler = diffusers().FlowMatchEulerDiscreteScheduler(shift=shift)
    module = unet()
    module.save_pretrained(tmp_path / "unet", max_shard_size="5KB")
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").exists()
    sampler.save_pretrained(tmp_path / "scheduler")
    model = interop.load(tmp_path / "unet")
    assert model.kind == "velocity"
    assert type(model.process) is Gaussian
    x, y = drawn(B, SIDE, SIDE, 3)
    out = model.sample(jax.random.key(0), B, steps=4, init=x)
    close(out.x0, looped(sampler, module, y, 4))
    np.testing.assert_array_equal(out.nfe, 4)
    files = [load_file(path) for path in sorted((tmp_path / "unet").glob("*.safetensors"))]
    assert len(files) > 2
    model.export(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name, value in {n: v for file in files for n, v in file.items()}.items():
        np.testing.assert_array_equal(again[name], value)


@pytest.mark.slow
def test_without_a_scheduler_the_report_says_what_is_taken(tmp_path):
    unet().save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    assert (
        "no scheduler was found: taken to predict noise (epsilon) on 1000 betas, linear from 0.0001 to 0.02 "
        "(else: prediction_type=, beta_schedule=, ...)" in str(model.report)
    )
    with pytest.raises(ValueError, match=r"no settings \['prediction'\]; it has .*prediction_type"):
        interop.load(tmp_path, prediction="v")
