"""Policies among samplers: unbiased slopes by enumeration, the best arm found, the very samples of `ddjax.sample`."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import ddjax
from ddjax import grids, policies, search, solvers
from ddjax.cli import main
from ddjax.evaluation import label_judge
from ddjax.policies import Policy
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked
from ddjax.schedules import CondOT
from ddjax.solvers import DDIM

KEY = jax.random.key(0)
PROCESS = Gaussian(CondOT())
TABLE = np.array([[1.0, 0.2, -0.3], [0.1, 0.9, 0.8], [-0.5, -0.4, 0.6]])  # rewards of three arms for three labels


def bandit(seed=0, hidden=4):
    """A policy of three labels and three arms, away from where it begins."""
    params = policies.initial(jax.random.key(seed), 4, 3, hidden)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: v + rng.normal(size=v.shape), params), policies.encoded(np.arange(3), 3)


@pytest.mark.parametrize("draws", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_mean_estimate_is_the_slope_of_the_expected_reward(x64, draws):
    """Over all actions with their probabilities; the expected reward and its slope by definition, too."""
    params, x = bandit()
    p = np.asarray(jax.nn.softmax(policies.logits(params, x)))
    np.testing.assert_allclose(policies.expected(params, x, jnp.asarray(TABLE)), (p * TABLE).sum() / 3, rtol=1e-12)
    exact = jax.grad(policies.expected)(params, x, jnp.asarray(TABLE))
    # Of one label at a time: their estimates are summands.
    cases = [(label, a) for label in range(3) for a in itertools.product(range(3), repeat=draws)]
    chances = np.array([np.prod(p[label, list(a)]) for label, a in cases]) / 3
    actions = jnp.asarray([a for _, a in cases])[..., None]
    values = jnp.asarray([TABLE[label, list(a)] for label, a in cases])[..., None]
    own = x[np.array([label for label, _ in cases])][:, None]
    each = jax.jit(jax.vmap(jax.grad(policies.surrogate), in_axes=(None, 0, 0, 0)))(params, own, actions, values)
    total = jax.tree.map(lambda v: np.tensordot(chances, v, 1), each)
    for found, wanted in zip(jax.tree.leaves(total), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(exact)) > 1e-2
    # By the logits, as the textbook has it.
    slope = jax.grad(lambda z: (jax.nn.softmax(z) * TABLE).sum(-1).mean())(policies.logits(params, x))
    np.testing.assert_allclose(slope, p * (TABLE - (p * TABLE).sum(-1, keepdims=True)) / 3, rtol=1e-10)
    np.testing.assert_allclose(slope.sum(0), exact["out"]["bias"], rtol=1e-10)


@pytest.mark.parametrize("how", ["table", "drawn", pytest.param("vectors", marks=pytest.mark.slow)])
def test_the_best_arm_of_each_condition_is_found(how):
    labels = np.arange(30) % 3
    options = {"arms": "abc", "iterations": 150, "batch": 15, "learning_rate": 0.1}
    if how == "table":
        policy = policies.fit(KEY, labels, TABLE[labels], classes=3, **options)
    elif how == "drawn":
        asked = []

        def ask(rows, actions):
            asked.append(actions.shape)
            return TABLE[labels[rows], actions]

        policy = policies.fit(KEY, labels, ask, classes=3, draws=4, **options)
        assert set(asked) == {(4, 15)}
    else:
        vectors = np.random.default_rng(0).normal(size=(3, 5))
        policy = policies.fit(KEY, vectors[labels], TABLE[labels], draws=2, **options)
    features = vectors if how == "vectors" else np.arange(3)
    np.testing.assert_array_equal(policy.choose(features), TABLE.argmax(1))
    assert policy.probabilities(features)[np.arange(3), TABLE.argmax(1)].min() > 0.6
    assert isinstance(policy.params["out"]["bias"], np.ndarray)


def denoise(xt, t, cond):
    """Of label 0 all data are at 0.5, where one step is exact; of label 1 at +-1, the nearer the more certain."""
    alpha, sigma = (v[:, None] for v in (1.0 - t, t))
    two = jnp.tanh(alpha * xt / jnp.maximum(sigma**2, 1e-6))
    return Prediction(jnp.where(cond[:, None] == 1, two, 0.5), "x0")


ARMS = [(DDIM(PROCESS), grids.uniform(n, start=0.98)) for n in (1, 3, 12)]


def examples(num, seed):
    cond = np.arange(num) % 2
    fine = grids.uniform(200, start=0.98)
    options = {"shape": (num, 2), "times": ARMS[0][1], "fine": fine, "cond": jnp.asarray(cond)}
    return search.fine_examples(jax.random.key(seed), denoise, PROCESS, **options)


def test_steps_go_where_they_are_worth_it():
    """Two laws of different difficulty: nearer to the fine solution than 3 steps for all, in fewer than 12."""
    some = examples(64, 1)
    table = policies.rewards(KEY, denoise, PROCESS, ARMS, policies.near, some, cost=1e-4)
    assert table.shape == (64, 3)
    np.testing.assert_allclose(table[::2], np.tile([-1e-4, -3e-4, -12e-4], (32, 1)), atol=1e-6)  # exact, less the cost
    policy = policies.fit(KEY, some.cond, table, arms=ARMS, classes=2, iterations=60, learning_rate=0.1)
    held_out = examples(64, 2)
    drawn = policies.sample_by_policy(
        KEY, denoise, PROCESS, policy, shape=(64, 2), cond=held_out.cond, init=held_out.init
    )
    np.testing.assert_array_equal(drawn.choice, np.where(np.arange(64) % 2, 2, 0))
    np.testing.assert_array_equal(drawn.nfe, np.where(np.arange(64) % 2, 12, 1))
    error = lambda x0: -float(policies.near(x0, held_out).mean())
    fixed = [
        ddjax.sample(KEY, denoise, PROCESS, shape=(64, 2), solver=s, times=t, cond=held_out.cond, init=held_out.init)
        for s, t in ARMS
    ]
    np.testing.assert_allclose(error(drawn.x0), error(fixed[2].x0), rtol=1e-4, atol=1e-8)
    assert drawn.nfe.mean() < 0.6 * 12
    assert error(drawn.x0) < 0.2 * error(fixed[1].x0)


@pytest.mark.slow
def test_each_sample_is_the_one_that_its_arm_draws():
    """With the same key and row, whatever else is drawn; noise, conditions, rows and first states go along."""
    arms = [(solvers.Ancestral(PROCESS), grids.uniform(2)), (DDIM(PROCESS, 0.5), grids.uniform(3))]
    rows, choice, cond = np.array([5, 0, 9, 3, 7]), np.array([1, 0, 1, 1, 0]), jnp.asarray([0, 1, 1, 0, 1])
    drawn = policies.sample_by_choice(
        KEY, denoise, PROCESS, arms, choice, shape=(5, 2), cond=cond, rows=rows, init=None
    )
    for arm, (solver, times) in enumerate(arms):
        whole = ddjax.sample(KEY, denoise, PROCESS, shape=(5, 2), solver=solver, times=times, cond=cond, rows=rows)
        own = choice == arm
        np.testing.assert_allclose(drawn.x0[own], whole.x0[own], rtol=1e-6)
        np.testing.assert_array_equal(drawn.nfe[own], len(times) - 1)
    assert len(np.unique(drawn.x0)) == 7  # three of label 1; those of label 0 are 0.5


@pytest.mark.slow
def test_a_classifiers_opinion():
    """Log-probabilities of own labels, of logits, and of a fitted judge, which knows what is real."""
    score = policies.of_label(lambda x: jnp.stack([x[:, 0], -x[:, 0]], axis=-1))
    x = jnp.asarray([[0.3], [-1.0]])
    found = score(x, search.Examples(None, None, jnp.asarray([0, 1])))
    np.testing.assert_allclose(found, -np.log1p(np.exp([-0.6, -2.0])), rtol=1e-6)
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3 + 2
    real = rng.normal(size=(90, 2, 2)) + 4 * labels[:, None, None]
    judge = label_judge(real, labels)
    assert judge(real, labels).mean() > -0.2
    assert judge(real, labels % 3 + 2).mean() < -2
    np.testing.assert_allclose(np.exp([judge(real[:5], np.full(5, k)) for k in (2, 3, 4)]).sum(0), 1.0, rtol=1e-9)
    with pytest.raises(ValueError, match="the label 1 is not among the real ones"):
        judge(real[:1], np.array([1]))


def test_files(tmp_path):
    params = jax.tree.map(lambda v: np.asarray(v, np.float32), bandit()[0])
    policy = Policy(params, ({"steps": 2}, {"steps": 4, "solver": "ddim"}, {"steps": 8}), 3)
    path = tmp_path / "p.json"
    policies.save(path, policy, PROCESS, cost=0.1)
    again = policies.load(path, PROCESS)
    assert (again.arms, again.classes) == (policy.arms, 3)
    np.testing.assert_array_equal(again.probabilities(np.arange(4)), policy.probabilities(np.arange(4)))
    content = json.loads(path.read_text())
    assert content["about"] == {"cost": 0.1}
    with pytest.raises(ValueError, match=r"a policy of the process Gaussian.*not of Masked"):
        policies.load(path, Masked(3))
    for change, message in (
        ({"format": "x"}, "has the format 'x'; a policy has 'ddjax-policy-1'"),
        ({"arms": [{"steps": 2}]}, "is damaged: its parameters are not those of its arms"),
        ({"params": {"out": [1]}}, "is damaged"),
        ({"classes": 7}, "is damaged"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            policies.load(path, PROCESS)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a policy"):
        policies.load(path, PROCESS)
    with pytest.raises(ValueError, match="these are objects"):
        policies.save(path, Policy(params, tuple(ARMS), 3), PROCESS)


def test_errors():
    fit = functools.partial(policies.fit, KEY, np.arange(3), arms="abc", classes=3)
    late = [*ARMS, (DDIM(PROCESS), grids.uniform(2))]
    rewards = functools.partial(policies.rewards, KEY, denoise, PROCESS, quality=policies.near, cost=0.0)
    policy = Policy(bandit()[0], tuple(ARMS), 3)
    for message, make in {
        r"shape \(examples, arms\), \(3, 3\), got \(3, 2\)": lambda: fit(TABLE[:, :2]),
        "draws must be 2 or more, got 1": lambda: fit(TABLE, draws=1),
        "draws must be 2 or more, got None": lambda: fit(lambda rows, actions: 0),
        "rewards must be finite": lambda: fit(TABLE + np.array([0, np.nan, 0])),
        "at least one iteration": lambda: fit(TABLE, iterations=0),
        r"chooses by labels \(n,\), 0 to 3, got float": lambda: policy.choose(np.ones((2, 3))),
        r"chooses by vectors \(n, dims\), got int": lambda: policies.encoded(np.arange(3), None),
        "must begin at one time": lambda: rewards(arms=late, examples=search.Examples(jnp.zeros((1, 2)))),
        "features of 3 examples, but shape": lambda: policies.sample_by_policy(
            KEY, denoise, PROCESS, policy, shape=(2, 2), features=np.arange(3)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
def test_from_a_trained_run_to_samples(tmp_path, capsys, monkeypatch):
    """`ddjax search --family policy`, then its file in `ddjax sample` and `run.sample`: the samples of its arms."""
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    tiny.short_run(tmp_path / "run")
    workdir, path = ["--workdir", str(tmp_path / "run")], tmp_path / "p.json"
    command = ["search", *workdir, "--family", "policy", "--out", str(path), "--num", "20", "--iterations", "5"]
    assert main([*command, "--steps", "2", "4", "--cost", "0.01"]) == 0
    assert "on examples not learned on: the policy" in capsys.readouterr().out
    assert main([*command, "--steps", "2", "4", "--loss", "label"]) == 0
    assert main([*command, "--steps", "2"]) == 1
    assert "two numbers of steps or more" in capsys.readouterr().err
    assert main([*command, "--steps", "2", "4", "--solver", "ancestral"]) == 1
    assert "the solver 'ancestral' draws" in capsys.readouterr().err
    assert main([*command[:-6], "--family", "grid", "--steps", "2", "4", "--out", str(path)]) == 1
    assert "several --steps or --guidance are for" in capsys.readouterr().err

    run = ddjax.load(tmp_path / "run")
    policy = policies.load(path, run.process)
    params = jax.tree.map(np.zeros_like, policy.params)
    params["out"]["bias"] = np.array([0.0, 0.1])
    params["hidden"]["weight"][0], params["out"]["weight"][:, 0] = 1.0, 1.0  # label 0 alone takes the first
    policies.save(path, Policy(params, policy.arms, policy.classes), run.process)
    cond = np.array([0, 3, 0, 7, 0])
    drawn = np.asarray(run.sample(KEY, 5, cond=cond, policy=path, batch_size=2))
    for steps, own in ((2, cond == 0), (4, cond != 0)):
        alone = np.asarray(run.sample(KEY, 5, cond=cond, solver="dpm_solver_pp", steps=steps))
        np.testing.assert_allclose(drawn[own], alone[own], atol=1e-5)
        assert np.abs(drawn[~own] - alone[~own]).max() > 1e-3
    picture = ["--out", str(tmp_path / "s.npy"), "--num", "3", "--seed", "0"]
    assert main(["sample", *workdir, *picture, "--policy", str(path)]) == 0
    np.testing.assert_allclose(
        np.load(tmp_path / "s.npy"), run.sample(KEY, 3, cond=np.arange(3), policy=path), atol=1e-5
    )
    with pytest.raises(ValueError, match="leave out these"):
        run.sample(KEY, 1, cond=0, policy=path, steps=3)
    with pytest.raises(ValueError, match="chooses by label: give cond"):
        run.sample(KEY, 1, policy=path)
