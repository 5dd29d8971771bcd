"""A campaign of faults: whatever happens to a training, it ends with the parameters of one to which nothing happened.

    python benchmarks/faults.py --faults 60 --seed 0 --out benchmarks/faults.json

Trains a tiny network again and again, on one CPU device or as two processes, and does to it what clusters do: SIGKILL
and SIGTERM at random moments and while a checkpoint is being written; files of the newest checkpoint cut short, lost,
or with one bit flipped; manifests lost; a full disk (a small tmpfs; needs root); the data file lost, cut short or
changed, and so shards of a prepared folder; one of two processes killed. After each fault the same command is started
again. What must hold:

- a run ends with the uninterrupted run's parameters, average, optimizer and place in the data, bit for bit, and with
  the same metrics; or
- it stops with one clear line on stderr (where nothing else can be done: no good checkpoint, no data, no disk). Then
  the cause is put right, and it has to end as above.

Prints a table, and exits with 1 where anything did not hold. Processes are forked from this one, which has imported
everything and touched no device: a start costs a second, not ten.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIG = """
def get_config():
    return {{
        "data": {data!r},
        "denoiser": {denoiser!r},
        "optimizer": {{"schedule": "constant", "warmup": 0, "learning_rate": 0.01}},
        "train": {{"steps": {steps}, "batch_size": 8, "log_every": 1, "checkpoint_every": {every}, "prefetch": 0}},
    }}
"""
NETWORK = {"width": 8, "depth": 1, "heads": 2}
LIMIT = 600.0  # seconds for anything: beyond it a run hangs


class Broken(Exception):
    """Something that must hold did not."""


@dataclasses.dataclass
class Job:
    """The processes of one start of the command."""

    pids: list[int]
    logs: list[Path]
    statuses: dict[int, int] = dataclasses.field(default_factory=dict)

    def running(self) -> bool:
        for number, pid in enumerate(self.pids):
            if number not in self.statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.statuses[number] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) < len(self.pids)

    def wait(self, grace: float | None = None) -> list[int]:
        """The statuses when all have ended. grace: seconds for the others when one has failed; as the launcher does."""
        end = time.monotonic() + LIMIT
        while self.running():
            if grace is not None and any(self.statuses.values()):
                end, grace = min(end, time.monotonic() + grace), None
            if time.monotonic() > end:
                self.kill()
                if not any(self.statuses.values()):
                    raise Broken("it hangs")
            time.sleep(0.01)
        return [self.statuses[number] for number in range(len(self.pids))]

    def kill(self, which: int | None = None, number: int = signal.SIGKILL) -> None:
        for index, pid in enumerate(self.pids):
            if index not in self.statuses and which in (None, index):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def said(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def warned(self) -> str:
        logs = [log.with_suffix(".err") for log in self.logs]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def begun(self) -> bool:
        """Whether it has got hold of its folder; what metrics.jsonl says before is of the start before."""
        return " steps of " in self.said()

    def errors(self) -> list[str]:
        """What was printed to stderr but for warnings."""
        return [line for line in self.warned().splitlines() if line.strip() and "warning:" not in line]


class Bench:
    """A folder with data and config, and how a training in it is started."""

    def __init__(self, root: Path, processes: int, steps: int, every: int, shards: bool = False):
        self.root, self.processes, self.steps, self.every, self.shards = root, processes, steps, every, shards
        self.data, self.config = root / ("prepared" if shards else "data.npz"), root / "config.py"
        self.count = 0

    def prepare(self) -> None:
        import numpy as np

        rng, numbers = np.random.default_rng(0), {"steps": self.steps, "every": self.every}
        if self.shards:
            data = {"name": str(self.data), "options": {"length": 16, "check": "sha256"}}
            denoiser = {"name": "text", "options": NETWORK}
            letters = np.where(rng.random(600_000) < 0.01, 10, rng.integers(97, 123, 600_000))
            (self.root / "text.txt").write_bytes(letters.astype(np.uint8).tobytes())
            from ddjax import cli

            command = ["data", "prepare", self.root / "text.txt", "--out", self.data, "--document", "line"]
            command += ["--shard-size", "0.125"]
            if cli.main([str(word) for word in command]):
                raise SystemExit("preparing the data failed")
        else:
            data, denoiser = {"name": str(self.data)}, {"options": {**NETWORK, "patch": 4}}
            np.savez(self.data, x=rng.integers(0, 17, (200, 8, 8, 1)).astype(np.uint8), y=np.arange(200) % 10)
        self.config.write_text(CONFIG.format(data=data, denoiser=denoiser, **numbers))

    def data_files(self) -> list[Path]:
        return sorted(self.data.rglob("*.bin")) if self.shards else [self.data]

    def start(self, workdir: Path) -> Job:
        """Fork, and train there."""
        self.count += 1
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        job = Job([], [])
        for number in range(self.processes):
            log = self.root / f"log-{self.count}-{number}.out"
            pid = os.fork()
            if not pid:
                _train(self, workdir, log, number, port)
            job.pids.append(pid)
            job.logs.append(log)
        return job


def _train(bench: Bench, workdir: Path, log: Path, number: int, port: int) -> None:
    """In a forked process: `ddjax train`, and the end."""
    status = 70
    try:
        for target, path in ((1, log), (2, log.with_suffix(".err"))):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, target)
        import jax

        from ddjax import cli

        jax.config.update("jax_platforms", "cpu")
        if bench.processes > 1:
            os.environ |= {
                "DDJAX_COORDINATOR": f"localhost:{port}",
                "DDJAX_PROCESSES": str(bench.processes),
                "DDJAX_PROCESS": str(number),
            }
            jax.config.update("jax_num_cpu_devices", 1)
        status = cli.main(["train", "--config", str(bench.config), "--workdir", str(workdir)])
        if bench.processes > 1:
            jax.distributed.shutdown()  # what an ordinary end of the program does
    except BaseException:  # whatever comes out of main is a finding
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def progress(workdir: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    try:
        return (workdir / "metrics.jsonl").read_bytes().count(b'"loss"')
    except FileNotFoundError:
        return 0


def saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def until(job: Job, condition: Callable[[], bool]) -> bool:
    """Wait; whether the condition came before the end."""
    end = time.monotonic() + LIMIT
    while job.running():
        if condition():
            return True
        if time.monotonic() > end:
            job.kill()
            raise Broken("it hangs")
        time.sleep(0.001)
    return False


def steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def files(folder: Path) -> list[Path]:
    """Files that a checkpoint needs: those that its manifest lists."""
    listed = json.loads((folder.parent / "manifests" / f"{folder.name}.json").read_text())
    return [folder / name for name in sorted(listed)]


def harm(path: Path, how: str, rng: random.Random) -> None:
    """Cut short, delete, or flip one bit."""
    if how == "deleted":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


# -- the faults: each gets a run on its way, does its harm, and says what came of it --------------------------------


@dataclasses.dataclass
class Scene:
    """One run that is being tortured."""

    bench: Bench
    workdir: Path
    rng: random.Random

    def on_the_way(self) -> Job | None:
        """A start that has come to a random step; None where the run is over."""
        now = steps(self.workdir)[-1:] or [0]
        target = self.rng.randint(now[0] + 1, min(now[0] + 6 * self.bench.every, self.bench.steps))
        job = self.bench.start(self.workdir)
        if not until(job, lambda: job.begun() and progress(self.workdir) >= target):
            self.check_end(job)
            return None
        time.sleep(self.rng.random() * 0.02)
        return job

    def check_end(self, job: Job) -> None:
        if any(job.wait()):
            raise Broken(f"ended with {job.wait()}: {job.errors()[-5:]}")

    def stopped_clearly(self, statuses: list[int], job: Job) -> str:
        """One line said why. Returns it."""
        errors = job.errors()
        if (
            not all(status in (1, 2) for status in statuses)
            or len(errors) != 1
            or "Traceback" in job.said() + job.warned()
        ):
            raise Broken(f"ended with {statuses} and said {errors[-8:]}")
        if not errors[0].startswith("ddjax train: "):
            raise Broken(f"said {errors[0]!r}")
        return errors[0]

    def killed(self, number: int, while_saving: bool = False) -> str | None:
        job = self.on_the_way()
        if job is None:
            return None
        if while_saving:
            if not until(job, lambda: saving(self.workdir)):
                self.check_end(job)
                return None
            time.sleep(self.rng.random() * 0.05)
        job.kill(number=number)
        statuses = job.wait()
        if number == signal.SIGKILL:
            return "goes on" if statuses == [-9] else None
        if statuses != [0] or job.errors():
            raise Broken(f"SIGTERM: ended with {statuses} and said {job.errors()}")
        return "saved, goes on" if "stopped: saved step" in job.said() else None

    def damaged(self, how: str) -> str | None:
        if self.killed(signal.SIGKILL) is None or not steps(self.workdir):
            return None
        newest = steps(self.workdir)[-1]
        harm(self.rng.choice(files(self.workdir / "checkpoints" / str(newest))), how, self.rng)
        return self.noticed(newest)

    def noticed(self, newest: int) -> str:
        """The next start says that the checkpoint is damaged, and uses the one before; a flipped bit may not matter."""
        older = len(steps(self.workdir)) > 1
        job = self.bench.start(self.workdir)
        if older:
            words = f"checkpoint {newest} is damaged"
            until(job, lambda: words in job.warned())
            time.sleep(self.rng.random())  # it may even be killed while it puts the damaged one aside
            job.kill()
            job.wait()
            if words not in job.warned():
                raise Broken(f"damage of checkpoint {newest} was not noticed")
            return "noticed, goes on from the one before"
        statuses = job.wait()
        said = self.stopped_clearly(statuses, job)
        if "no checkpoint in" not in said:
            raise Broken(said)
        shutil.rmtree(self.workdir / "checkpoints")
        return "stopped clearly, begins again"

    def manifest_lost(self) -> str | None:
        if self.killed(signal.SIGKILL) is None or not steps(self.workdir):
            return None
        newest = steps(self.workdir)[-1]
        path = self.workdir / "checkpoints" / "manifests" / f"{newest}.json"
        harm(path, self.rng.choice(("deleted", "truncated")), self.rng)
        return self.noticed(newest)

    def all_damaged(self) -> str | None:
        """Nothing is good: a clear line; then a copy is put back."""
        if self.killed(signal.SIGKILL) is None or not steps(self.workdir):
            return None
        copy = shutil.copytree(self.workdir / "checkpoints", self.bench.root / "copy")
        for step in steps(self.workdir):
            how = self.rng.choice(("truncated", "deleted", "flipped"))
            harm(self.rng.choice(files(self.workdir / "checkpoints" / str(step))), how, self.rng)
        job = self.bench.start(self.workdir)
        said = self.stopped_clearly(job.wait(), job)
        if "no checkpoint in" not in said:
            raise Broken(said)
        shutil.rmtree(self.workdir / "checkpoints")
        shutil.move(copy, self.workdir / "checkpoints")
        return "stopped clearly, goes on from a copy"

    def data(self, how: str) -> str | None:
        """The data are lost or changed while it is down, or under its feet."""
        path = self.rng.choice(self.bench.data_files())
        copy = self.bench.root / "data.copy"
        shutil.copy(path, copy)
        try:
            # A bit that changes in a file that is mapped already is seen when it is next started.
            running = self.rng.random() < 0.5 and not (self.bench.shards and how == "flipped")
            if running:
                job = self.on_the_way()
                if job is None:
                    return None
                harm(path, how, self.rng)
                time.sleep(self.rng.random() * 0.2)
                job.kill()
                job.wait()
            else:
                harm(path, how, self.rng)
            job = self.bench.start(self.workdir)
            statuses = job.wait()
            if statuses == [0]:
                return "made no difference"  # a bit that nothing reads
            self.stopped_clearly(statuses, job)
            return "stopped clearly, goes on when they are back"
        finally:
            shutil.move(copy, path)

    def disk_full(self) -> str | None:
        job = self.on_the_way()
        if job is None:
            return None
        filler = self.workdir.parent / "filler"
        try:
            while job.running():  # also what its own deletions free
                with contextlib.suppress(OSError), open(filler, "ab") as file:
                    file.write(b"x" * max(shutil.disk_usage(self.workdir).free - self.rng.randrange(1, 8192), 1))
                time.sleep(0.005)
        finally:
            filler.unlink(missing_ok=True)
        statuses = job.wait()
        if statuses == [0]:
            return None
        said = self.stopped_clearly(statuses, job)
        if "no space left" not in said.lower():
            raise Broken(said)
        return "stopped clearly, goes on with room"

    def one_of_two(self) -> str | None:
        job = self.on_the_way()
        if job is None:
            return None
        which = self.rng.randrange(2)
        job.kill(which)
        statuses = job.wait(grace=10.0)
        if statuses[which] != -9:
            return None
        if statuses[1 - which] == 0:
            raise Broken("the other process ended as if nothing had been")
        return "the other ended too, goes on"


def _kinds() -> dict[str, tuple[int, str, Callable[[Scene], str | None]]]:
    """Name: weight in the draw, bench, what happens."""
    return {
        "SIGKILL": (4, "one", lambda s: s.killed(signal.SIGKILL)),
        "SIGTERM": (4, "one", lambda s: s.killed(signal.SIGTERM)),
        "SIGKILL while saving": (4, "one", lambda s: s.killed(signal.SIGKILL, True)),
        "SIGTERM while saving": (3, "one", lambda s: s.killed(signal.SIGTERM, True)),
        "checkpoint truncated": (3, "one", lambda s: s.damaged("truncated")),
        "checkpoint file deleted": (3, "one", lambda s: s.damaged("deleted")),
        "checkpoint bit flipped": (3, "one", lambda s: s.damaged("flipped")),
        "manifest lost": (2, "one", Scene.manifest_lost),
        "all checkpoints damaged": (2, "one", Scene.all_damaged),
        "data file lost": (2, "one", lambda s: s.data("deleted")),
        "data file truncated": (2, "one", lambda s: s.data("truncated")),
        "data bit flipped": (2, "one", lambda s: s.data("flipped")),
        "data shard lost": (2, "shards", lambda s: s.data("deleted")),
        "data shard truncated": (2, "shards", lambda s: s.data("truncated")),
        "data shard's bit flipped": (2, "shards", lambda s: s.data("flipped")),
        "disk full": (3, "small disk", Scene.disk_full),
        "one of two processes SIGKILLed": (2, "two", Scene.one_of_two),
    }


# -- comparing ----------------------------------------------------------------------------------------------------


def told(workdir: Path) -> list[dict]:
    from ddjax.training.report import TIMES

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same(workdir: Path, whole: Path) -> None:
    """Raise Broken where two finished runs differ. In a process of its own: it uses a device."""
    code = """
import sys, jax, numpy as np
from ddjax.training import load_ema
def state(workdir):
    arrays = {}
    for which in ("params", "ema", "opt_state"):
        tree, extras = load_ema(workdir + "/checkpoints", which=which)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[which + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return arrays, extras["step"], extras["data"]
(a, *at), (b, *there) = map(state, sys.argv[1:])
assert at == there, (at, there)
assert a.keys() == b.keys() and len(a) > 10
differ = [name for name in a if a[name] != b[name]]
assert not differ, differ
"""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            sys.argv = ["", str(workdir), str(whole)]
            exec(code, {})
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise Broken("the state differs from the uninterrupted run's")
    if told(workdir) != told(whole):
        raise Broken("the metrics differ from the uninterrupted run's")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 6 MB, if this user may mount one."""
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def campaign(root: Path, count: int, seed: int, only: list[str]) -> list[dict]:
    rng, kinds, results = random.Random(seed), _kinds(), []
    benches = {
        "one": Bench(root / "one", 1, 120, 6),
        "two": Bench(root / "two", 2, 36, 4),
        "shards": Bench(root / "shards", 1, 120, 6, shards=True),
    }
    for bench in benches.values():
        bench.root.mkdir()
        bench.prepare()
    with small_disk(root / "disk") as mounted:
        if not mounted:
            print("no small disk: mounting a tmpfs needs root; full disks are left out", file=sys.stderr)
        chosen = {n: k for n, k in kinds.items() if (mounted or k[1] != "small disk") and (not only or n in only)}
        wholes = {}
        for name in sorted({"one" if where == "small disk" else where for _, where, _ in chosen.values()}):
            bench = benches[name]
            whole = wholes[name] = bench.root / "whole"
            began = time.monotonic()
            job = bench.start(whole)
            if any(job.wait()):
                raise SystemExit(f"the uninterrupted run failed: {job.errors()}")
            print(f"uninterrupted, {bench.processes} processes: {time.monotonic() - began:.1f} s", flush=True)
        # Every kind comes up, then by weight.
        names = [*chosen, *rng.choices(list(chosen), [weight for weight, _, _ in chosen.values()], k=count)]
        names, runs = names[:count], 0
        rng.shuffle(names)
        queues = collections.defaultdict(list)
        for name in names:
            queues[chosen[name][1]].append(name)
        for where, queue in sorted(queues.items()):
            bench = benches["one" if where == "small disk" else where]
            while queue:
                runs += 1
                workdir = (root / "disk" if where == "small disk" else bench.root) / f"run{runs}"
                scene, hits = Scene(bench, workdir, rng), []
                for _ in range(rng.randint(2, 5)):
                    if not queue:
                        break
                    name, began = queue[-1], time.monotonic()
                    try:
                        came = chosen[name][2](scene)
                    except (Broken, OSError) as error:
                        came = f"BROKEN: {error}"
                    if came is None:  # it came too early, or the run was over: then the fault is for the next
                        if steps(workdir)[-1:] == [bench.steps]:
                            break
                        continue
                    queue.pop()
                    hits.append({"run": runs, "fault": name, "came": came, "seconds": time.monotonic() - began})
                    took = f"{hits[-1]['seconds']:.1f} s"
                    print(f"{len(results) + len(hits):3d} run {runs} {name}: {came} ({took})", flush=True)
                try:
                    job = bench.start(workdir)
                    scene.check_end(job)
                    same(workdir, wholes["one" if where == "small disk" else where])
                    end = "bit for bit"
                except Broken as error:
                    end = f"BROKEN: {error}"
                print(f"    run {runs} after {len(hits)} faults: {end}", flush=True)
                results += [{**hit, "end": end} for hit in hits]
                shutil.rmtree(workdir, ignore_errors=True)
    return results


def table(results: list[dict]) -> str:
    lines = ["| Fault | times | what came of it | ended as the uninterrupted run |", "|---|---|---|---|"]
    for name in _kinds():
        hits = [r for r in results if r["fault"] == name]
        if hits:
            came = collections.Counter(r["came"] for r in hits)
            words = "; ".join(f"{what} ({times})" for what, times in came.most_common())
            good = sum(r["end"] == "bit for bit" for r in hits)
            lines.append(f"| {name} | {len(hits)} | {words} | {good} of {len(hits)} |")
    lines.append(f"| all | {len(results)} in {len({r['run'] for r in results})} runs | | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], choices=_kinds(), metavar="KIND", help="may be repeated")
    parser.add_argument("--out", type=Path, help="also write every fault to this JSON file")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "ddjax-faults-cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # What a training imports, before any fork. No device is touched here.
    for module in ("grain", "orbax.checkpoint", "jax.experimental.multihost_utils", "ddjax.training.loop"):
        importlib.import_module(module)

    root = Path(tempfile.mkdtemp(prefix="ddjax-faults-"))
    try:
        results = campaign(root, arguments.faults, arguments.seed, arguments.only)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(table(results))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"seed": arguments.seed, "faults": results}, indent=1) + "\n")
    return int(any("BROKEN" in r["came"] or r["end"] != "bit for bit" for r in results))


if __name__ == "__main__":
    sys.exit(main())
