import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import ddjax
from ddjax.config import ConfigError
from ddjax.training import loop, mesh, setup
from ddjax.training.heartbeat import Heartbeat
from ddjax.training.loop import BadStep, train
from ddjax.training.profile import Profile
from ddjax.training.step import make_train_step
from ddjax.training.watch import WINDOW, Losses

from . import toy


def test_the_moments_are_those_of_the_good_losses_and_then_weigh_by_age(x64):
    losses = np.random.default_rng(0).normal(3.0, 0.5, 3 * WINDOW)
    bad = np.random.default_rng(1).random(len(losses)) < 0.1
    after = jax.jit(Losses.after)
    seen, mean, square, good = Losses.none(), 0.0, 0.0, []
    for loss, is_bad in zip(losses, bad, strict=True):
        seen = after(seen, jnp.asarray(np.nan if is_bad else loss), jnp.asarray(is_bad))
        if not is_bad:
            good.append(loss)
            weight = 1 / min(len(good), WINDOW)
            mean, square = mean + weight * (loss - mean), square + weight * (loss**2 - square)
        if len(good) <= WINDOW and good:
            np.testing.assert_allclose([seen.mean, seen.variance], [np.mean(good), np.var(good)], rtol=1e-5)
    assert int(seen.good) == len(good)
    np.testing.assert_allclose([seen.mean, seen.variance], [mean, square - mean**2], rtol=1e-5)


def test_a_spike_is_above_and_never_early():
    seen = Losses(jnp.float32(2.0), jnp.float32(0.25), jnp.int32(WINDOW), jnp.int32(0))
    assert not seen.spike(jnp.float32(2.0 + 3 * 0.49), 3.0)
    assert seen.spike(jnp.float32(2.0 + 3 * 0.51), 3.0)
    assert not seen.spike(jnp.float32(-9.0), 3.0)
    assert not seen._replace(good=jnp.int32(WINDOW - 1)).spike(jnp.float32(99.0), 3.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_is_as_if_it_had_not_been_but_for_its_number(accumulate):
    optimizer = optax.adam(0.1)
    step = jax.jit(make_train_step(toy.objective, toy.apply, optimizer, accumulate=accumulate, skip_bad=True))
    plain = jax.jit(make_train_step(toy.objective, toy.apply, optimizer, accumulate=accumulate))
    batch, broken = toy.batch(8), toy.batch(8)
    broken["x0"][3, 0] = np.nan
    state, metrics = step(toy.state(optimizer, jnp.float32), batch)
    assert metrics["bad"] == 0
    after, metrics = step(state, broken)
    after, again = step(after, broken)
    assert [int(metrics["bad"]), int(again["bad"])] == [1, 2]
    kept = ("params", "ema", "opt_state")
    toy.assert_same([getattr(state, n) for n in kept], [getattr(after, n) for n in kept], atol=0)
    assert int(after.step) == 3
    good, metrics = step(after, batch)
    assert metrics["bad"] == 0
    toy.assert_same(good.params, plain(after, batch)[0].params, atol=0)
    unlike, metrics = plain(state, broken)
    assert metrics["bad"] == 1
    assert any(np.isnan(a).any() for a in toy.leaves(unlike.params))


def test_a_high_loss_is_bad_where_asked():
    def objective(key, apply, params, x0, **options):
        loss = x0.mean() + 0.0 * sum(p.sum() for p in jax.tree.leaves(params))
        return loss, {"loss": loss}

    optimizer = optax.sgd(0.1)
    batch = lambda level: {"x0": np.full((4, 3), level, np.float32)}
    for spike, expected in ((5.0, [0, 1, 0]), (0.0, [0, 0, 0])):
        step = jax.jit(make_train_step(objective, toy.apply, optimizer, spike=spike, skip_bad=True))
        state, found = toy.state(optimizer, jnp.float32), []
        for i in range(WINDOW):
            state, _ = step(state, batch(1.0 + 0.1 * (-1) ** i))
        for level in (1.4, 1.7, 1.1):
            state, metrics = step(state, batch(level))
            found.append(int(metrics["bad"]))
        assert found == expected
    with pytest.raises(ValueError, match="a spike is a positive number"):
        make_train_step(objective, toy.apply, optimizer, spike=-1.0)


def poisoned(monkeypatch, at):
    """Batches of these numbers have weights that make the loss nan; returns the numbers of those that were used."""
    used, place, count = [], mesh.shard_batch, iter(range(10**6))

    def shard_batch(batch, where):
        used.append(number := next(count))
        weights = np.ones(len(batch["x0"]), np.float32)
        return place({**batch, "weights": weights * (np.nan if number in at else 1.0)}, where)

    monkeypatch.setattr(loop, "shard_batch", shard_batch)
    return used


def events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def test_a_bad_batch_stops_with_step_batch_and_last_good(tmp_path, monkeypatch):
    poisoned(monkeypatch, {4})
    with pytest.raises(BadStep) as caught:
        train(tiny.config(train={"eval_every": 0, "sample_every": 0}), tmp_path / "run", show=False)
    text = str(caught.value)
    assert "the loss or its gradient is not finite at step 5 (batch 4 of the data order of seed 0; loss nan" in text
    assert "the last good checkpoint is step 3. Lower config.optimizer.learning_rate" in text
    assert "--config.train.on_bad_step=skip or roll_back" in text
    heartbeat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert heartbeat["state"] == "failed"
    assert heartbeat["error"].startswith("the loss or its gradient is not finite at step 5")
    run = ddjax.load(tmp_path / "run")
    assert run.step == 3
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(run.params))


def quick(**train):
    return tiny.config(train={"eval_every": 0, "sample_every": 0, **train})


@pytest.mark.slow
def test_a_bad_batch_is_skipped(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {4, 5})
    assert train(quick(on_bad_step="skip"), tmp_path / "run").step == 10
    lines = tiny.metrics(tmp_path / "run")
    assert [(m["step"], m.get("skipped_steps")) for m in lines] == [(4, None), (8, 2), (10, None)]
    assert all(np.isfinite(list(m.values())).all() for m in lines)
    assert [e["step"] for e in events(tmp_path / "run")] == [5, 6]
    assert "not finite at step 5 (batch 4" in capsys.readouterr().out
    poisoned(monkeypatch, {4, 5, 6})
    with pytest.raises(BadStep, match=r"at step 7 \(.*\), 3 such steps in a row; the last good"):
        train(quick(on_bad_step="skip", bad_steps=3), tmp_path / "many", show=False)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_bad_batch_is_passed_over_from_the_checkpoint_before_it(tmp_path, monkeypatch, killed):
    with monkeypatch.context() as patch:
        used = poisoned(patch, {4})
        config = quick(on_bad_step="roll_back")
        if killed:  # after the return, before anything new was saved
            place, real = loop.shard_batch, iter(range(100))

            def then_die(batch, mesh):
                if next(real) == 8:
                    raise KeyboardInterrupt
                return place(batch, mesh)

            patch.setattr(loop, "shard_batch", then_die)
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "run", show=False)
            assert not (tmp_path / "run" / "checkpoints" / "6").exists()
            used = None
    with monkeypatch.context() as patch:
        if killed:
            place, real = loop.shard_batch, iter(range(3, 100))  # it goes on from step 3

            def again(batch, mesh):
                bad = next(real) == 4
                weights = np.full(len(batch["x0"]), np.nan if bad else 1.0, np.float32)
                return place({**batch, "weights": weights}, mesh)

            patch.setattr(loop, "shard_batch", again)
            train(config, tmp_path / "run", show=False)
        else:
            used = poisoned(patch, {4})
            train(config, tmp_path / "run", show=False)
            # Step 6 is to be saved: that 5 was bad is known then. After 3 there follow seven steps more.
            assert used == list(range(13))
    (event,) = events(tmp_path / "run")[-1:]
    assert event["step"] == 3
    assert "at step 5 (batch 4 " in event["event"]
    assert "back to step 3, and on with the batches after it" in event["event"]
    assert [m["step"] for m in tiny.metrics(tmp_path / "run")] == [4, 8, 10]
    # By hand: three good steps, then with batches 6 to 12.
    experiment = ddjax.experiment.build(config, loop.load_data(config, "train"))
    _, state, _, step, _ = setup.prepare(experiment)
    batches = experiment.batches(loop.load_data(config, "train"), process_index=0, process_count=1)
    for number in range(13):
        batch = next(batches)
        if number not in (3, 4, 5):
            state, _ = step(state, {**batch, "weights": np.ones(len(batch["x0"]), np.float32)})
    found = ddjax.load(tmp_path / "run")
    toy.assert_same(found.params, state.ema, atol=0)


@pytest.mark.slow
def test_a_run_does_not_return_forever(tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(4, 100)))
    with pytest.raises(BadStep, match=r"after 2 returns to step 3; the last good checkpoint is step 3"):
        train(quick(on_bad_step="roll_back", bad_steps=2), tmp_path / "run", show=False)
    poisoned(monkeypatch, {1})
    assert train(quick(on_bad_step="roll_back"), tmp_path / "early", show=False).step == 10
    assert "back to step 0" in events(tmp_path / "early")[0]["event"]


@pytest.mark.slow
def test_a_run_whose_checkpoints_were_removed_says_so(tmp_path, monkeypatch):
    poisoned(monkeypatch, {4})
    monkeypatch.setattr(loop.Checkpoints, "restore", lambda self, abstract: None)
    with pytest.raises(BadStep, match=r"at step 5 .*, and there is no checkpoint in .*checkpoints to return to"):
        train(quick(on_bad_step="roll_back"), tmp_path / "run", show=False)


@pytest.mark.parametrize(
    ("train_", "words"),
    [
        ({"on_bad_step": "ignore"}, "on_bad_step must be stop, skip, roll_back, got 'ignore'"),
        ({"spike": -1.0}, "config.train.spike must be positive"),
        ({"profile": [0]}, "numbers of steps, from 1; got 0"),
        ({"bad_steps": 0}, "bad_steps must be at least 1"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, train_, words):
    with pytest.raises(ConfigError, match=words):
        train(quick(**train_), tmp_path / "run", show=False)


def test_heartbeat_says_where_and_how_and_not_too_often(tmp_path, monkeypatch):
    path, read = tmp_path / "heartbeat.json", lambda: json.loads(path.read_text())
    with Heartbeat(tmp_path, 9, every=3600.0) as heart:
        assert (read()["state"], read()["step"], read()["of"], read()["process"]) == ("starting", 0, 9, os.getpid())
        heart.beat(1)
        assert (read()["state"], read()["step"]) == ("training", 1)
        heart.beat(2)
        assert read()["step"] == 1  # within the hour
        heart.beat(3, "evaluating")
        assert (read()["state"], read()["step"]) == ("evaluating", 3)
        heart.beat(4)
    assert read()["state"] == "training"
    with Heartbeat(tmp_path, 9, every=1e-9) as heart:
        heart.beat(1)
        heart.beat(2)
        assert read()["step"] == 2
        path.unlink()
    with pytest.raises(RuntimeError), Heartbeat(tmp_path, 9, every=3600.0):
        raise RuntimeError("the disk\nis gone")
    assert (read()["state"], read()["error"]) == ("failed", "the disk")
    path.unlink()
    with Heartbeat(tmp_path, 9, every=0.0) as heart:
        heart.beat(1)
    assert not path.exists()


def test_neighbouring_steps_are_one_trace(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("off"))
    with Profile(tmp_path, [2, 3, 5]) as profile:
        for step in range(1, 6):
            profile.before(step, jnp.ones(1))
            said.append(step)
            profile.after(step, jnp.ones(1))
    assert said == [1, "on", 2, 3, "off", 4, "on", 5, "off"]
    with Profile(tmp_path, [1, 2]) as profile:
        profile.before(1, jnp.ones(1))
    assert said[-2:] == ["on", "off"]


@pytest.mark.slow
def test_a_run_tells_how_it_goes(tmp_path):
    train(quick(profile=[3, 4]), tmp_path / "run", show=False)
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    assert json.loads((tmp_path / "run" / "heartbeat.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0.0 <= line["data_wait"] <= 1.0
        assert line["step_seconds"] * line["steps_per_second"] == pytest.approx(1.0)
        assert line["tokens_per_second"] == pytest.approx(64 * line["examples_per_second"])
        assert line["host_bytes"] > 2**20
        assert "mfu" not in line  # of a CPU nobody knows the peak
        assert any(name.startswith("loss_by_time/") for name in line)
    experiment = ddjax.experiment.build(quick(), loop.load_data(quick(), "train"))
    batch = next(experiment.batches(loop.load_data(quick(), "train"), process_index=0, process_count=1))
    flops = setup.step_flops(experiment, batch)
    assert lines[-1]["flops_per_second"] == pytest.approx(flops * lines[-1]["steps_per_second"])
