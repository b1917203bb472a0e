"""KubeRay's manifests: a schema of our own for the fields they use, Ray's autoscaler, and our own parsers."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from newsbert_ray.flags import values_from
from newsbert_ray.verbs import VERBS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster/kuberay").iterdir())
MANIFESTS: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES
}
JOBS = {name: found for name, found in MANIFESTS.items() if found["kind"] == "RayJob"}
GROWING = ("raycluster", "sweep", "train")
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
    """The pods' specifications, the head's first."""
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"]["spec"] for group in groups]


def _faults(manifest: dict[str, Any]) -> list[str]:
    return [error.message for error in SCHEMA.iter_errors(manifest)]


def _ray_version() -> str:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return str(re.findall(r"^ray==(\S+)$", pinned, flags=re.MULTILINE)[0])


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_holds_to_the_schema(name: str) -> None:
    """Kubernetes drops a field that it does not know, and what it should have done is not done."""
    assert _faults(MANIFESTS[name]) == []


@pytest.mark.parametrize(
    ("place", "value"),
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
    ids=lambda place: ".".join(map(str, place[-2:])) if isinstance(place, tuple) else "",
)
def test_schema_refuses_a_slip(place: tuple[str | int, ...], value: Any) -> None:
    """A schema that passes everything checks nothing. None takes a field away."""
    manifest = copy.deepcopy(MANIFESTS["sweep"])
    inner: Any = manifest
    for part in place[:-1]:
        inner = inner[part]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    assert len(_faults(manifest)) == 1


def test_a_job_for_each_verb() -> None:
    """What can be done on a machine can be done on a cluster."""
    assert set(JOBS) == {"prepare", "train", "sweep", "evaluate", "report"}
    assert set(MANIFESTS) == {*JOBS, "raycluster"}


@pytest.mark.parametrize("verb", JOBS)
def test_entrypoint_is_understood(verb: str) -> None:
    """A cluster is started for it, and ends with `unknown setting`."""
    program, named, *words = shlex.split(JOBS[verb]["spec"]["entrypoint"])
    assert (program, named) == ("newsbert-ray", verb)
    assert verb in VERBS
    values = values_from(verb, words)
    if verb == "sweep":
        assert values["resume"] is True  # or the second attempt would be refused
        assert values["space"].startswith(IMAGE_FOLDER)
        assert (ROOT / values["space"].removeprefix(IMAGE_FOLDER)).exists()


@pytest.mark.parametrize("verb", JOBS)
def test_job_reads_and_writes_the_bucket_alone(verb: str) -> None:
    """A pod's own disk is gone with the pod, and the result with it."""
    _, _, *words = shlex.split(JOBS[verb]["spec"]["entrypoint"])
    places = [word for word in words if "/" in word and not word.startswith(IMAGE_FOLDER)]
    assert places
    assert all(place.startswith("gs://YOUR-BUCKET/newsbert/") for place in places)


@pytest.mark.parametrize("verb", JOBS)
def test_job_leaves_nothing_running(verb: str) -> None:
    """A cluster that outlives its job is paid for until somebody notices."""
    spec = JOBS[verb]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 3600
    assert 0 < spec["activeDeadlineSeconds"] <= 48 * 3600
    assert spec["backoffLimit"] == (3 if verb in GROWING else 1)


@pytest.mark.parametrize("name", GROWING)
def test_autoscaler_reads_the_groups(name: str) -> None:
    """Ray's autoscaler reads the manifest in its own way; what it does not find there never grows."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = _cluster(name)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"  # the one that a sweep may ask up front
    found = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": name, "namespace": "default"}, "spec": cluster}
    )
    kinds = found["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert kinds["gpu"]["resources"] | {"memory": 0} == {"CPU": 6, "GPU": 1, "memory": 0}
    assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, 4)
    assert found["idle_timeout_minutes"] == 5


@pytest.mark.parametrize("name", GROWING)
def test_only_workers_are_spot(name: str) -> None:
    """A head that is taken away takes the sweep with it."""
    head, worker = _pods(_cluster(name))
    assert worker["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert "cloud.google.com/gke-spot" in {one["key"] for one in worker["tolerations"]}
    assert worker["terminationGracePeriodSeconds"] > 30  # Ray drains for so long
    assert not {"nodeSelector", "tolerations"} & head.keys()


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_cluster_asks_for_a_token(name: str) -> None:
    """Any pod of the Kubernetes cluster reaches the head's service, and could run code there."""
    assert _cluster(name)["authOptions"] == {"mode": "token"}
    assert _cluster(name)["rayVersion"] == _ray_version()


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_no_more_rights_than_they_need(name: str) -> None:
    """A job's code comes from whoever has the token; it must not own the machine or Kubernetes."""
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


def test_clusters_do_not_drift_apart() -> None:
    """The same cluster stands in several files; what is mended in one must be mended in all."""
    growing = [_cluster(name) for name in GROWING]
    alone = [_cluster(name) for name in MANIFESTS if name not in GROWING]
    assert all(cluster == growing[0] for cluster in growing)
    assert all(cluster == alone[0] for cluster in alone)
    images = {
        container["image"] for c in (*growing, *alone) for p in _pods(c) for container in p["containers"]
    }
    assert len(images) == 1
