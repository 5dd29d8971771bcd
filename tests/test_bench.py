"""The bench's numbers agree with each other and survive JSON. No time is asserted."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ddjax import bench, bench_cases, chips, flops
from ddjax.config import ConfigError, default, typed
from ddjax.experiment import build, load_data
from ddjax.training import setup


def tiny(depth=1, **denoiser):
    config = default()
    config.denoiser.options = {"width": 16, "depth": depth, "heads": 2, **denoiser}
    config.train.batch_size = 16
    return config


@pytest.fixture(scope="module")
def trained():
    return bench.bench_train(typed(tiny()), steps=3, warmup=1)


@pytest.fixture(scope="module")
def sampled():
    config = tiny()
    config.sample.guidance = 1.5
    return bench.bench_sample(typed(config), num=8, steps=4, repeats=2)


COMMON = {
    "benchmark", "config", "environment", "parameters", "sites", "warmup", "lower_s", "compile_s", "examples_per_s",
    "tokens_per_s", "flops", "flop_per_s", "peak_flop_per_s", "mfu", "memory",
}  # fmt: skip
KEYS = {
    "train": COMMON | {"batch_size", "steps", "init_s", "step_s"},
    "sample": COMMON | {"num", "solver_steps", "repeats", "batch_s", "nfe", "network_call_s", "solver_overhead"},
}


@pytest.mark.parametrize("name", ["trained", pytest.param("sampled", marks=pytest.mark.slow)])
def test_result_is_whole(name, request):
    result = request.getfixturevalue(name)
    assert result.keys() == KEYS[result["benchmark"]]
    for key, value in result.items():
        if isinstance(value, int | float) and key != "warmup":
            assert value > 0, key
    about = result["environment"]
    assert all(about[k] for k in ("ddjax", "jax", "jaxlib", "flax", "numpy", "python", "device_kind"))
    assert about["platform"] == "cpu"
    assert result["peak_flop_per_s"] is None
    assert result["mfu"] is None
    assert typed(result["config"]).denoiser.options["width"] == 16


@pytest.mark.parametrize("name", ["trained", pytest.param("sampled", marks=pytest.mark.slow)])
def test_numbers_agree(name, request):
    result = request.getfixturevalue(name)
    seconds, examples = (result["step_s"], 16) if name == "trained" else (result["batch_s"], 8)
    assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
    assert result["examples_per_s"] * seconds["median"] == pytest.approx(examples)
    assert result["sites"] == 64
    assert result["tokens_per_s"] == pytest.approx(64 * result["examples_per_s"])
    assert result["flop_per_s"] * seconds["median"] == pytest.approx(result["flops"])
    memory = result["memory"]
    sizes = memory["executable"]
    assert memory["source"] == "executable"  # a CPU's allocator does not tell
    assert sizes["total"] == sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    assert memory["peak_bytes"] == sizes["total"]
    assert memory["host_peak_bytes"] > memory["peak_bytes"] > 0


@pytest.mark.slow
def test_train_uses_the_whole_mesh_and_donates(trained):
    assert trained["environment"]["device_count"] == jax.device_count() == 8
    # Parameters, average and both moments: four float32 copies that the output takes over.
    assert trained["memory"]["executable"]["alias"] >= 4 * 4 * trained["parameters"]


@pytest.mark.slow
def test_sampling_counts_evaluations(sampled):
    assert sampled["nfe"] == 4 * 2  # guidance doubles
    per_call = sampled["flops"] / sampled["nfe"]
    assert per_call == int(per_call)
    calls = sampled["nfe"] * sampled["network_call_s"]["median"]
    assert sampled["solver_overhead"] * calls == pytest.approx(sampled["batch_s"]["median"])


@pytest.mark.slow
def test_model_flops_are_those_of_the_plain_network(trained):
    """Scanned, recomputed and accumulated programs compute the same model."""

    def count(config, as_model):
        _, experiment = bench._load(typed(config))
        experiment = setup.as_model(experiment) if as_model else experiment
        state = jax.eval_shape(lambda key: setup.initial_state(experiment, key), jax.random.key(0))
        batch = jax.eval_shape(lambda: {"x0": np.zeros((16, 8, 8, 1), np.int32), "cond": np.zeros(16, np.int32)})
        return flops.count(setup.train_step(experiment), state, batch)

    assert count(tiny(), False) == trained["flops"]
    config = tiny(depth=3, scan=True, remat=True)
    config.train.accumulate = 2
    assert count(config, True) == count(tiny(depth=3), False) < count(config, False)


@pytest.mark.slow
def test_continuous_states_have_no_tokens():
    config = tiny()
    config.data.tokens, config.process.name, config.process.schedule = False, "gaussian", "vp_cosine"
    config.denoiser.kind, config.objective.name = "noise", "gaussian"
    config.sample.solver = "ddim"
    result = bench.bench_sample(typed(config), num=8, steps=2, repeats=1)
    assert result["tokens_per_s"] is None
    assert result["nfe"] == 2
    assert "tokens/s" not in bench.format_report(result)


@pytest.mark.slow
def test_a_batch_has_what_the_process_and_the_objective_need():
    """A velocity beside the data; noise paired with them; a noise level."""
    config = tiny()
    config.data.tokens, config.process.name, config.process.schedule = False, "critically_damped", "vp_linear"
    config.denoiser.kind, config.sample.solver = "x0", "ancestral"
    result = bench.bench_sample(typed(config), num=2, steps=2, repeats=1)
    assert result["nfe"] == 2
    config.process.name, config.process.schedule, config.denoiser.kind = "interpolant", "linear", "velocity"
    config.objective.name, config.objective.options = "interpolant", {"coupling": "transported", "group": 4}
    assert set(bench._Stepper(*bench._load(typed(config))[::-1]).batch["cond"]) == {"x1", "cond"}
    config.process.name, config.process.schedule, config.data.noise = "gaussian", "ve", {"sigma": 0.1}
    config.objective.name, config.objective.options, config.denoiser.kind = "ambient", {}, "x0"
    assert bench.bench_train(typed(config), steps=1, warmup=0)["step_s"]["median"] > 0


@pytest.mark.parametrize("name", ["trained", pytest.param("sampled", marks=pytest.mark.slow)])
def test_json_round_trip_and_report(name, request, tmp_path):
    result = request.getfixturevalue(name)
    path = tmp_path / "new" / "result.json"
    bench.write(result, path)
    again = json.loads(path.read_text())
    assert again == result
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    report = bench.format_report(again)
    device = "1 x cpu" if name == "sampled" else "8 x cpu"
    for words in ("digits, masked process, dit denoiser", device, "tokens/s", "FLOP/s", "compile"):
        assert words in report
    assert ("solver overhead" in report) == (name == "sampled")


def test_report_says_mfu(trained):
    gpu = {**trained, "mfu": 0.4123, "peak_flop_per_s": 989e12}
    assert "41.2% of the peak" in bench.format_report(gpu)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    assert chips.peak_flop_per_s(kind) == (tera and tera * 1e12)


def test_the_cache_does_not_hide_compilation(tmp_path):
    """A program that the persistent cache holds is compiled all the same, and the cache works again afterwards."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    hits = []
    listener = lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
    jax.monitoring.register_event_listener(listener)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    reset_cache()
    try:
        fresh = lambda: jax.jit(lambda x: jax.numpy.sin(x) * 17)
        fresh().lower(1.0).compile()
        assert any(tmp_path.iterdir())
        bench._compile(fresh(), 1.0)
        assert not hits
        fresh().lower(1.0).compile()
        assert hits
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        reset_cache()
        jax.monitoring.clear_event_listeners()


def test_bad_arguments_are_named():
    config = typed(tiny())
    with pytest.raises(ValueError, match="steps must be at least 1"):
        bench.bench_train(config, steps=0)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        bench.bench_sample(config, repeats=0)
    with pytest.raises(ValueError, match="unknown objective 'x'; it is one of masked elbo"):
        bench.bench_objectives(config, names=("x",))
    with pytest.raises(ConfigError, match="schedule"):
        bench.bench_train(dataclasses.replace(config, process=dataclasses.replace(config.process, schedule="none")))


@pytest.mark.slow
def test_objectives_are_compared_round_by_round(monkeypatch):
    names = ("masked elbo", "symbol_polynomial genmd4")
    slowness = [s for s in (9.0, 1.0, 10.0, 100.0) for _ in names]  # a warm-up round, then three on slower machines
    costs = {"masked": [1.0, 1.0, 1.0, 1.0], "symbol_polynomial": [1.0, 2.0, 3.0, 2.5]}
    monkeypatch.setattr(
        bench._Stepper, "__call__", lambda self: slowness.pop(0) * costs[self.experiment.config.process.name].pop(0)
    )
    result = bench.bench_objectives(typed(tiny()), names=names, vocabulary=5, rounds=3, warmup=1)
    assert json.loads(json.dumps(result)) == result
    assert (result["num_symbols"], result["step_s"]) == (5, 10.0)
    first, second = (result["objectives"][name] for name in names)
    assert (first["median"], first["memory_ratio"]) == (1.0, 1.0)
    assert second["median"] == 2.5
    assert second["memory_ratio"] == pytest.approx(second["memory"] / first["memory"])
    report = bench.format_objectives(result)
    assert "5 symbols" in report
    assert "x2.500 (" in report


TOKENS, VALUES = bench_cases.TOKENS | bench_cases.TOKENS_BY_NAME, bench_cases.VALUES


@pytest.mark.parametrize("name", [*TOKENS, *VALUES])
def test_every_objective_of_the_bench_builds(name):
    sections = tiny()
    if name in VALUES:
        sections.data.tokens = False
    case = (TOKENS | VALUES)[name]
    build(case.of(typed(sections)), case.data(load_data(typed(sections), "train")))


def test_the_cases_are_those_of_the_data():
    assert bench_cases.cases(None)[0] is VALUES
    assert bench_cases.cases(5)[0] | bench_cases.cases(5)[1] == TOKENS
