"""Which sampler for which condition: a light network learned by policy gradient, the diffusion model left as it is.

(Zhang et al. 2024, "AdaDiff: Adaptive Step Selection for Fast Diffusion": numbers of steps, chosen by the prompt.)

    arms = [(solver, grids.uniform(n)) for n in (2, 4, 8, 16)]              # any finite list of samplers
    table = policies.rewards(key, denoise, process, arms, policies.near, examples, cost=0.01)
    policy = policies.fit(key, examples.cond, table, arms=arms, classes=10)
    drawn = policies.sample_by_policy(key, denoise, process, policy, shape=(64, 2), cond=labels)

A reward is a quality of the sample less `cost` times the evaluations of the network spent on it. `fit` has the whole
table of rewards, or asks for those of the arms that it draws (`drawn_rewards`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from ddjax import files
from ddjax.objectives.leave_one_out import leave_one_out
from ddjax.sampling import sample
from ddjax.search import Examples
from ddjax.types import Denoise, Params, PyTree, Sample, State

FORMAT = "ddjax-policy-1"

Features = Int[Array, " n"] | Float[Array, "n dims"]  # labels, or vectors
Quality = Callable[[State, Examples], Float[Array, " n"]]  # of samples, and the examples they began from
Ask = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (rows, actions), one shape -> their rewards


# -- the policy --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A choice among samplers.

    params: of `logits`, plain arrays.
    arms: what is chosen among: (solver, times); or, where a run makes them (`run.sample(policy=)`, files), the keywords
        of `Run.sampler`, such as {"solver": "ddim", "steps": 8}.
    classes: of the labels it chooses by, `classes` itself meaning none; None: it chooses by vectors.
    """

    params: Params
    arms: tuple[Any, ...]
    classes: int | None = None

    def choose(self, features: Features) -> Int[np.ndarray, " n"]:
        """The likeliest arm for each."""
        return np.asarray(jnp.argmax(logits(self.params, encoded(features, self.classes)), axis=-1))

    def probabilities(self, features: Features) -> Float[np.ndarray, "n arms"]:
        """Those of all arms."""
        return np.asarray(jax.nn.softmax(logits(self.params, encoded(features, self.classes))))


def initial(key: Key[Array, ""], inputs: int, arms: int, hidden: int = 32) -> Params:
    """Of a network with one hidden layer, which begins with equal chances; hidden=0: of a linear one."""
    if not hidden:
        return {"out": {"weight": jnp.zeros((inputs, arms)), "bias": jnp.zeros(arms)}}
    weight = jax.random.normal(key, (inputs, hidden)) / np.sqrt(inputs)
    out = {"weight": jnp.zeros((hidden, arms)), "bias": jnp.zeros(arms)}
    return {"hidden": {"weight": weight, "bias": jnp.zeros(hidden)}, "out": out}


def logits(params: Params, x: Float[Array, "n inputs"]) -> Float[Array, "n arms"]:
    """Of the arms."""
    if "hidden" in params:
        x = jnp.tanh(x @ params["hidden"]["weight"] + params["hidden"]["bias"])
    return x @ params["out"]["weight"] + params["out"]["bias"]


def encoded(features: Features, classes: int | None) -> Float[Array, "n inputs"]:
    """What the network is fed: labels one-hot, vectors as they are. Raises ValueError for the other kind."""
    features = jnp.asarray(features)
    whole = jnp.issubdtype(features.dtype, jnp.integer)
    if whole != (classes is not None) or features.ndim != 2 - whole:
        wanted = "vectors (n, dims)" if classes is None else f"labels (n,), 0 to {classes}"
        raise ValueError(f"the policy chooses by {wanted}, got {features.dtype} of shape {features.shape}")
    return jax.nn.one_hot(features, classes + 1, dtype=float) if whole else features


# -- learning ----------------------------------------------------------------------------------------------------


def expected(params: Params, x: Float[Array, "n inputs"], table: Float[Array, "n arms"]) -> Float[Array, ""]:
    """The mean reward of a policy that draws its arms, all rewards given."""
    return (jax.nn.softmax(logits(params, x)) * table).sum(-1).mean()


def surrogate(
    params: Params,
    x: Float[Array, "n inputs"],
    actions: Int[Array, "draws n"],
    rewards: Float[Array, "draws n"],
) -> Float[Array, ""]:
    """0, whose slope is an unbiased estimate of that of `expected`, from the rewards of drawn arms alone.

    REINFORCE; each draw is compared with the mean of the example's others (`objectives.leave_one_out`).
    """
    log_p = jax.nn.log_softmax(logits(params, x))
    log_p = jnp.take_along_axis(jnp.broadcast_to(log_p, (len(actions), *log_p.shape)), actions[..., None], -1)[..., 0]
    return leave_one_out(rewards, log_p).mean()


def fit(
    key: Key[Array, ""],
    features: Features,
    rewards: Float[Array, "n arms"] | Ask,
    *,
    arms: Sequence[Any],
    classes: int | None = None,
    draws: int | None = None,
    hidden: int = 32,
    iterations: int = 500,
    batch: int = 64,
    learning_rate: float = 0.02,
) -> Policy:
    """Adam on the mean reward of examples with these features.

    rewards: of every arm for every example; or a function of rows and actions, both (draws, batch), that gives the
        rewards of these arms for these examples (`drawn_rewards`).
    draws: arms drawn for each example of a batch, 2 or more, for REINFORCE; None: the exact slope, for a table.
    Raises ValueError for a table of another shape, for draws below 2, and where there is neither a table nor draws.
    """
    x = encoded(features, classes)
    count, size = len(x), min(batch, len(x))
    table = None if callable(rewards) else jnp.asarray(rewards)
    if table is not None and table.shape != (count, len(arms)):
        raise ValueError(f"a table of rewards has shape (examples, arms), {(count, len(arms))}, got {table.shape}")
    if (draws is None and table is None) or (draws is not None and draws < 2):
        raise ValueError(f"rewards of drawn arms are compared with each other: draws must be 2 or more, got {draws}")
    if min(iterations, size) < 1:
        raise ValueError(f"at least one iteration and an example are needed, got {iterations} and {size}")
    if table is not None and not np.isfinite(table).all():
        raise ValueError("rewards must be finite: some sampler leaves the finite numbers, leave out that arm")
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, iterations))
    params = initial(jax.random.fold_in(key, iterations), x.shape[1], len(arms), hidden)

    @jax.jit
    def pick(params, i):
        row_key, action_key = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.choice(row_key, count, (size,), replace=False)
        some = logits(params, x[rows])
        return rows, jax.random.categorical(action_key, some, shape=(draws or 1, size))

    def ascend(params, state, slope):
        change, state = optimizer.update(jax.tree.map(jnp.negative, slope), state)
        return optax.apply_updates(params, change), state

    @jax.jit
    def update(params, state, rows, actions, values):
        if draws is None:
            return ascend(params, state, jax.grad(expected)(params, x[rows], table[rows]))
        return ascend(params, state, jax.grad(surrogate)(params, x[rows], actions, values))

    state = optimizer.init(params)
    for i in range(iterations):
        rows, actions = pick(params, i)
        if table is not None:
            values = table[rows, actions]
        else:
            values = jnp.asarray(rewards(np.broadcast_to(rows, actions.shape), np.asarray(actions)), x.dtype)
        params, state = update(params, state, rows, actions, values)
    return Policy(jax.tree.map(np.asarray, params), tuple(arms), classes)


# -- rewards -----------------------------------------------------------------------------------------------------


def near(x0: State, examples: Examples) -> Float[Array, " n"]:
    """Minus the mean squared distance to `examples.target`, such as the fine solution (`search.fine_examples`)."""
    return -jnp.mean((x0 - examples.target) ** 2, axis=tuple(range(1, x0.ndim)))


def of_label(classifier: Callable[[State], Float[Array, "n classes"]]) -> Quality:
    """A classifier's log-probability of the sample's own label, `examples.cond`. classifier: states to logits."""

    def quality(x0: State, examples: Examples) -> Float[Array, " n"]:
        log_p = jax.nn.log_softmax(jnp.asarray(classifier(x0)))
        return jnp.take_along_axis(log_p, jnp.asarray(examples.cond)[:, None], axis=-1)[:, 0]

    return quality


def rewards(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    arms: Sequence[tuple[Any, Array]],
    quality: Quality,
    examples: Examples,
    *,
    cost: float,
) -> Float[np.ndarray, "n arms"]:
    """The reward of every arm for every example: `quality` of the sample less `cost` times its evaluations.

    Raises ValueError where the arms' grids do not begin at one time, that of `examples.init`.
    """
    rows = np.arange(len(examples.init))
    ask = drawn_rewards(key, denoise, process, arms, quality, examples, cost=cost)
    return np.stack([ask(rows[None], np.full((1, len(rows)), arm))[0] for arm in range(len(arms))], axis=-1)


def drawn_rewards(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    arms: Sequence[tuple[Any, Array]],
    quality: Quality,
    examples: Examples,
    *,
    cost: float,
) -> Ask:
    """As `rewards`, of asked arms alone: `fit(rewards=..., draws=...)` then samples no others."""
    _check_starts(arms)

    def ask(rows: np.ndarray, actions: np.ndarray) -> np.ndarray:
        flat = rows.reshape(-1)
        some = jax.tree.map(lambda leaf: jnp.asarray(leaf)[flat], examples)
        drawn = sample_by_choice(
            key, denoise, process, arms, actions.reshape(-1), shape=some.init.shape, cond=some.cond, init=some.init,
            rows=flat,
        )  # fmt: skip
        value = np.asarray(quality(drawn.x0, some) - cost * drawn.nfe)
        return value.reshape(actions.shape)

    return ask


def _check_starts(arms: Sequence[tuple[Any, Array]]) -> None:
    starts = {float(times[0]) for _, times in arms}
    if len(starts) > 1:
        raise ValueError(f"all arms must begin at one time, that of the examples' first states, got {sorted(starts)}")


# -- sampling ----------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """Samples, and by which arm each was drawn."""

    x0: State
    nfe: Int[Array, " batch"]
    choice: Int[np.ndarray, " batch"]


def sample_by_policy(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    policy: Policy,
    *,
    shape: Sequence[int],
    cond: PyTree = None,
    features: Features | None = None,
    **options: Any,
) -> Chosen:
    """Each example by the arm that the policy chooses for its `features` (default: `cond`).

    Every sample is the very one that `ddjax.sample` draws by that arm with the same key and row, but for rounding.
    options: `init`, `observed` and `rows` of `ddjax.sample`.
    """
    choice = policy.choose(cond if features is None else features)
    if choice.shape != (shape[0],):
        raise ValueError(f"there are features of {len(choice)} examples, but shape={tuple(shape)} was asked for")
    drawn = sample_by_choice(key, denoise, process, policy.arms, choice, shape=shape, cond=cond, **options)
    return Chosen(drawn.x0, drawn.nfe, choice)


def sample_by_choice(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    arms: Sequence[tuple[Any, Array]],
    choice: Int[np.ndarray, " batch"],
    *,
    shape: Sequence[int],
    cond: PyTree = None,
    init: State | None = None,
    observed: Any = None,
    rows: Int[np.ndarray, " batch"] | None = None,
) -> Sample:
    """Each example by the arm chosen for it; those of one arm are one batch, filled up to a power of two."""
    rows = np.arange(shape[0]) if rows is None else np.asarray(rows)
    order, x0, nfe = [], [], []
    for arm in np.unique(choice):
        own = np.flatnonzero(choice == arm)
        filled = np.concatenate([own, np.full(2 ** (len(own) - 1).bit_length() - len(own), own[-1])])
        some = jax.tree.map(lambda leaf, filled=filled: jnp.asarray(leaf)[filled], (cond, init, observed))
        solver, times = arms[int(arm)]
        drawn = sample(
            key, denoise, process, shape=(len(filled), *shape[1:]), solver=solver, times=times, cond=some[0],
            init=some[1], observed=some[2], rows=rows[filled],
        )  # fmt: skip
        order.append(own)
        x0.append(drawn.x0[: len(own)])
        nfe.append(drawn.nfe[: len(own)])
    back = np.argsort(np.concatenate(order))
    return Sample(jnp.concatenate(x0)[back], jnp.concatenate(nfe)[back], None)


# -- files -------------------------------------------------------------------------------------------------------


def save(path: str | Path, policy: Policy, process: Any, /, **about: Any) -> None:
    """Write a policy whose arms a run makes, and what it is for, as JSON. about: whatever is worth knowing.

    Raises ValueError for arms that are objects.
    """
    if not all(isinstance(arm, Mapping) for arm in policy.arms):
        raise ValueError("a file holds arms that a run makes, {'solver': ..., 'steps': ...}; these are objects")
    params = jax.tree.map(lambda a: np.asarray(a, np.float64).tolist(), policy.params)
    files.write(path, FORMAT, process, arms=list(policy.arms), classes=policy.classes, params=params, about=about)


def load(path: str | Path, process: Any) -> Policy:
    """Read a policy. Raises ValueError for other files, and for policies of other processes; FileNotFoundError."""
    content = files.read(path, FORMAT, process, "a policy")
    try:
        params = {k: {n: np.asarray(v, np.float32) for n, v in layer.items()} for k, layer in content["params"].items()}
        policy = Policy(params, tuple(content["arms"]), content["classes"])
        inputs = (policy.classes or 0) + 1 if policy.classes is not None else len(next(iter(params.values()))["weight"])
        if logits(params, jnp.zeros((1, inputs))).shape != (1, len(policy.arms)):
            raise ValueError("its parameters are not those of its arms")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return policy


# -- of a trained model ------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """A policy for a trained model, and what it gains, on examples not learned on."""

    policy: Policy
    reward: float  # mean
    evaluations: float  # mean
    fixed: int  # the arm that is best for all
    fixed_reward: float
    fixed_evaluations: float


QUALITIES = ("fine", "label")


def for_run(
    run: Any,
    key: Key[Array, ""],
    *,
    steps: Sequence[int],
    cost: float,
    quality: str = "fine",
    solver: str = "dpm_solver_pp",
    num: int = 256,
    fine_steps: int = 200,
    guidance: float | None = None,
    **options: Any,
) -> Report:
    """Learn numbers of steps by label for a trained run (`ddjax.load`).

    quality: "fine", minus the squared distance to the same solver's solution in `fine_steps`; "label", the
        log-probability that a classifier fitted on the training data gives the sample's own label. cost: of one
        evaluation. num: examples, labels in turn. options: those of `fit`.
    Raises ValueError for data without labels, an unknown quality, and "fine" with a solver that draws.
    """
    from ddjax.evaluation import label_judge
    from ddjax.loading import load_data  # here: the mathematics needs no data sets

    classes = run.data.num_classes
    if quality not in QUALITIES:
        raise ValueError(f"quality={quality!r} is unknown; it is one of {', '.join(QUALITIES)}")
    if not classes:
        raise ValueError(f"a policy chooses by label, and {run.data.name!r} has none")
    if len(steps) < 2 or min(steps) < 1:
        raise ValueError(f"a policy chooses among two numbers of steps or more, got {list(steps)}")
    arms = tuple({"solver": solver, "steps": int(n)} for n in sorted(steps))
    if quality == "fine":
        _check_deterministic(run, key, solver)
        judge = None
    else:
        items = load_data(run.config, "train")[:10_000]
        judge = label_judge(items["x0"], items["cond"])

    def table(which: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.arange(num) + which * num
        settings = {"cond": rows % classes, "rows": rows, "guidance": guidance, "solver": solver}
        drawn = [_drawn(run, key, num, steps=arm["steps"], **settings) for arm in arms]
        if judge is None:
            examples = Examples(None, run.sample(key, num, steps=fine_steps, **settings))
            values = [near(part.x0, examples) for part in drawn]
        else:
            values = [judge(np.asarray(part.x0), settings["cond"]) for part in drawn]
        spent = np.stack([np.asarray(part.nfe) for part in drawn], axis=-1)
        return settings["cond"], np.stack(values, axis=-1) - cost * spent, spent

    labels, learned_on, _ = table(0)
    policy = fit(key, labels, learned_on, arms=arms, classes=classes, **options)
    labels, held_out, spent = table(1)
    own, best = policy.choose(labels), int(learned_on.mean(0).argmax())
    each = np.arange(num)
    gained = [float(v) for v in (held_out[each, own].mean(), spent[each, own].mean())]
    return Report(policy, *gained, best, float(held_out[:, best].mean()), float(spent[:, best].mean()))


def _drawn(run: Any, key: Array, num: int, steps: int, **settings: Any) -> Sample:
    """Samples and their evaluations."""
    parts = []
    x0 = run.sample(key, num, steps=steps, callback=parts.append, every=steps, **settings)
    return Sample(x0, jnp.concatenate([part.nfe for part in parts]), None)


def _check_deterministic(run: Any, key: Array, solver: str) -> None:
    """Raise a ValueError where the same first state is not always taken to the same sample."""
    repeats = run.process.state == "gaussian"
    if repeats:
        start = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (1, *run.experiment.state_shape)))
        ends = [np.asarray(run.sample(jax.random.key(seed), 1, init=start, solver=solver, steps=2)) for seed in (0, 1)]
        repeats = np.allclose(*ends, atol=1e-4)
    if not repeats:
        raise ValueError(
            f"the solver {solver!r} draws, so that two numbers of steps have no solution in common: choose a "
            "deterministic one, or quality='label'"
        )
