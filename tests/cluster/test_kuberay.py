"""KubeRay manifests: checked by our own schema, by Ray's autoscaler, and by our command-line parser."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from newsbert_ray.cli import VERBS, parse

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster/kuberay").iterdir())
MANIFESTS: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES
}
JOBS = {name: manifest for name, manifest in MANIFESTS.items() if manifest["kind"] == "RayJob"}
AUTOSCALED = ("raycluster", "sweep", "train")
SCHEMA = Draft202012Validator(
    yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text(encoding="utf-8"))
)
IMAGE_FOLDER = "/opt/newsbert/"
CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec", "template", "spec")
GROUP = (*CLUSTER, "workerGroupSpecs", 0)


def _cluster(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = MANIFESTS[name]["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def _pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specifications, the head first."""
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"]["spec"] for group in groups]


def _errors(manifest: dict[str, Any]) -> list[str]:
    return [error.message for error in SCHEMA.iter_errors(manifest)]


def _ray_version() -> str:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return str(re.findall(r"^ray==(\S+)$", pinned, flags=re.MULTILINE)[0])


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_matches_the_schema(name: str) -> None:
    """Kubernetes silently drops an unknown field."""
    assert _errors(MANIFESTS[name]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "ray.io/v1alpha1"),
        (("spec", "backoffLimits"), 3),
        ((*CLUSTER, "authOptions", "mode"), "tokens"),
        ((*CLUSTER, "authOptions"), None),
        ((*CLUSTER, "rayVersion"), None),
        ((*CLUSTER, "headGroupSpec"), None),
        ((*CLUSTER, "autoscalerOptions", "idleTimeoutSeconds"), "300"),
        ((*CLUSTER, "autoscalerOptions", "version"), 2),
        ((*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ((*GROUP, "maxReplica"), 4),
        ((*GROUP, "minReplicas"), None),
        ((*GROUP, "template", "spec", "containers", 0, "name"), None),
        ((*GROUP, "template", "spec", "toleration"), []),
        ((*HEAD, "containers", 0, "resources", "limits", "memory"), "8 GB"),
        (("metadata", "name"), "Newsbert_sweep"),
    ],
    ids=lambda path: ".".join(map(str, path[-2:])) if isinstance(path, tuple) else "",
)
def test_schema_rejects_a_mistake(path: tuple[str | int, ...], value: Any) -> None:
    """A schema that accepts everything checks nothing. None removes the field."""
    manifest = copy.deepcopy(MANIFESTS["sweep"])
    inner: Any = manifest
    for part in path[:-1]:
        inner = inner[part]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    assert len(_errors(manifest)) == 1


def test_a_job_for_each_verb() -> None:
    """The main verbs can run on Kubernetes."""
    assert set(JOBS) == {"prepare", "train", "sweep", "evaluate", "report"}
    assert set(MANIFESTS) == {*JOBS, "raycluster"}


@pytest.mark.parametrize("verb", JOBS)
def test_entrypoint_parses(verb: str) -> None:
    """A cluster must not be started for a command that ends in `unknown setting`."""
    program, named, *words = shlex.split(JOBS[verb]["spec"]["entrypoint"])
    assert (program, named) == ("newsbert-ray", verb)
    assert verb in VERBS
    values = parse(verb, words)
    if verb == "sweep":
        assert values["resume"] is True  # otherwise the second attempt would be refused
        assert values["space"].startswith(IMAGE_FOLDER)
        assert (ROOT / values["space"].removeprefix(IMAGE_FOLDER)).exists()


@pytest.mark.parametrize("verb", JOBS)
def test_job_uses_only_the_bucket(verb: str) -> None:
    """A pod's disk disappears with the pod, and a result on it, too."""
    _, _, *words = shlex.split(JOBS[verb]["spec"]["entrypoint"])
    locations = [word for word in words if "/" in word and not word.startswith(IMAGE_FOLDER)]
    assert locations
    assert all(location.startswith("gs://YOUR-BUCKET/newsbert/") for location in locations)


@pytest.mark.parametrize("verb", JOBS)
def test_job_leaves_nothing_running(verb: str) -> None:
    """A cluster that outlives its job costs money until somebody notices."""
    spec = JOBS[verb]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 3600
    assert 0 < spec["activeDeadlineSeconds"] <= 48 * 3600
    assert spec["backoffLimit"] == (3 if verb in AUTOSCALED else 1)


@pytest.mark.parametrize("name", AUTOSCALED)
def test_autoscaler_reads_the_groups(name: str) -> None:
    """Ray's autoscaler parses the manifest itself; a group that it does not see never grows."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = _cluster(name)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"  # a sweep requests nodes from this version only
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": name, "namespace": "default"}, "spec": cluster}
    )
    kinds = config["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert kinds["gpu"]["resources"] | {"memory": 0} == {"CPU": 6, "GPU": 1, "memory": 0}
    assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, 4)
    assert config["idle_timeout_minutes"] == 5


@pytest.mark.parametrize("name", AUTOSCALED)
def test_only_workers_are_spot(name: str) -> None:
    """If a spot head is preempted, the sweep stops."""
    head, worker = _pods(_cluster(name))
    assert worker["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert "cloud.google.com/gke-spot" in {one["key"] for one in worker["tolerations"]}
    assert worker["terminationGracePeriodSeconds"] > 30  # Ray drains for 30 seconds
    assert not {"nodeSelector", "tolerations"} & head.keys()


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_cluster_requires_a_token(name: str) -> None:
    """Any pod of the Kubernetes cluster can reach the head and could run code there."""
    assert _cluster(name)["authOptions"] == {"mode": "token"}
    assert _cluster(name)["rayVersion"] == _ray_version()


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_minimal_rights(name: str) -> None:
    """Submitted code runs in a pod; it must not get control of the machine or of Kubernetes."""
    cluster = _cluster(name)
    for position, pod in enumerate(_pods(cluster)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        scales = position == 0 and cluster.get("enableInTreeAutoscaling", False)
        assert pod.get("automountServiceAccountToken", True) is scales
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_clusters_are_equal_in_all_files() -> None:
    """The same cluster is described in several files; a fix in one must be made in all."""
    growing = [_cluster(name) for name in AUTOSCALED]
    alone = [_cluster(name) for name in MANIFESTS if name not in AUTOSCALED]
    assert all(cluster == growing[0] for cluster in growing)
    assert all(cluster == alone[0] for cluster in alone)
    images = {
        container["image"] for c in (*growing, *alone) for p in _pods(c) for container in p["containers"]
    }
    assert len(images) == 1
