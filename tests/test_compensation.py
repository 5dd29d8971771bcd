"""Cascade polynomial regression: exact on polynomials, its errors, files, and what it is worth between settings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import ddjax
from ddjax import compensation, grids, guidance, search, solvers
from ddjax.cli import main
from ddjax.compensation import Searched
from ddjax.fixtures import GaussianMixture
from ddjax.processes import Gaussian
from ddjax.schedules import CondOT, VPCosine

KEY = jax.random.key(0)
SETTINGS = [(n, w) for n in (5, 8, 12) for w in (1.0, 2.0, 4.0)]


def cascaded(steps, scale, coefficients):
    """The regression's law as the paper's code states it: three polynomials, one inside the other, by Horner's rule."""

    def polynomial(values, x):
        total = 0.0
        for value in reversed(values):
            total = total * x + value
        return total

    def ratio(i):
        of_guidance = [[polynomial(own, steps / 50) for own in of_step] for of_step in coefficients]
        return polynomial([polynomial(own, scale / 12) for own in of_guidance], i / steps)

    return [1.0, *(ratio(i) for i in range(2, steps + 1))]


def searched(coefficients, settings=tuple(SETTINGS)):
    return [Searched(n, w, cascaded(n, w, coefficients)) for n, w in settings]


def test_polynomials_are_found_and_predicted():
    """To 1e-8, at settings that were not searched too."""
    coefficients = np.random.default_rng(0).normal(size=(4, 3, 3)).tolist()
    cascade = compensation.regress(searched(coefficients))
    np.testing.assert_allclose(cascade.coefficients.values, coefficients, rtol=0, atol=1e-8)
    for steps, scale in ((5, 1.0), (6, 1.5), (7, 3.3), (11, 2.0), (12, 4.0)):
        got = cascade.ratios(steps, scale)
        np.testing.assert_allclose(got, cascaded(steps, scale, coefficients), rtol=0, atol=1e-8)
        assert len(got) == steps
    lower = compensation.regress(searched([[[0.5]], [[-0.2]]]), (1, 0, 0))
    np.testing.assert_allclose(lower.coefficients.values.ravel(), [0.5, -0.2], atol=1e-12)


def test_the_closest_polynomial_otherwise():
    """Least squares over all settings: what is left is orthogonal to every term (normal equations, written out)."""
    rng = np.random.default_rng(1)
    some = [Searched(n, w, 1 + 0.1 * rng.normal(size=n)) for n, w in SETTINGS]
    cascade = compensation.regress(some, (2, 1, 1))
    for j, k, m in np.ndindex(3, 2, 2):
        left = 0.0
        for n, w, ratios in some:
            made = cascade.ratios(n, w)
            left += sum((made[i - 1] - ratios[i - 1]) * (i / n) ** j * w**k * n**m for i in range(2, n + 1))
        assert abs(left) < 1e-9


def test_degrees_that_settings_tell():
    """One guidance scale, one number of steps, two steps; and what is refused."""
    one = compensation.regress([Searched(5, 1.5, (1.0, 0.9, 1.1, 1.0, 0.7))])
    np.testing.assert_allclose(one.ratios(5, 1.5), (1.0, 0.9, 1.1, 1.0, 0.7), atol=1e-9)
    assert one.coefficients.values.shape == (4, 1, 1)
    two = compensation.regress([Searched(2, 1.0, (1.0, 0.8))])
    np.testing.assert_allclose(two.ratios(2), (1.0, 0.8))
    assert compensation.regress(searched([[[1.0]]])).coefficients.values.shape == (4, 3, 3)
    with pytest.raises(ValueError, match="searched for steps from 5 to 5 and are not known for 6"):
        one.ratios(6, 1.5)
    with pytest.raises(ValueError, match=r"searched for guidance from 1\.5 to 1\.5 and are not known for 1"):
        one.ratios(5)
    with pytest.raises(ValueError, match=r"3 settings cannot tell polynomials of degrees \(3, 1, 1\)"):
        compensation.regress(searched([[[1.0]]], ((5, 1.0), (8, 1.0), (8, 2.0))))
    with pytest.raises(ValueError, match="a ratio for each: got 3 for 4 steps"):
        compensation.regress([Searched(4, 1.0, (1.0, 1.0, 1.0))])
    with pytest.raises(ValueError, match="two steps or more"):
        compensation.regress([Searched(1, 1.0, (1.0,))])
    with pytest.raises(ValueError, match="at least one setting"):
        compensation.regress([])
    with pytest.raises(ValueError, match="finite coefficients with three axes"):
        compensation.Cascade(np.ones((2, 2)), (5, 8), (1, 2))


def test_files_give_back_every_bit(tmp_path):
    process, path = Gaussian(VPCosine()), tmp_path / "ratios.json"
    cascade = compensation.regress(searched(np.random.default_rng(2).normal(size=(2, 2, 2))))
    compensation.save(path, cascade, process, "unipc", note="what it is for")
    again, solver = compensation.load(path, process)
    assert (again, solver) == (cascade, "unipc")
    assert hash(again) == hash(cascade)
    assert again.coefficients.values.tobytes() == cascade.coefficients.values.tobytes()
    with pytest.raises(ValueError, match=r"ratios of the process Gaussian\(.*VPCosine.*, not of .*CondOT"):
        compensation.load(path, Gaussian(CondOT()))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"coefficients": [1.0]}))
    with pytest.raises(ValueError, match="damaged: a cascade has finite coefficients"):
        compensation.load(path, process)
    path.write_text(json.dumps(content | {"format": "ddjax sampler 1"}))
    assert compensation.load(path, process) is None  # another format: `solvers.learned.load` says what is wrong


@pytest.mark.slow
def test_between_settings_nearly_as_good_as_a_search():
    """Ten trajectories a setting; at a setting in between, on noise not searched on."""
    law, process = GaussianMixture(), Gaussian(VPCosine())
    solver = solvers.unipc(process)

    def setting(steps, scale, seed, num):
        times = grids.uniform(steps, start=0.98)
        denoise = guidance.classifier_free(law.denoise(process), null=law.components, scale=scale)
        cond = jnp.arange(num) % law.components
        fine = grids.uniform(200, start=0.98)
        made = search.fine_examples(
            jax.random.key(seed), denoise, process, shape=(num, 2), times=times, fine=fine, cond=cond
        )
        return denoise, times, made

    def ratios(steps, scale):
        denoise, times, examples = setting(steps, scale, 0, 10)
        family, options = search.Compensation(solver, times), {"iterations": 150, "learning_rate": 0.05}
        return search.search(KEY, denoise, family, search.to_fine, examples, **options).solver.compensation

    def error(steps, scale, used):
        denoise, times, held_out = setting(steps, scale, 1, 512)
        own = dataclasses.replace(solver, compensation=used)
        drawn = ddjax.sample(
            KEY, denoise, process, shape=(512, 2), solver=own, times=times, cond=held_out.cond, init=held_out.init
        )
        return float(search.to_fine(drawn.x0, held_out))

    found = [Searched(n, w, ratios(n, w)) for n in (5, 8) for w in (1.5, 3.0, 5.0)]
    cascade = compensation.regress(found)
    for steps, scale in ((6, 2.0), (7, 4.0)):
        plain, between, direct = (
            error(steps, scale, used) for used in (None, cascade.ratios(steps, scale), ratios(steps, scale))
        )
        print(f"{steps} steps, guidance {scale}: none {plain:.3g}, predicted {between:.3g}, searched {direct:.3g}")
        assert between < 0.5 * plain
        assert plain - between > 0.75 * (plain - direct)  # most of what a search gains


@pytest.mark.slow
def test_from_a_trained_run_to_samples(tmp_path, capsys, monkeypatch):
    """`ddjax search` in four settings, then `ddjax sample` and `run.sample` between them."""
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    tiny.short_run(tmp_path / "run")
    path, command = tmp_path / "r.json", ["search", "--workdir", str(tmp_path / "run"), "--num", "8"]
    settings = ["--iterations", "2", "--steps", "3", "5", "--guidance", "1", "3", "--out", str(path)]
    assert main([*command, "--family", "compensation", *settings]) == 0
    assert "5 steps, guidance 3: loss on examples not searched on" in capsys.readouterr().out
    run = ddjax.load(tmp_path / "run")
    cascade, name = compensation.load(path, run.process)
    assert name == "dpm_solver_pp"
    own = dataclasses.replace(solvers.dpm_solver_pp(run.process), compensation=cascade.ratios(4, 2.0))
    wanted = run.sample(KEY, 3, cond=1, solver=own, steps=4, guidance=2.0)
    np.testing.assert_array_equal(run.sample(KEY, 3, cond=1, solver=path, steps=4, guidance=2.0), wanted)
    with pytest.raises(ValueError, match="searched for steps from 3 to 5 and are not known for 6"):
        run.sample(KEY, 3, cond=1, solver=path, steps=6, guidance=2.0)
    drawn = ["sample", "--workdir", str(tmp_path / "run"), "--num", "2", "--out", str(tmp_path / "x.png")]
    assert main([*drawn, "--solver", str(path), "--steps", "4"]) == 0
    assert main([*command, *settings]) == 1
    assert "several --steps or --guidance are for --family compensation" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2 settings cannot tell polynomials"):
        compensation.for_run(run, KEY, steps=(3, 5), degrees=(1, 1, 1))
