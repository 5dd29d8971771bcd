"""Learned samplers: where the search begins, gradients through the loop, validity, files, and what is gained."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import ddjax
from ddjax import grids, random, search, solvers
from ddjax.cli import main
from ddjax.fixtures import GaussianMixture
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked
from ddjax.schedules import CondOT, VPCosine
from ddjax.solvers import learned

KEY = jax.random.key(0)
PROCESS = Gaussian(VPCosine())
MIXTURE = GaussianMixture()
TIMES = grids.uniform(5, start=0.98)
STARTS = {
    "dpm_solver_pp": solvers.dpm_solver_pp,
    "ancestral": solvers.Ancestral,
    "ddim": solvers.DDIM,
    "ddim_half": lambda process: solvers.DDIM(process, 0.5),
    "deis": solvers.deis,
    "unipc": solvers.unipc,
    "lms": solvers.lms,
    "compensated": lambda process: solvers.Multistep(
        process, 3, corrector=True, compensation=(1.0, 0.7, 1.2, 0.9, 1.1)
    ),
}
FEW = ("ancestral",)


def fine(key=KEY, process=PROCESS, times=TIMES, num=256):
    start = float(times[0])
    denoise = MIXTURE.denoise(process)
    options = {"shape": (num, 2), "times": times, "fine": grids.uniform(200, start=start)}
    return search.fine_examples(key, denoise, process, **options)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in STARTS])
def test_the_family_holds_hand_made_solvers(x64, name):
    """Given the same noise, to the last digits; and the search begins there."""
    solver, denoise = STARTS[name](PROCESS), MIXTURE.denoise(PROCESS)
    times = jnp.asarray(np.asarray(TIMES, np.float64))
    family = search.General(learned.written_out(solver, times))
    options = {"shape": (4, 2), "times": times}
    wanted = ddjax.sample(KEY, denoise, PROCESS, solver=solver, **options)
    got = ddjax.sample(KEY, denoise, PROCESS, solver=family.start, **options)
    np.testing.assert_allclose(got.x0, wanted.x0, rtol=0, atol=1e-12)
    assert got.nfe.tolist() == [5] * 4
    prior_keys, step_keys, _ = random.split(random.example_keys(KEY, 4), 3)
    init = PROCESS.prior((4, 2), times[0]).sample(prior_keys)
    drawn = search.draw(step_keys, denoise, *family.make(family.parameters), init)
    np.testing.assert_allclose(drawn, wanted.x0, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("process", [Gaussian(CondOT()), Gaussian(VPCosine(), data_std=2.0)], ids=repr)
def test_from_pure_noise_and_on_single_examples(x64, process):
    """alpha = 0 at the start; a batch of one; one step."""
    for steps in (1, 2):
        times = np.linspace(1.0, 0.0, steps + 1)
        solver, denoise = solvers.deis(process), MIXTURE.denoise(process)
        options = {"shape": (1, 2), "times": times}
        wanted = ddjax.sample(KEY, denoise, process, solver=solver, **options)
        got = ddjax.sample(KEY, denoise, process, solver=learned.written_out(solver, times), **options)
        np.testing.assert_allclose(got.x0, wanted.x0, rtol=0, atol=1e-12)


def wild(family, seed=3):
    """Parameters far from the start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: v + 0.5 * rng.normal(size=v.shape), family.parameters)


@pytest.mark.slow
def test_gradients_through_the_loop_are_finite_differences(x64):
    """Of all coefficients, the noise's and the times, by central differences along two directions."""
    times = np.linspace(0.95, 0.1, 4)
    family = search.General(learned.written_out(solvers.Ancestral(PROCESS), times))
    examples = search.Examples(jnp.asarray([[0.3, -1.0], [1.2, 0.1]]), jnp.ones((2, 2)))
    denoise, point = MIXTURE.denoise(PROCESS), family.parameters
    value = jax.jit(lambda p: search.evaluate(KEY, denoise, family, p, search.to_fine, examples))
    gradient = jax.jit(jax.grad(value))(point)
    for seed in (1, 2):
        way = jax.tree.map(lambda a, b: a - b, wild(family, seed), point)
        ahead, behind = (value(jax.tree.map(lambda a, b, h=h: a + h * b, point, way)) for h in (1e-5, -1e-5))
        along = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
        assert abs(along) > 1e-3
        np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=1e-6)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("end", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_any_parameters_keep_mean_and_variance(end):
    """Of data at one point, where the denoiser is a constant: the states have the law that the process gives them."""
    family = search.General(learned.written_out(solvers.Ancestral(PROCESS), np.linspace(1.0, end, 5)))
    solver, times = family.finish(wild(family))
    assert (np.diff(times) < 0).all()
    np.testing.assert_allclose(times[[0, -1]], [1.0, end], rtol=1e-7)
    assert np.abs(solver.coefficients.tree.noises).min(initial=1, where=np.tri(4, 5, 1) > 0) > 0
    denoise = lambda xt, t, cond=None: Prediction(jnp.full_like(xt, 0.7), "x0")
    drawn = ddjax.sample(
        KEY, denoise, PROCESS, shape=(2000, 20), solver=solver, times=jnp.asarray(times, float), trajectory=True
    )
    alpha, sigma = (np.asarray(f(jnp.asarray(times))) for f in (PROCESS.schedule.alpha, PROCESS.schedule.sigma))
    mean, std = (np.asarray(f(drawn.trajectory, axis=(1, 2))) for f in (np.mean, np.std))
    np.testing.assert_allclose(mean, 0.7 * alpha, atol=0.025)  # 5 standard errors
    np.testing.assert_allclose(std, sigma, atol=0.018)


def test_kernel_distance_by_its_definition(x64):
    """Sums over pairs of different vectors; 0 in the mean for one law."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)) + 1
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    within = lambda v: np.mean([k(a, b) for i, a in enumerate(v) for j, b in enumerate(v) if i != j])
    wanted = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(search.squared_mmd(x, y), wanted)
    examples = search.Examples(jnp.asarray(x), jnp.asarray(y)[:, None])
    np.testing.assert_allclose(search.kernel()(jnp.asarray(x)[:, None], examples), wanted)
    turned = lambda v: v.reshape(len(v), -1) @ jnp.eye(3)[:, ::-1] * jnp.sqrt(0.5)  # half of each product
    k = lambda a, b: (0.5 * a @ b / 3 + 1) ** 3
    wanted = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(search.kernel(turned)(jnp.asarray(x)[:, None], examples), wanted)
    np.testing.assert_allclose(search.reward(lambda x: x.sum(1))(jnp.asarray(x), examples), -x.sum(1).mean())


def example():
    """A sampler of two steps, with noise, that needs all digits."""
    third = 1 / 3
    noises = [[third, np.sqrt(1 - third**2), 0.0], [1.0, 0.0, 0.0]]
    return learned.frozen(PROCESS, [1.0, third, 0.0], [[1.0, 0.0], [-third, 1 + third]], noises)


def test_files_give_back_every_bit(tmp_path):
    solver, path = example(), tmp_path / "sampler.json"
    learned.save(path, solver, loss="fine")
    again = learned.load(path, PROCESS)
    assert again == solver
    assert hash(again) == hash(solver)
    for a, b in zip(again.coefficients.leaves, solver.coefficients.leaves, strict=True):
        assert a.values.tobytes() == b.values.tobytes()
    content = json.loads(path.read_text())
    assert content["steps"] == 2
    assert content["about"] == {"loss": "fine"}
    deterministic = learned.frozen(PROCESS, [1.0, 0.5, 0.0], [[1.0, 0.0], [-0.1, 1.1]])
    learned.save(path, deterministic)
    assert learned.load(path, PROCESS) == deterministic


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "sampler.json"
    learned.save(path, example())
    with pytest.raises(ValueError, match=r"is a sampler of the process Gaussian\(.*VPCosine.*, not of .*CondOT"):
        learned.load(path, Gaussian(CondOT()))
    content = json.loads(path.read_text())
    for change, words in (
        ({"format": "ddjax sampler 0"}, "has 'ddjax sampler 1': search again"),
        ({"predictions": [[1.0, 0.0], [0.5, 1.0]]}, "damaged: in each row predictions' coefficients must sum to 1"),
        ({"predictions": [[1.0]]}, "damaged: 3 times need coefficients of shapes"),
        ({"predictions": [[0.5, 0.5], [0.5, 0.5]]}, "damaged: coefficients of predictions and noises to come"),
        ({"times": [0.0, 0.5, 1.0]}, "damaged: times must decrease"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            learned.load(path, PROCESS)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a sampler that `ddjax search` wrote"):
        learned.load(path, PROCESS)


def test_what_is_not_in_the_family():
    with pytest.raises(ValueError, match=r"more than once a step.*search\.Grid"):
        learned.written_out(solvers.Heun(PROCESS), TIMES)
    with pytest.raises(ValueError, match="does not keep the mean and variance of pure data and noise"):
        learned.written_out(solvers.euler(PROCESS), TIMES)
    with pytest.raises(ValueError, match=r"Learned is for processes\.Gaussian, got Masked"):
        learned.Learned(Masked(3), None)
    with pytest.raises(ValueError, match=r"solvers.Multistep, not DDIM"):
        search.Compensation(solvers.DDIM(PROCESS), TIMES)
    with pytest.raises(ValueError, match="compensation needs a past prediction"):
        search.Compensation(solvers.dpm_solver_pp(PROCESS, 1), TIMES)
    two = dataclasses.replace(solvers.dpm_solver_pp(PROCESS), compensation=(1.0, 0.9))
    with pytest.raises(ValueError, match="what each of 2 steps is: the grid has 5"):
        ddjax.sample(KEY, None, PROCESS, shape=(2, 2), solver=two, times=grids.uniform(5))
    with pytest.raises(ValueError, match="would not see what was corrected"):
        solvers.PredictorCorrector(example(), solvers.Langevin(PROCESS))
    with pytest.raises(ValueError, match="they must agree"):
        search.fine_examples(KEY, None, PROCESS, shape=(2, 2), times=TIMES, fine=grids.uniform(9))
    with pytest.raises(ValueError, match="made for its own times"):
        ddjax.sample(KEY, None, PROCESS, shape=(2, 2), solver=example(), times=TIMES)
    family, starts = search.Grid(solvers.DDIM(PROCESS), TIMES), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="the leading axis of the first states, 4"):
        search.search(KEY, None, family, search.to_fine, search.Examples(starts, jnp.zeros((3, 2))))
    with pytest.raises(ValueError, match="iterations, batch and every must be 1 or more"):
        search.search(KEY, None, family, search.to_fine, search.Examples(starts, starts), iterations=0)
    wrong = search.Examples(starts, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="the leading axis of the first states, 4"):
        search.search(KEY, None, family, search.to_fine, search.Examples(starts, starts), choose=wrong)


@pytest.mark.slow
def test_other_examples_choose_the_iteration():
    """The best of those looked at, by their loss on the other examples; the start where the search leads away from it.

    Of targets that the start reaches exactly on the other examples, and on those searched on never.
    """
    family = search.Grid(solvers.DDIM(PROCESS), TIMES)
    denoise = MIXTURE.denoise(PROCESS)
    some, other = (fine(jax.random.key(seed), num=32) for seed in (1, 2))
    reached = search.draw(random.example_keys(KEY, 32), denoise, *family.make(family.parameters), other.init)
    options = {"iterations": 7, "batch": 8, "every": 3}
    at_start = search.search(
        KEY, denoise, family, search.to_fine, some, choose=other._replace(target=reached), **options
    )
    assert at_start.iteration == 0
    np.testing.assert_array_equal(at_start.times, family.finish(family.parameters)[1])
    assert len(at_start.losses) == 7
    last = search.search(KEY, denoise, family, search.to_fine, some, **options)
    assert last.iteration == 7
    best = search.search(KEY, denoise, family, search.to_fine, some, choose=other, **options)
    looked = {0: family.start.values, 7: last.times}
    assert best.iteration in (0, 3, 6, 7)
    loss = lambda times: distance(family.solver, times, other, denoise)
    assert loss(best.times) <= min(map(loss, looked.values())) * (1 + 1e-5)


@pytest.mark.slow
def test_compensation_by_hand(x64):
    """DPM-Solver++ 2M on predictions that were moved towards the one before, in NumPy; a ratio of 1 does nothing."""
    times, ratios = np.linspace(0.95, 0.2, 5), (1.0, 0.6, 1.3, 0.8)
    rng = np.random.default_rng(0)
    answers, x = rng.normal(size=(4, 1, 2)), rng.normal(size=(1, 2))
    denoise = lambda xt, t, cond=None: Prediction(jnp.asarray(answers)[jnp.argmin(jnp.abs(times - t[0]))], "x0")
    schedule = PROCESS.schedule
    alpha, sigma = (np.asarray(f(jnp.asarray(times))) for f in (schedule.alpha, schedule.sigma))
    level = np.log(alpha / sigma)
    for used in (ratios, (1.0,) * 4):
        state, before = x, None
        for i in range(4):
            y = answers[i] if before is None else used[i] * answers[i] + (1 - used[i]) * before
            h, mixed = level[i + 1] - level[i], y
            if before is not None:
                mixed = y + h / (2 * (level[i] - level[i - 1])) * (y - before)
            state = sigma[i + 1] / sigma[i] * state - alpha[i + 1] * np.expm1(-h) * mixed
            before = y
        solver = dataclasses.replace(solvers.dpm_solver_pp(PROCESS), compensation=used)
        got = ddjax.sample(KEY, denoise, PROCESS, shape=(1, 2), solver=solver, times=times, init=jnp.asarray(x))
        np.testing.assert_allclose(got.x0, state, rtol=1e-10)
        if used != ratios:
            plain = solvers.dpm_solver_pp(PROCESS)
            plain = ddjax.sample(KEY, denoise, PROCESS, shape=(1, 2), solver=plain, times=times, init=jnp.asarray(x))
            np.testing.assert_allclose(got.x0, plain.x0, rtol=1e-12)


def distance(solver, times, examples, denoise):
    drawn = ddjax.sample(
        KEY, denoise, PROCESS, shape=examples.init.shape, solver=solver, times=jnp.asarray(times, float),
        init=examples.init,
    )  # fmt: skip
    return float(search.to_fine(drawn.x0, examples))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 6, 10])
def test_searched_samplers_beat_hand_made_ones(steps):
    """On noise not searched on: the family the best solver and grid, the learned grid the best grid, DC its solver."""
    denoise, schedule, start = MIXTURE.denoise(PROCESS), PROCESS.schedule, 0.99
    low = float(schedule.log_snr(jnp.float32(start)))
    fixed = [
        grids.uniform(steps, start=start),
        grids.quadratic(steps, start=start),
        grids.uniform_log_snr(schedule, steps, start=low, end=8.0),
        grids.uniform_log_snr(schedule, steps, start=low, end=5.0),
    ]
    some, held_out = (fine(jax.random.key(i), times=fixed[0], num=1024) for i in (1, 2))
    makers = (solvers.DDIM, solvers.dpm_solver_pp, solvers.unipc, solvers.deis)
    found = [(distance(make(PROCESS), t, held_out, denoise), i, j)
             for i, make in enumerate(makers) for j, t in enumerate(fixed)]  # fmt: skip
    best, i, j = min(found)

    def learn(family, rate):
        options = {"iterations": 400, "batch": 128, "learning_rate": rate}
        return search.search(KEY, denoise, family, search.to_fine, some, **options)[:2]

    general = distance(
        *learn(search.General(learned.written_out(makers[i](PROCESS), fixed[j])), 0.01), held_out, denoise
    )
    solver = solvers.dpm_solver_pp(PROCESS)
    of_grids, k = min((d, j) for d, i, j in found if i == 1)
    grid = distance(*learn(search.Grid(solver, fixed[k]), 0.05), held_out, denoise)
    ratios = distance(*learn(search.Compensation(solver, fixed[k]), 0.05), held_out, denoise)
    print(f"{steps} steps: best of hand-made {best:.3g}, general {general:.3g}; ", end="")
    print(f"DPM-Solver++ 2M on its best grid {of_grids:.3g}, learned grid {grid:.3g}, ratios {ratios:.3g}")
    assert general < 0.7 * best
    assert grid < 0.9 * of_grids
    assert ratios < of_grids


@pytest.mark.slow
def test_a_search_for_a_law_and_for_a_reward():
    """The kernel distance to data falls; a reward rises."""
    denoise = MIXTURE.denoise(PROCESS)
    family = search.General(learned.written_out(solvers.Ancestral(PROCESS), grids.uniform(5, start=0.99)))
    init = fine(times=family.start.times, num=512).init
    data = MIXTURE.sample(random.example_keys(jax.random.key(5), 512))
    examples = search.Examples(init, data)
    for loss in (search.kernel(), search.reward(lambda x: x[:, 0])):
        found = search.search(KEY, denoise, family, loss, examples, iterations=100, batch=256)
        assert found.losses[-20:].mean() < found.losses[:5].mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["general", "grid"])
def test_memory_does_not_grow_with_the_steps(kind):
    """A network whose inside is 400 times as wide as a state: 50 steps take at most 1.5 times what 5 take."""
    widths = (2, 800, 800, 2)
    weights = [jnp.ones((a, b)) / a for a, b in itertools.pairwise(widths)]

    def denoise(xt, t, cond=None):
        for w in weights:
            xt = jnp.tanh(xt @ w)
        return Prediction(xt, "x0")

    def used(steps):
        times = grids.uniform(steps, start=0.98)
        solver = solvers.dpm_solver_pp(PROCESS)
        family = search.FAMILIES[kind](solver, times)
        examples = search.Examples(jnp.zeros((512, 2)), jnp.zeros((512, 2)))
        gradient = jax.grad(lambda p: search.evaluate(KEY, denoise, family, p, search.to_fine, examples))
        return jax.jit(gradient).lower(family.parameters).compile().memory_analysis().temp_size_in_bytes

    few, many = used(5), used(50)
    print(kind, few, many)
    assert many < 1.5 * few


@pytest.mark.slow
def test_from_a_trained_run_to_samples(tmp_path, capsys, monkeypatch):
    """`ddjax search`, then its file in `ddjax sample` and `run.sample`."""
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    tiny.short_run(tmp_path / "run")
    path, options = tmp_path / "s.json", ["--num", "8", "--iterations", "3"]
    for more in ([], ["--loss", "kernel"], ["--family", "grid"], ["--family", "compensation"]):
        assert (
            main(["search", "--workdir", str(tmp_path / "run"), "--steps", "4", "--out", str(path), *options, *more])
            == 0
        )
        assert "loss on examples not searched on: dpm_solver_pp" in capsys.readouterr().out
    run = ddjax.load(tmp_path / "run")
    x = run.sample(KEY, 3, cond=1, solver=str(path))
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(run.sample(KEY, 3, cond=1, solver=path, steps=4), x)
    np.testing.assert_array_equal(run.sample(KEY, 3, cond=1, solver=learned.load(path, run.process)), x)
    with pytest.raises(ValueError, match="made for 4 steps, not for 7"):
        run.sample(KEY, 3, solver=path, steps=7)
    command = ["sample", "--workdir", str(tmp_path / "run"), "--num", "2", "--out", str(tmp_path / "x.png")]
    assert main([*command, "--solver", str(path)]) == 0
    assert main([*command, "--solver", str(tmp_path / "none.json")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main(["search", "--workdir", str(tmp_path / "run"), "--steps", "4", "--out", "s.txt"]) == 1
    assert "--out must end in .json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="family='wide' is unknown"):
        search.for_run(run, KEY, steps=3, family="wide")
    seen = []

    def own(x0, examples):  # any loss, of samples beside training data
        seen.append((x0.shape, examples.target.shape))
        return search.kernel(lambda x: x.reshape(len(x), -1)[:, :2])(x0, examples)

    assert np.isfinite(search.for_run(run, KEY, steps=2, loss=own, num=4, batch=4, iterations=2).after)
    assert set(seen) == {((4, *run.data.shape), (4, *run.data.shape))}


def test_what_cannot_be_saved_is_refused_before_the_search():
    named = {"heun": solvers.Heun(PROCESS), "ddim": solvers.DDIM(PROCESS)}
    experiment = SimpleNamespace(times=lambda steps: TIMES, solver=named.get)
    run = SimpleNamespace(experiment=experiment, process=PROCESS)
    with pytest.raises(ValueError, match="evaluates the network more than once"):
        search.for_run(run, KEY, steps=5, family="grid", solver="heun")
    with pytest.raises(ValueError, match="loss='near' is unknown; it is one of fine, kernel, or a function"):
        search.for_run(run, KEY, steps=5, loss="near")
    with pytest.raises(ValueError, match="ratios compensate"):
        search.for_run(run, KEY, steps=5, family="compensation", solver="ddim")


def test_a_searched_sampler_is_written_into_a_new_folder(tmp_path, monkeypatch):
    found = search.Report(learned.written_out(solvers.DDIM(PROCESS), TIMES), 1.0, 0.5, None)
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    monkeypatch.setattr("ddjax.commands._load", lambda arguments: SimpleNamespace(step=3))
    monkeypatch.setattr(search, "for_run", lambda *_, **__: found)
    path = tmp_path / "new" / "s.json"
    assert main(["search", "--workdir", "x", "--steps", "5", "--out", str(path)]) == 0
    assert learned.load(path, PROCESS) == found.solver
