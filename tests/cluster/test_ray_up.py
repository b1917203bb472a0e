"""The files for `ray up`: Ray accepts them, the clouds know every setting, and access needs a token."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLOUDS = ("aws", "gcp")
PINNED = (ROOT / "constraints.txt").read_text(encoding="utf-8")
TOKEN = "~/.ray/auth_token"


def _read(cloud: str) -> dict[str, Any]:
    cluster: dict[str, Any] = yaml.safe_load((ROOT / f"cluster/{cloud}.yaml").read_text(encoding="utf-8"))
    return cluster


def _prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    """Validated by Ray's schema, with Ray's defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


@cache
def _ec2() -> Any:
    from botocore.loaders import Loader
    from botocore.model import ServiceModel

    model = ServiceModel(Loader().load_service_model("ec2", "service-2"))
    return model.operation_model("RunInstances").input_shape


@cache
def _compute() -> dict[str, Any]:
    import googleapiclient

    document = Path(googleapiclient.__path__[0]) / "discovery_cache/documents/compute.v1.json"
    schemas: dict[str, Any] = json.loads(document.read_text(encoding="utf-8"))["schemas"]
    return schemas


def _faults_aws(settings: Mapping[str, Any]) -> list[str]:
    from botocore.validate import ParamValidator

    wanted = {**settings, "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(wanted, _ec2())
    return [
        *([report.generate_report()] if report.has_errors() else []),
        *_unlisted(wanted, _ec2(), "RunInstances"),
    ]


def _unlisted(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Values outside an enumeration; botocore leaves this check to the server."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name in shape.members:
                yield from _unlisted(inner, shape.members[name], f"{where}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from _unlisted(inner, shape.member, where)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{where} = {value!r}"


_KINDS: Mapping[str, type] = {"string": str, "boolean": bool, "integer": int, "number": float}


def _faults_gcp(value: Any, schema: Mapping[str, Any], where: str = "Instance") -> Iterator[str]:
    """Fields and values that Compute Engine's discovery document does not allow."""
    if "$ref" in schema:
        yield from _faults_gcp(value, _compute()[schema["$ref"]], where)
    elif schema["type"] == "object" and isinstance(value, Mapping):
        for name, inner in value.items():
            if known := schema.get("properties", {}).get(name, schema.get("additionalProperties")):
                yield from _faults_gcp(inner, known, f"{where}.{name}")
            else:
                yield f"{where}.{name}: unknown"
    elif schema["type"] == "array" and isinstance(value, list):
        for inner in value:
            yield from _faults_gcp(inner, schema["items"], where)
    elif schema["type"] == "string" and schema.get("format") == "int64" and type(value) is int:
        return  # Ray's client converts integers to JSON strings
    elif type(value) is not _KINDS.get(schema["type"]):
        yield f"{where} = {value!r}: expected {schema['type']}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where} = {value!r}: not one of {schema['enum']}"


def _faults(cloud: str, settings: Mapping[str, Any]) -> list[str]:
    return _faults_aws(settings) if cloud == "aws" else list(_faults_gcp(settings, _compute()["Instance"]))


def _is_spot(settings: Mapping[str, Any]) -> bool:
    market = settings.get("InstanceMarketOptions", {}).get("MarketType")
    return bool(market == "spot" or settings.get("scheduling", {}).get("provisioningModel") == "SPOT")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_it(cloud: str) -> None:
    """Otherwise the user learns it only after creating roles, bucket and token."""
    _prepared(_read(cloud))


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout_minute",), 5),
        (("available_node_types", "gpu", "max_worker"), 4),
        (("available_node_types", "gpu", "resources", "GPU"), "one"),
        (("head_node_type",), "heads"),
        (("provider", "type"), "awss"),
        (("initialization_commands",), "pip install"),
    ],
)
def test_ray_rejects_a_mistake(cloud: str, path: tuple[str, ...], value: Any) -> None:
    """The test above is only useful if Ray's validation finds such mistakes."""
    from jsonschema import ValidationError

    with pytest.raises((ValidationError, ValueError, NotImplementedError)):
        _prepared(_changed(_read(cloud), path, value))


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_the_cloud_knows_every_setting(cloud: str, kind: str) -> None:
    """Ray passes a machine's settings on unchecked: a mistake appears when a machine starts, or never."""
    assert _faults(cloud, _read(cloud)["available_node_types"][kind]["node_config"]) == []


@pytest.mark.parametrize(
    ("cloud", "path", "value"),
    [
        ("aws", ("InstnceType",), "g6.xlarge"),
        ("aws", ("InstanceType",), "g6.xlage"),
        ("aws", ("InstanceMarketOptions", "MarketType"), "sopt"),
        ("aws", ("BlockDeviceMappings",), [{"Ebs": {"VolumeSize": "100"}}]),
        ("aws", ("MetadataOptions", "HttpToken"), "required"),
        ("gcp", ("machinetype",), "g2-standard-4"),
        ("gcp", ("scheduling", "provisioningModel"), "SPOTS"),
        ("gcp", ("scheduling", "automaticRestart"), "no"),
        ("gcp", ("scheduling",), [{"preemptible": True}]),
        ("gcp", ("disks",), [{"initializeParams": {"diskSizeGB": 100}}]),
        ("gcp", ("serviceAccounts",), [{"email": "a@b", "scope": []}]),
    ],
)
def test_the_cloud_rejects_a_mistake(cloud: str, path: tuple[str, ...], value: Any) -> None:
    """A check that accepts everything checks nothing."""
    settings = _read(cloud)["available_node_types"]["gpu"]["node_config"]
    assert _faults(cloud, _changed(settings, path, value)) != []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_are_spot_machines_that_stop(cloud: str) -> None:
    """A GPU machine that keeps running, or an on-demand one, is expensive."""
    cluster = _prepared(_read(cloud))
    workers = cluster["available_node_types"]["gpu"]
    assert _is_spot(workers["node_config"])
    assert workers["min_workers"] == 0
    assert workers["max_workers"] == cluster["max_workers"] == 4
    assert workers["resources"] == {"CPU": 4, "GPU": 1}
    assert cluster["idle_timeout_minutes"] == 5
    assert cluster["provider"].get("cache_stopped_nodes", False) is False


@pytest.mark.parametrize("cloud", CLOUDS)
def test_head_is_on_demand_and_runs_no_trial(cloud: str) -> None:
    """A preempted head stops the sweep, and trials on the head slow Ray down."""
    cluster = _prepared(_read(cloud))
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert not _is_spot(head["node_config"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_node_requires_the_token(cloud: str) -> None:
    """Without a token, everybody who reaches the head can run code on all machines."""
    cluster = _prepared(_read(cloud))
    assert cluster["file_mounts"][TOKEN] == TOKEN
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in cluster[commands] if "ray start" in command]
        assert re.search(r"export [^;]*\bRAY_AUTH_MODE=token\b[^;]*;.*ray start", start)
    for commands in ("head_setup_commands", "worker_setup_commands"):
        assert f"test -s {TOKEN}" in cluster[commands][0]
        assert f"chmod 600 {TOKEN}" in cluster[commands][0]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_head_runs_the_autoscaler_that_a_sweep_needs(cloud: str) -> None:
    """With Ray's older autoscaler a sweep on a head without CPUs would refuse to start."""
    (start,) = [c for c in _prepared(_read(cloud))["head_start_ray_commands"] if "ray start" in c]
    assert re.search(r"export [^;]*\bRAY_enable_autoscaler_v2=1\b[^;]*;.*ray start --head", start)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_dashboard_is_reached_by_tunnel_only(cloud: str) -> None:
    """Ray's default for `ray up` listens on all addresses and accepts jobs there."""
    (start,) = [c for c in _prepared(_read(cloud))["head_start_ray_commands"] if "ray start" in c]
    assert re.findall(r"--dashboard-host=(\S+)", start) == ["127.0.0.1"]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_node_installs_pinned_versions(cloud: str) -> None:
    """Ray refuses nodes with another Ray or Python, and another torch changes results."""
    cluster = _prepared(_read(cloud))
    installs = [c for c in cluster["head_setup_commands"] if "uv pip install" in c]
    assert len(installs) == 2
    for command in installs:
        assert "-c ~/newsbert/constraints.txt" in command
    for name in installs[1].rpartition("constraints.txt ")[2].split():
        assert re.search(rf"^{name}==", PINNED, flags=re.MULTILINE), name
    assert [command for command in cluster["worker_setup_commands"] if "-e ~/newsbert" in command]
    text = " ".join(cluster["head_setup_commands"])
    assert re.search(r"\buv==\d+\.\d+\.\d+\b", text)
    (python,) = re.findall(r"--python (\d\S+)", text)
    assert f"FROM python:{python}-" in (ROOT / "cluster/Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_copied_files_exist(cloud: str) -> None:
    """`ray up` notices a missing file only after it has started the head."""
    mounts = _read(cloud)["file_mounts"]
    for target, source in mounts.items():
        assert source == TOKEN or (ROOT / source).exists(), target
    assert {"pyproject.toml", "constraints.txt", "newsbert_ray"} <= set(mounts.values())


@pytest.mark.slow
def test_ray_starts_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray adds key, network and role itself; tested against a simulated AWS."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes its key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        _make_roles(boto3.client("iam"))
        ec2 = boto3.client("ec2", region_name="us-west-2")
        image = ec2.describe_images()["Images"][0]["ImageId"]
        text = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8").replace("YOUR-AMI", image)
        cluster = bootstrap_aws(_prepared(yaml.safe_load(text)))  # type: ignore[no-untyped-call]
        provider = AWSNodeProvider(  # type: ignore[no-untyped-call]
            cluster["provider"], cluster["cluster_name"]
        )
        for kind, settings in cluster["available_node_types"].items():
            provider.create_node(copy.deepcopy(settings["node_config"]), {"ray-user-node-type": kind}, 1)
        machines = [one for found in ec2.describe_instances()["Reservations"] for one in found["Instances"]]
    assert {
        (
            one["InstanceType"],
            one.get("InstanceLifecycle"),
            one["IamInstanceProfile"]["Arn"].rpartition("/")[2],
        )
        for one in machines
    } == {("m6i.xlarge", None, "newsbert-head"), ("g6.xlarge", "spot", "newsbert-worker")}


def _make_roles(iam: Any) -> None:
    for name in ("newsbert-head", "newsbert-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def _changed(settings: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with `value` at `path`."""
    changed: dict[str, Any] = copy.deepcopy(dict(settings))
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed
