"""Every problem is found with its cure, and a healthy machine has none."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
from torch.utils import collect_env
from transformers import BertConfig, BertModel

import newsbert_ray
from newsbert_ray import cli
from newsbert_ray.data.shards import MANIFEST
from newsbert_ray.deploy import doctor as doctors
from newsbert_ray.deploy.doctor import Finding, Parts
from newsbert_ray.storage.workdir import WorkDir
from tests.conftest import change_json
from tests.deploy.conftest import TOKEN, dashboard, guarded, notes, problem, problems

GB = 1 << 30


def findings_of(check: Callable[..., Iterator[Parts]]) -> Callable[..., Iterator[Finding]]:
    """The check, with findings that have names."""
    return lambda *arguments, **keywords: (Finding("", *parts) for parts in check(*arguments, **keywords))


def with_variables(check: Callable[..., Iterator[Finding]]) -> Callable[..., Iterator[Finding]]:
    """The check of an address where the environment has these variables only."""

    def checked(address: str | None, variables: Mapping[str, str]) -> Iterator[Finding]:
        with patch.dict(os.environ, variables, clear=True):
            return iter(list(check(address)))

    return checked


check_cluster = with_variables(findings_of(doctors.check_cluster))
check_devices = findings_of(doctors.check_devices)
check_ports = findings_of(doctors.check_ports)
check_shards = findings_of(doctors.check_shards)
check_storage = findings_of(doctors.check_storage)
check_teacher = findings_of(doctors.check_teacher)
check_token = with_variables(findings_of(doctors.check_token))
check_versions = findings_of(doctors.check_versions)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """The command line sets variables for libraries; other tests keep theirs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def only_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor checks only storage, shards and teacher, not this machine."""
    for name in ("check_versions", "check_devices", "check_ports", "check_token", "check_cluster"):
        monkeypatch.setattr(doctors, name, lambda *_, **__: [])


@pytest.mark.usefixtures("only_inputs")
def test_screen_json_and_exit_code(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script needs the exit code or JSON; a person the cure below the problem."""
    assert cli.main(["doctor", "--data", str(shards), "--out", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert f"shards    {shards}" in output.out
    assert cli.main(["doctor", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.err == "newsbert-ray doctor: 1 problem; each has its cure\n"
    line, cure = output.out.splitlines()[-2:]
    assert line.startswith("fix  shards")
    assert cure.strip().startswith("cure: newsbert-ray prepare")
    assert cli.main(["doctor", "--json", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert {tuple(finding) for finding in findings} == {("topic", "state", "message", "cure")}
    assert [finding["state"] for finding in findings if finding["topic"] == "shards"] == ["fix"]


def test_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster that a run will join is the one to check."""
    addresses: list[str | None] = []
    for name in ("check_versions", "check_devices", "check_storage", "check_ports", "check_token"):
        monkeypatch.setattr(doctors, name, lambda *_, **__: [])

    def check(address: str | None, *_: object) -> list[Finding]:
        addresses.append(address)
        return []

    monkeypatch.setattr(doctors, "check_cluster", check)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    list(newsbert_ray.doctor())
    list(newsbert_ray.doctor(address="http://head:8265"))
    assert addresses == ["head:6379", "http://head:8265"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that replace the real ones; None for a package that is not installed."""
    other: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        text = other[name] if name in other else real(name)
        if text is None:
            raise metadata.PackageNotFoundError(name)
        return text

    monkeypatch.setattr(metadata, "version", version)
    return other


def test_this_checkout_is_fine() -> None:
    """A doctor who finds a problem everywhere is not asked twice."""
    findings = list(check_versions())
    assert problems(iter(findings)) == []
    assert f"torch {metadata.version('torch')}" in findings[-1].message


def test_old_and_missing_packages(installed: dict[str, str | None]) -> None:
    """An old Ray fails in the middle of a sweep, with a message about an argument."""
    installed |= {"ray": "2.9.3", "optuna": None}
    ray, optuna = problems(check_versions())
    assert ray.message.startswith("ray 2.9.3, ")
    assert ">=2.55" in ray.message
    assert ray.cure.startswith("pip install 'ray[")
    assert (optuna.message, optuna.cure) == (
        "optuna is not installed, >=4.7 is needed",
        "pip install 'optuna>=4.7'",
    )


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on PYTHONPATH runs under any Python, up to the first line that it cannot read."""
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    assert problem(check_versions()).message == "Python 3.10.4, >=3.11 is needed"


def test_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for another processor, or a missing system library."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    finding = problem(check_versions())
    assert finding.message.startswith("pyarrow is installed but does not load")
    assert finding.cure.startswith("pip install --force-reinstall --no-deps pyarrow==")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its requirements are unknown."""

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert "is not installed" in problem(check_versions()).message


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight cores, 16 GB, no GPU, no bf16."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(doctors, "container_cores", lambda: 8.0)
    monkeypatch.setattr(doctors, "available_memory", lambda: 16 * GB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(collect_env, "get_nvidia_driver_version", lambda _: None)
    monkeypatch.setattr(doctors, "cpu_has_bf16", lambda: False)
    return monkeypatch


def test_ordinary_machine(machine: pytest.MonkeyPatch) -> None:
    """Cores, memory and bf16 are named."""
    assert [(finding.state, finding.message) for finding in check_devices()] == [
        ("ok", "8 cores"),
        ("ok", "16.0 GB of memory free"),
        ("ok", "no GPU, the processor is used (without bf16 in hardware)"),
    ]
    machine.setattr(doctors, "cpu_has_bf16", lambda: True)
    assert "(with bf16 in hardware)" in list(check_devices())[-1].message


def test_container_with_fewer_cores(machine: pytest.MonkeyPatch) -> None:
    """PyTorch would start 8 threads on 2.5 cores."""
    machine.setattr(doctors, "container_cores", lambda: 2.5)
    assert "this container may use 2.5" in notes(check_devices())
    assert "--threads 2" in notes(check_devices())


@pytest.mark.parametrize(("free", "state"), [(GB // 2, "fix"), (2 * GB, "note"), (8 * GB, "ok")])
def test_free_memory(machine: pytest.MonkeyPatch, free: int, state: str) -> None:
    """Without it the system kills trials one after another."""
    machine.setattr(doctors, "available_memory", lambda: free)
    assert list(check_devices())[1].state == state


@pytest.mark.parametrize(("cuda", "message"), [(None, "is built without CUDA"), ("12.8", "cannot use it")])
def test_gpu_that_pytorch_does_not_use(machine: pytest.MonkeyPatch, cuda: str | None, message: str) -> None:
    """Training would run on the processor without a word, 50 times slower."""
    machine.setattr(collect_env, "get_nvidia_driver_version", lambda _: "535.1")
    machine.setattr(torch.version, "cuda", cuda)
    finding = problem(check_devices())
    assert message in finding.message
    assert ("driver for CUDA 12.8" in finding.cure) == (cuda is not None)


def test_cuda_build_without_a_gpu(machine: pytest.MonkeyPatch) -> None:
    """Right on a cluster's head; in a container a forgotten flag."""
    machine.setattr(torch.version, "cuda", "12.8")
    assert "docker run --gpus all" in notes(check_devices())


def test_gpus_and_bf16(machine: pytest.MonkeyPatch) -> None:
    """bf16 on a card without it is emulated, slower than fp32."""
    cards = [
        SimpleNamespace(name="T4", total_memory=16 * GB, major=7),
        SimpleNamespace(name="L4", total_memory=24 * GB, major=8),
    ]
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    machine.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    assert [finding.message for finding in check_devices()][-2:] == [
        "GPU 0: T4, 16 GB, without bf16 in hardware",
        "GPU 1: L4, 24 GB, with bf16 in hardware",
    ]


def test_storage_leaves_no_trace(tmp_path: Path) -> None:
    """Not even the folder is made."""
    (finding,) = check_storage(str(tmp_path / "runs/new"))
    assert finding.state in ("ok", "note")  # as much space as this machine has
    assert f"{tmp_path} is writable" in finding.message
    assert list(tmp_path.iterdir()) == []


def test_storage_at_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong credentials would be noticed at the first checkpoint, on machines paid by the hour."""

    def check(workdir: WorkDir) -> None:
        if workdir.location != "s3://bucket/runs":
            raise ValueError(f"{workdir.location}: no such bucket")

    monkeypatch.setattr(WorkDir, "check_writable", check)
    assert [finding.state for finding in check_storage("s3://bucket/runs")] == ["ok"]
    finding = problem(check_storage("s3://other/runs"))
    assert finding.message == "s3://other/runs: no such bucket"
    assert "credentials" in finding.cure


def test_storage_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the way, or a disk that is mounted read-only."""
    (tmp_path / "runs").write_text("a file")
    assert "is a file" in problem(check_storage(str(tmp_path / "runs/first"))).message

    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    finding = problem(check_storage(str(tmp_path)))
    assert finding.message == f"{tmp_path} is not writable (Permission denied)"


@pytest.mark.parametrize(("free", "state"), [(GB // 2, "fix"), (5 * GB, "note"), (50 * GB, "ok")])
def test_space_for_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    """A full disk ends every trial from then on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    (finding,) = check_storage(str(tmp_path))
    assert finding.state == state


def listen(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """These addresses listen; one more connection is open."""
    sockets = [SimpleNamespace(status="LISTEN", laddr=SimpleNamespace(ip=ip, port=n)) for ip, n in addresses]
    sockets.append(SimpleNamespace(status="ESTABLISHED", laddr=SimpleNamespace(ip="10.0.0.1", port=10001)))
    monkeypatch.setattr(psutil, "net_connections", lambda kind: sockets)
    monkeypatch.setattr(psutil, "process_iter", lambda _: [])


def run_head(monkeypatch: pytest.MonkeyPatch, port: int, mode: str | None, *, readable: bool = True) -> None:
    """A head's central process."""

    def environ() -> dict[str, str]:
        if not readable:
            raise psutil.AccessDenied
        return {"HOME": "/root"} | ({"RAY_AUTH_MODE": mode} if mode else {})

    info = {"name": "gcs_server", "cmdline": ["gcs_server", "--log_dir=/t", f"--gcs_server_port={port}"]}
    listener = SimpleNamespace(status="LISTEN", laddr=SimpleNamespace(port=6500))
    process = SimpleNamespace(info=info, environ=environ, net_connections=lambda kind: [listener])
    others = [SimpleNamespace(info={"name": "python", "cmdline": None})]
    monkeypatch.setattr(psutil, "process_iter", lambda _: [*others, process])


def test_free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open connection is no server."""
    listen(monkeypatch, ("127.0.0.1", 22))
    (finding,) = check_ports()
    assert finding.state == "ok"


@pytest.mark.parametrize(
    ("port", "option"), [(6379, "--port"), (8265, "--dashboard-port"), (10001, "--ray-client")]
)
def test_port_in_use(monkeypatch: pytest.MonkeyPatch, port: int, option: str) -> None:
    """6379 is Redis's too; `ray start` then speaks of a cluster that it found there."""
    listen(monkeypatch, ("::ffff:127.0.0.1", port))
    assert f"port {port} " in notes(check_ports())
    assert "is in use, at 127.0.0.1 |" in notes(check_ports())
    assert option in notes(check_ports())


@pytest.mark.parametrize(("address", "port"), [("0.0.0.0", 6500), ("::", 0), ("192.168.1.10", 6500)])
def test_open_head_without_a_token(monkeypatch: pytest.MonkeyPatch, address: str, port: int) -> None:
    """Everyone who can reach it can run programs as its user; port 0 means that it chose one itself."""
    listen(monkeypatch, (address, 6500))
    run_head(monkeypatch, port, None)
    finding = problem(check_ports())
    assert f"port 6500, open to other machines at {address}, and asks for no token" in finding.message
    assert "RAY_AUTH_MODE=token" in finding.cure


@pytest.mark.parametrize(
    ("address", "mode"), [("127.0.0.1", None), ("::ffff:127.0.0.1", None), ("::", "token")]
)
def test_protected_head(monkeypatch: pytest.MonkeyPatch, address: str, mode: str | None) -> None:
    """On the loopback, or with a token."""
    listen(monkeypatch, (address, 6500))
    run_head(monkeypatch, 6500, mode)
    assert {finding.state for finding in check_ports()} == {"ok"}


def test_unknown_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's head; a system that lists ports to root only."""
    listen(monkeypatch, ("0.0.0.0", 6500))
    run_head(monkeypatch, 6500, None, readable=False)
    assert "another user's" in notes(check_ports())
    assert problems(check_ports()) == []

    def deny(kind: str) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", deny)
    assert "does not tell" in notes(check_ports())


def token_file(path: Path, text: str = TOKEN, *, mode: int = 0o600) -> Path:
    """A file with a token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_token_in_its_file(tmp_path: Path) -> None:
    """The usual way: a file that only its user can read."""
    token_file(tmp_path / ".ray/auth_token")
    (finding,) = check_token("https://head:8265", {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)})
    assert finding.state == "ok"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
@pytest.mark.parametrize("default", [True, False])
def test_token_that_others_can_read(tmp_path: Path, mode: int, default: bool) -> None:
    """Ray itself writes its token readable for everyone."""
    path = token_file(tmp_path / (".ray/auth_token" if default else "elsewhere"), mode=mode)
    variables = {} if default else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    finding = problem(check_token(None, {"HOME": str(tmp_path), **variables}))
    assert finding.message.endswith(f"can read it (mode {mode:04o})")
    assert finding.cure == f"chmod 600 {path}"


def test_token_that_is_missing_or_empty(tmp_path: Path) -> None:
    """Ray reports both at the end of a page of stack frames."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert "No such file" in problem(check_token(None, variables)).message
    token_file(tmp_path / "token", "\n")
    assert "contains no token" in problem(check_token(None, variables)).message
    empty = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": " "}
    assert problem(check_token(None, empty)).message == "RAY_AUTH_TOKEN is empty"


def test_token_that_ray_does_not_send(tmp_path: Path) -> None:
    """A token file alone does nothing: Ray sends it only if RAY_AUTH_MODE says so."""
    token_file(tmp_path / ".ray/auth_token")
    variables = {"HOME": str(tmp_path)}
    assert problem(check_token("https://head:8265", variables)).cure == "export RAY_AUTH_MODE=token"
    assert problems(check_token(None, variables)) == []


def check(address: str | None, token: str | None = TOKEN) -> Iterator[Finding]:
    """check_cluster with this token."""
    variables = {"HOME": "/nonexistent"} | ({} if token is None else {"RAY_AUTH_TOKEN": token})
    return check_cluster(address, {"no_proxy": "*", **variables})


def test_cluster_behind_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it accepts us, and has our version."""
    monkeypatch.setenv("no_proxy", "*")
    with dashboard(guarded()) as (address, _):
        (finding,) = check(address)
        assert (finding.state, metadata.version("ray") in finding.message) == ("ok", True)
        assert "requires a token, and none was found" in problem(check(address, None)).message
        assert "refuses the token" in problem(check(address, "cd" * 32)).message
    with dashboard(guarded(ray="2.49.1")) as (address, _):
        finding = problem(check(address))
        assert "runs Ray 2.49.1" in finding.message
        assert "pip install ray==2.49.1" in finding.cure


def test_address_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for minutes."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert "no cluster answers" in problem(check(f"http://127.0.0.1:{port}")).message
    assert (
        "no Ray head answers ([Errno 111] Connection refused)" in problem(check(f"127.0.0.1:{port}")).message
    )


def test_listener_that_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client waits for an answer as long as it may."""
    monkeypatch.setattr("newsbert_ray.ray_session.ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "no Ray head answers" in problem(check(address)).message


@pytest.mark.parametrize("address", ["head", "head:port", "http://"])
def test_wrong_address(address: str) -> None:
    """A slip in the address is not a cluster that is down."""
    assert "not an address" in problem(check(address)).message


@pytest.mark.parametrize("address", [None, "local"])
def test_no_cluster_is_fine(address: str | None) -> None:
    """Most people work on one machine."""
    assert [finding.state for finding in check(address)] == ["ok"]


@pytest.mark.ray
@pytest.mark.slow
def test_real_head(tmp_path: Path) -> None:
    """Dashboard and head as Ray starts them; the head is asked through a private function."""
    from cluster.local import LocalCluster

    with LocalCluster(cpus=1) as cluster:
        right = {"HOME": str(tmp_path), **cluster.environment}
        wrong = right | {"RAY_AUTH_TOKEN_PATH": str(token_file(tmp_path / "wrong", "cd" * 32))}
        none = {name: value for name, value in right.items() if not name.startswith("RAY_AUTH")}
        for address in (cluster.dashboard, cluster.address):
            (finding,) = check_cluster(address, right)
            assert finding.state == "ok", finding
            for variables in (wrong, none):
                assert "token" in problem(check_cluster(address, variables)).message
        port = cluster.address.rpartition(":")[2]
        assert f"a Ray head runs here, port {port}, on the loopback only" in [
            finding.message for finding in check_ports()
        ]


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    """Shards to damage."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    return folder


def test_whole_shards(shards: Path) -> None:
    """As `prepare` wrote them."""
    (finding,) = check_shards(str(shards), deep=True)
    assert finding.state == "ok"
    assert "all hashes are right" in finding.message


def test_no_shards(copied: Path, tmp_path: Path) -> None:
    """The wrong folder, or shards of an older version."""
    assert "no prepared shards there" in problem(check_shards(str(tmp_path))).message
    change_json(copied / MANIFEST, format=1)
    assert "format 1" in problem(check_shards(str(copied))).message


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "(missing)"), ("cut", "bytes instead of"), ("tokenizer", "tokenizer.json: missing")],
)
def test_incomplete_shards(copied: Path, damage: str, message: str) -> None:
    """A copy that broke off would be noticed by the trial that reads the last shard."""
    shard = copied / json.loads((copied / MANIFEST).read_text())["texts"]["tokens"]["file"]
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shutil.rmtree(copied / "tokenizer")
    finding = problem(check_shards(str(copied)))
    assert message in finding.message
    assert "--overwrite" in finding.cure


def test_changed_shards(copied: Path) -> None:
    """A flipped byte keeps the size: only --deep finds it."""
    shard = copied / json.loads((copied / MANIFEST).read_text())["splits"]["train"][0]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert problems(check_shards(str(copied))) == []
    assert "its content has changed" in problem(check_shards(str(copied), deep=True)).message


@pytest.fixture
def teacher(tmp_path: Path, shards: Path) -> Path:
    """An encoder's folder with the shards' tokeniser."""
    folder = tmp_path / "teacher"
    shutil.copytree(shards / "tokenizer", folder)
    config = BertConfig(
        vocab_size=400, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_suitable_teacher(teacher: Path, shards: Path) -> None:
    """`scratch`, and a folder whose tokeniser made the shards."""
    assert [finding.state for finding in check_teacher("scratch", str(shards))] == ["ok"]
    assert [finding.state for finding in check_teacher(str(teacher), str(shards))] == ["ok"]
    assert [finding.state for finding in check_teacher(str(teacher), None)] == ["ok"]


def test_teacher_with_pickled_weights(teacher: Path, shards: Path) -> None:
    """As in most folders of older encoders; a run refuses them after it has read the shards."""
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    finding = problem(check_teacher(str(teacher), str(shards)))
    assert "cannot be loaded as safetensors" in finding.message
    (teacher / "pytorch_model.bin").unlink()
    assert "model.safetensors" in problem(check_teacher(str(teacher), str(shards))).message


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "evil"}'])
def test_teacher_without_a_usable_config(teacher: Path, text: str | None) -> None:
    """A wrong folder, a broken download, a model of another library."""
    (teacher / "config.json").unlink()
    if text is not None:
        (teacher / "config.json").write_text(text)
    assert "config.json" in problem(check_teacher(str(teacher), None)).message


def test_teacher_with_another_tokeniser(teacher: Path, shards: Path) -> None:
    """The same ids would be other words."""
    path = teacher / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer))
    finding = problem(check_teacher(str(teacher), str(shards)))
    assert "has another tokeniser" in finding.message
    assert "newsbert-ray prepare" in finding.cure


def test_teacher_that_is_nowhere(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in its name, or no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such folder" in problem(check_teacher("./no/such/teacher", str(shards))).message
