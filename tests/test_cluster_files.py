"""The files in cluster/ are well-formed, agree with each other, and fit configs/imagenet.yaml."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

import raypfk
from raypfk import config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"

# RayJobSpec and RayClusterSpec of ray.io/v1: the API server refuses, or silently drops, any other name.
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
CLUSTER_FIELDS = {
    "headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions",
    "gcsFaultToleranceOptions", "headServiceAnnotations", "suspend", "managedBy",
}  # fmt: skip
GROUP_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds", "rayStartParams",
    "template", "scaleStrategy", "suspend",
}  # fmt: skip


@pytest.fixture
def account() -> dict:
    return next(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))


@pytest.fixture
def job() -> dict:
    _, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    return job


@pytest.fixture
def vm() -> dict:
    return yaml.safe_load((CLUSTER / "vm-aws.yaml").read_text())


@pytest.fixture
def imagenet() -> config.Config:
    return config.load(str(ROOT / "configs" / "imagenet.yaml"), {}, {"data.root": "/data"})


def groups(job: dict) -> list[dict]:
    spec = job["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: dict) -> dict:
    (only,) = group["template"]["spec"]["containers"]
    return only


def dockerfile_ray() -> str:
    return re.search(r"^ARG RAY_VERSION=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.M).group(1)


def test_kuberay_is_a_ray_job(job):
    """Kind, version and field names are those of KubeRay."""
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"]["name"]
    assert set(job["spec"]) <= JOB_FIELDS
    assert set(job["spec"]["rayClusterSpec"]) <= CLUSTER_FIELDS
    head, *workers = groups(job)
    assert set(head) <= {"rayStartParams", "template", "serviceType", "headService", "enableIngress"}
    assert workers
    assert all(set(group) <= GROUP_FIELDS for group in workers)


def test_kuberay_cleans_up_and_tries_again(job):
    spec = job["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 1


def test_kuberay_scales(job):
    """Autoscaling is on, workers grow from nothing, and the head takes no work."""
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    head, *workers = groups(job)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in workers] == ["cpu", "gpu"]
    for group in workers:
        assert 0 <= group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_kuberay_pods_get_what_they_ask_for(job):
    """Requests are limits, for Ray takes the limits as what it has; only the GPU group asks for GPUs."""
    for group in groups(job):
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= set(resources["limits"])
        gpus = resources["limits"].get("nvidia.com/gpu", 0)
        assert gpus == (1 if group.get("groupName") == "gpu" else 0)


def test_kuberay_pods_can_reach_s3(job, account):
    """All pods, the head's too, have the service account and the optional Secret; none holds a credential."""
    assert (account["apiVersion"], account["kind"]) == ("v1", "ServiceAccount")
    for group in groups(job):
        assert group["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
        assert container(group)["envFrom"] == [{"secretRef": {"name": "raypfk-s3", "optional": True}}]
        assert "env" not in container(group)


def test_tokens_are_asked_for_explicitly(job, vm):
    """The default of RAY_AUTH_MODE differs between versions of Ray."""
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "--env RAY_AUTH_MODE=token" in vm["docker"]["run_options"]
    assert vm["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_kuberay_entrypoint_refers_to_files_that_are_there(job):
    """And the config is valid with the entrypoint's assignments."""
    words = shlex.split(job["spec"]["entrypoint"])
    start = "python jobs/run.py --config configs/imagenet.yaml --out s3://BUCKET/run"
    assert words[:6] == shlex.split(start)
    assert (ROOT / words[1]).is_file()
    assignments = tuple(after for word, after in itertools.pairwise(words) if word == "--set")
    assert len(words) == 6 + 2 * len(assignments)
    loaded = config.load(str(ROOT / words[3]), {}, config.assigned(assignments))
    assert (loaded.data.source, loaded.data.root) == ("ilsvrc", "s3://BUCKET/ILSVRC")


def test_one_version_of_ray_and_one_image(job, vm):
    """kuberay.yaml and Dockerfile name the same Ray, which this project allows; all nodes use one image."""
    ray_version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert ray_version == dockerfile_ray()
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = (r.specifier for r in map(Requirement, requirements) if r.name == "ray")
    assert ray_version in wanted
    assert Version(ray_version) >= Version("2.52")  # the first with tokens
    assert {container(group)["image"] for group in groups(job)} == {vm["docker"]["image"]}
    assert vm["docker"]["image"].endswith(f":{raypfk.__version__}")


def test_the_image_recipe_copies_what_is_there():
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.M) for word in line.split()]
    assert set(copied) >= {"pyproject.toml", "README.md", "LICENSE", "raypfk", "configs", "jobs"}
    missing = [name for name in copied if not (ROOT / name).exists()]
    assert not missing
    assert f"FROM rayproject/ray:${{RAY_VERSION}}-py{''.join(_lowest_python())}" in text


def _lowest_python() -> tuple[str, str]:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    return re.search(r"(\d+)\.(\d+)", wanted).groups()


def test_rays_own_validator_takes_the_vm_file(vm):
    """The schema and the checks of `ray up`, with the defaults of the AWS provider filled in."""
    prepared = prepare_config(vm)
    validate_config(prepared)
    assert prepared["provider"]["type"] == "aws"
    assert prepared["setup_commands"] == prepared["worker_setup_commands"] == []  # no other Ray is installed
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 8


def test_rays_own_validator_refuses_a_misspelt_key(vm):
    """So the test above can fail."""
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(vm | {"max_worker": 3}))


def test_the_vm_cluster_scales(vm):
    """The head takes no work, and the node types' limits fit the cluster's."""
    types = vm["available_node_types"]
    assert types[vm["head_node_type"]]["resources"] == {"CPU": 0}
    assert sum(types[name]["max_workers"] for name in ("cpu", "gpu")) <= vm["max_workers"]


def capacity_kuberay(job: dict) -> list[tuple[int, int, int]]:
    found = []
    for group in groups(job)[1:]:
        limits = container(group)["resources"]["limits"]
        found.append((group["maxReplicas"], int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))))
    return found


def capacity_vm(vm: dict) -> list[tuple[int, int, int]]:
    types = [vm["available_node_types"][name] for name in ("cpu", "gpu")]
    return [(t["max_workers"], t["resources"]["CPU"], t["resources"].get("GPU", 0)) for t in types]


@pytest.mark.parametrize("name", ["kuberay", "vm"])
def test_the_clusters_can_place_what_imagenet_asks_for(name, request, imagenet):
    """Else actors would wait for ever: (machines, CPUs, GPUs) of all groups against every stage's request."""
    if name == "kuberay":
        sizes = capacity_kuberay(request.getfixturevalue("job"))
    else:
        sizes = capacity_vm(request.getfixturevalue("vm"))
    cpus = sum(count * cpu for count, cpu, _ in sizes)
    gpus = sum(count * gpu for count, _, gpu in sizes)
    r = imagenet.resources
    assert r.extract_actors * r.extract_gpus <= gpus
    for section in (imagenet.pretrain, imagenet.train):
        assert 0 < section.workers * section.gpus_per_worker <= gpus
    assert r.score_actors * r.score_threads <= cpus and r.score_actors * r.score_gpus <= gpus
    assert r.score_threads <= max(cpu for _, cpu, _ in sizes)


def test_a_machine_that_vanishes_is_noticed_soon():
    """What raypfk sets for its own process is in effect there, and what the image sets for all."""
    names = ("RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms")
    reads = ", ".join(f"Config.{name.removeprefix('RAY_')}()" for name in names)
    program = f"import raypfk; from ray._raylet import Config; print({reads})"
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == re.findall(r"_ms=(\d+)", (CLUSTER / "Dockerfile").read_text()) == ["20000", "20000"]
