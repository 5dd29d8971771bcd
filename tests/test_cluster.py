import pytest

from ddjax import cluster
from ddjax.cluster import ClusterError, Place, find

EXPLICIT = {"DDJAX_COORDINATOR": "node1:8476", "DDJAX_PROCESSES": "4", "DDJAX_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "16042",
    "SLURM_STEP_NODELIST": "gpu[007-009,011],big1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "5",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


def test_alone():
    for environment in (
        {},
        {"DDJAX_CLUSTER": "none", **EXPLICIT, **SLURM},
        without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),  # a batch script, or an allocation's shell
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # an Indexed Job of another kind
    ):
        assert find(environment) is None
    assert cluster.join({}) is None


def test_places():
    assert find(EXPLICIT) == Place("explicit", "node1:8476", 4, 3)
    kubernetes = without(EXPLICIT, "DDJAX_PROCESS") | {"JOB_COMPLETION_INDEX": "1"}
    assert find(kubernetes) == Place("kubernetes", "node1:8476", 4, 1)
    assert find(SLURM) == Place("slurm", f"gpu007:{12_000 + 42}", 5, 2)
    assert find(EXPLICIT | SLURM).kind == "explicit"
    assert find(EXPLICIT | SLURM | {"DDJAX_CLUSTER": "slurm"}).kind == "slurm"
    assert find({"TPU_WORKER_HOSTNAMES": "a,b"}) == find({"DDJAX_CLUSTER": "tpu"}) == Place("tpu")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("a1,b2", "a1"),
        ("gpu[001-015],x", "gpu001"),
        ("gpu[3,7]", "gpu3"),
        ("rack1-[2-3]n[07,9]", "rack1-2n07"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, host):
    assert find(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator.split(":")[0] == host


def test_tasks_that_share_a_node_share_its_devices_out():
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
    assert find(shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).devices == (1,)
    assert find(shared | {"CUDA_VISIBLE_DEVICES": "0"}).devices is None  # bound by --gpus-per-task
    assert find(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).devices is None  # one task a node has all


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (without(EXPLICIT, "DDJAX_PROCESSES"), "DDJAX_PROCESSES must be set too"),
        (without(EXPLICIT, "DDJAX_PROCESS"), "DDJAX_PROCESS must be set too"),
        (EXPLICIT | {"DDJAX_COORDINATOR": "node1"}, "expected host:port"),
        (EXPLICIT | {"DDJAX_PROCESS": "4"}, "there is no process 4 among 4"),
        (EXPLICIT | {"DDJAX_PROCESSES": "two"}, "DDJAX_PROCESSES='two': expected a whole number"),
        ({"DDJAX_CLUSTER": "mpi"}, "expected one of explicit"),
        ({"DDJAX_CLUSTER": "slurm"}, "SLURM_JOB_ID is not set: start the processes with srun"),
        (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is not set"),
    ],
)
def test_an_environment_that_makes_no_sense(environment, words):
    with pytest.raises(ClusterError, match=words):
        find(environment)


def test_one_process_agrees_with_itself():
    assert cluster.agreed(True)
    assert not cluster.agreed(False)
    assert cluster.first()
    assert not cluster.joined()
    with pytest.raises(ZeroDivisionError):
        cluster.on_first(lambda: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "words"),
    [
        (0, "process 0 of 2 (explicit) waited in vain for the others at localhost:28476, 3 s long"),
        (1, "process 1 of 2 (explicit) could not join process 0 at localhost:28476, 3 s long"),
    ],
)
def test_others_that_do_not_come(tmp_path, process, words):
    import tiny

    absent = {"DDJAX_COORDINATOR": "localhost:28476", "DDJAX_PROCESSES": "2", "DDJAX_PROCESS": str(process)}
    config = tiny.write(tmp_path / "config.py")
    environment = tiny.environment() | absent | {"DDJAX_JOIN_SECONDS": "3"}
    child = tiny.ddjax("train", "--config", config, "--workdir", tmp_path / "run", env=environment)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert words in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists()
