"""The doctor's verb: lines for a person, JSON and an exit code for a script."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from newsbert_ray import cli
from newsbert_ray.data.shards import MANIFEST
from newsbert_ray.deploy import doctor as access
from newsbert_ray.deploy import doctor as doctors
from newsbert_ray.deploy import doctor as machine
from newsbert_ray.deploy.doctor import (
    Finding,
    check_cluster,
    check_devices,
    check_ports,
    check_shards,
    check_storage,
    check_teacher,
    check_token,
    check_versions,
)
from tests.deploy.conftest import ill, notes, the_one_to_mend


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """The command line silences libraries through the environment; other tests keep theirs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test names is looked at; the rest is this machine's affair."""
    for name in ("check_versions", "check_devices", "check_ports", "check_token", "check_cluster"):
        monkeypatch.setattr(doctors, name, lambda *_, **__: [])


@pytest.mark.usefixtures("quiet_machine")
def test_the_verb_ends_with_the_number_of_ills(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that looks before it submits needs the exit code; a person the cure below the ill."""
    assert cli.main(["doctor", "--data", str(shards), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"shards    {shards}" in said.out
    assert cli.main(["doctor", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err == "newsbert-ray doctor: 1 to mend; what to do stands below each\n"
    ill_line, cure = said.out.splitlines()[-2:]
    assert ill_line.startswith("mend shards")
    assert cure.strip().startswith("cure: newsbert-ray prepare")


@pytest.mark.usefixtures("quiet_machine")
def test_the_verb_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Monitoring reads JSON; colours or wrapped lines in it would be another fault to mend."""
    assert cli.main(["doctor", "--json", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {tuple(item) for item in found} == {("topic", "state", "found", "cure")}
    assert [item["state"] for item in found if item["topic"] == "shards"] == ["mend"]


def test_the_address_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster that the run will join is the one to look at."""
    asked: list[str | None] = []
    for name in ("check_versions", "check_devices", "check_storage", "check_ports", "check_token"):
        monkeypatch.setattr(doctors, name, lambda *_, **__: [])

    def ask(address: str | None, *_: object, **__: object) -> list[Finding]:
        asked.append(address)
        return []

    monkeypatch.setattr(doctors, "check_cluster", ask)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    list(doctors.doctor())
    list(doctors.doctor(address="http://head:8265"))
    assert asked == ["head:6379", "http://head:8265"]


ROOT = Path(__file__).parents[2]
GB = 1 << 30


def test_this_checkout_is_fit() -> None:
    """A doctor who finds something with everybody is not asked twice."""
    findings = check_versions(ROOT)
    assert ill(findings) == []
    assert f"torch {metadata.version('torch')}" in findings[-1].found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions other than the true ones; None for a package that is not installed."""
    other: dict[str, str | None] = {}
    true = metadata.version

    def version(name: str) -> str:
        found = other[name] if name in other else true(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return other


def test_an_old_package_and_a_missing_one(installed: dict[str, str | None]) -> None:
    """An old Ray fails in the midst of a sweep, with a message about an argument."""
    installed |= {"ray": "2.9.3", "optuna": None}
    found = {finding.found: finding.cure for finding in ill(check_versions(ROOT))}
    assert found == {
        "ray 2.9.3, 2.55 or newer is needed": "pip install 'ray>=2.55'",
        "optuna is not installed, 4.2 or newer is needed": "pip install 'optuna>=4.2'",
    }


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on PYTHONPATH runs under any Python, up to the first line that it cannot read."""
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    found = the_one_to_mend(check_versions(ROOT))
    assert found.found == "Python 3.10.4, 3.11 or newer is needed"


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip says it is there; a missing system library says otherwise, five frames deep."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = the_one_to_mend(check_versions(ROOT))
    assert "pyarrow is installed and does not load" in found.found
    assert found.cure.startswith("pip install --force-reinstall --no-deps pyarrow==")


def test_only_the_files_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its metadata nothing is known of what the package needs."""
    monkeypatch.setattr(machine, "DISTRIBUTION", "newsbert-ray-of-nobody")
    assert "is not installed here" in the_one_to_mend(check_versions(ROOT)).found


def test_other_versions_than_the_pinned_are_noted(tmp_path: Path) -> None:
    """Numbers that differ from the README's are put down to bad luck, and it was another torch."""
    (tmp_path / "constraints.txt").write_text("# pinned\ntorch==1.0.0\nPyYAML==0.1\nnobody==9\n")
    findings = check_versions(tmp_path)
    assert ill(findings) == []
    assert f"torch {metadata.version('torch').partition('+')[0]} (pinned 1.0.0)" in notes(findings)
    assert "pyyaml" in notes(findings)
    assert "nobody" not in notes(findings)


def machine_at(
    root: Path, *, available: int = 16 * GB, cpu: str = "max 100000", limit: str = "max", used: int = 0
) -> Path:
    """A file system that says so."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "proc/cpuinfo").write_text("flags : fpu avx512_bf16 sse\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text(f"{cpu}\n")
    (root / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
    (root / "sys/fs/cgroup/memory.current").write_text(f"{used}\n")
    (root / "dev").mkdir()
    return root


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees none, whatever this machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.usefixtures("no_gpu")
def test_a_whole_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU is no ill machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    findings = check_devices(machine_at(tmp_path))
    assert {finding.state for finding in findings} == {"ok"}
    said = [finding.found for finding in findings]
    assert said == [
        "8 cores",
        "16.0 GB of memory free",
        "no GPU, the processor is used (with bf16 in hardware)",
    ]


@pytest.mark.usefixtures("no_gpu")
def test_a_container_with_fewer_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 trials on a quota of two cores take turns, and each is slower than alone."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    findings = check_devices(machine_at(tmp_path, cpu="250000 100000"))
    assert "64 cores are seen, this container may use 2.5" in notes(findings)
    assert "--concurrency 2" in notes(findings)


@pytest.mark.usefixtures("no_gpu")
def test_the_older_files_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the clusters still have the first version of control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    root = machine_at(tmp_path)
    shutil.rmtree(root / "sys/fs/cgroup")
    (root / "sys/fs/cgroup/cpu").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory").mkdir()
    (root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("400000\n")
    (root / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text(f"{GB}\n")
    (root / "sys/fs/cgroup/memory/memory.usage_in_bytes").write_text(f"{GB // 2}\n")
    findings = check_devices(root)
    assert "may use 4:" in notes(findings)
    assert the_one_to_mend(findings).found.startswith("0.5 GB of memory free")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "given",
    [{"available": GB // 2}, {"limit": str(4 * GB), "used": 4 * GB - GB // 2}],
    ids=["machine", "container"],
)
def test_too_little_memory(tmp_path: Path, given: dict[str, Any]) -> None:
    """The kernel's killer says nothing to the one whose process it was."""
    assert the_one_to_mend(check_devices(machine_at(tmp_path, **given))).found.startswith("0.5 GB")


@pytest.mark.parametrize(("cuda", "said"), [(None, "was built without CUDA"), ("12.8", "cannot use it")])
def test_a_gpu_that_torch_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str
) -> None:
    """A night on the processor beside an idle GPU: nothing fails, so nobody looks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    root = machine_at(tmp_path)
    (root / "dev/nvidia0").touch()
    found = the_one_to_mend(check_devices(root))
    assert said in found.found
    assert ("driver for CUDA 12.8" in found.cure) == (cuda is not None)


def test_a_cuda_build_without_a_gpu_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right on a cluster's head; in a container it is a forgotten flag."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "docker run --gpus all" in notes(check_devices(machine_at(tmp_path)))


def test_a_gpu_is_named_with_its_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on a card without it is emulated, slower than fp32."""
    cards = [
        SimpleNamespace(name="T4", total_memory=16 * GB, major=7),
        SimpleNamespace(name="L4", total_memory=24 * GB, major=8),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    said = [finding.found for finding in check_devices(machine_at(tmp_path))]
    assert said[-2:] == [
        "GPU 0: T4, 16 GB, without bf16 in hardware",
        "GPU 1: L4, 24 GB, with bf16 in hardware",
    ]


def test_storage_that_can_be_written(tmp_path: Path) -> None:
    """Looking must leave no trace, and make no folder."""
    (found,) = check_storage(str(tmp_path / "runs/new"))
    assert found.state in ("ok", "note")  # as much room as this machine has
    assert f"{tmp_path} can be written" in found.found
    assert list(tmp_path.iterdir()) == []


def test_storage_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong credentials of a bucket are found by the first checkpoint, on machines paid by the hour."""

    def check(place: str) -> None:
        if place != "s3://bucket/runs":
            raise ValueError(f"{place}: no such bucket")

    monkeypatch.setitem(sys.modules, "newsbert_ray.storage.workdir", SimpleNamespace(check_writable=check))
    assert [found.state for found in check_storage("s3://bucket/runs")] == ["ok"]
    found = the_one_to_mend(check_storage("s3://other/runs"))
    assert found.found == "s3://other/runs: no such bucket"
    assert "credentials" in found.cure


def test_storage_that_is_a_file(tmp_path: Path) -> None:
    """The run itself would find out after the teacher was loaded."""
    (tmp_path / "runs").write_text("no folder")
    assert "is a file" in the_one_to_mend(check_storage(str(tmp_path / "runs/first"))).found


def test_storage_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared disk that is mounted read-only is found by the first checkpoint, an epoch in."""

    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    found = the_one_to_mend(check_storage(str(tmp_path)))
    assert found.found == f"{tmp_path} cannot be written (Permission denied)"


@pytest.mark.parametrize(("free", "state"), [(GB // 2, "mend"), (5 * GB, "note"), (50 * GB, "ok")])
def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    """A disk that fills in the night ends every trial from then on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    (found,) = check_storage(str(tmp_path))
    assert found.state == state


_HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def listening(root: Path, *addresses: tuple[str, int], version: int = 4) -> None:
    """The kernel's table of sockets; the last is only connected, not listening."""
    table = root / "proc/net" / ("tcp" if version == 4 else "tcp6")
    table.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"   {n}: {address}:{port:04X} 00000000:0000 0A 0 0\n" for n, (address, port) in enumerate(addresses)
    ]
    table.write_text(_HEADER + "".join(rows) + "   9: 0100007F:2711 0100007F:1F90 01 0 0\n")


def head(root: Path, port: int, *, mode: str | None, readable: bool = True) -> None:
    """A process that is a head's central one."""
    folder = root / "proc/4711"
    folder.mkdir(parents=True)
    (folder / "cmdline").write_text(
        f"/x/ray/core/src/ray/gcs/gcs_server\0--log_dir=/t\0--gcs_server_port={port}\0"
    )
    if readable:
        variables = "HOME=/root\0" + (f"RAY_AUTH_MODE={mode}\0" if mode else "")
        (folder / "environ").write_text(variables)


LOOPBACK, EVERYWHERE = "0100007F", "00000000"


def test_free_ports(tmp_path: Path) -> None:
    """A connection to a port is no server on it."""
    listening(tmp_path, (LOOPBACK, 22), (LOOPBACK, 10000))
    (found,) = check_ports(tmp_path)
    assert found.state == "ok"


@pytest.mark.parametrize(
    ("port", "option"), [(6379, "--port"), (8265, "--dashboard-port"), (10001, "--ray-client")]
)
def test_a_taken_port_names_the_option(tmp_path: Path, port: int, option: str) -> None:
    """6379 is Redis's too; `ray start` then speaks of a cluster that it found there."""
    listening(tmp_path, (LOOPBACK, port))
    assert f"port {port} " in notes(check_ports(tmp_path))
    assert option in notes(check_ports(tmp_path))
    listening(tmp_path, ("0" * 16 + "FFFF00000100007F", port), version=6)
    assert "is taken, at 127.0.0.1 |" in notes(check_ports(tmp_path))


@pytest.mark.parametrize(
    ("address", "version", "shown"),
    [(EVERYWHERE, 4, "0.0.0.0"), ("0" * 32, 6, "::"), ("0A01A8C0", 4, "192.168.1.10")],
)
def test_an_open_head_without_a_token(tmp_path: Path, address: str, version: int, shown: str) -> None:
    """Whoever reaches such a port runs programs as its user: it has been the way into many a cluster."""
    listening(tmp_path, (address, 6500), version=version)
    head(tmp_path, 6500, mode=None)
    found = the_one_to_mend(check_ports(tmp_path))
    assert f"port 6500, reachable from other machines at {shown} and asks for no token" in found.found
    assert "RAY_AUTH_MODE=token" in found.cure


@pytest.mark.parametrize(
    ("address", "version", "mode"),
    [(LOOPBACK, 4, None), ("0" * 16 + "FFFF00000100007F", 6, None), (EVERYWHERE, 4, "token")],
)
def test_a_guarded_head_is_fit(tmp_path: Path, address: str, version: int, mode: str | None) -> None:
    """A head that only this machine reaches, or that asks for a token, is as it should be."""
    listening(tmp_path, (address, 6500), version=version)
    head(tmp_path, 6500, mode=mode)
    assert {finding.state for finding in check_ports(tmp_path)} == {"ok"}


def test_a_head_of_somebody_else_is_noted(tmp_path: Path) -> None:
    """What cannot be known must not be claimed."""
    listening(tmp_path, (EVERYWHERE, 6500))
    head(tmp_path, 6500, mode=None, readable=False)
    assert "another user's" in notes(check_ports(tmp_path))
    assert ill(check_ports(tmp_path)) == []


def token_file(path: Path, text: str = "ab" * 32, *, mode: int = 0o600) -> Path:
    """A file with a token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_in_its_place(tmp_path: Path) -> None:
    """The usual way must pass: a file for its user alone."""
    token_file(tmp_path / ".ray/auth_token")
    (found,) = check_token("https://head:8265", {"RAY_AUTH_MODE": "token"}, home=tmp_path)
    assert found.state == "ok"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
@pytest.mark.parametrize("usual", [True, False])
def test_a_token_that_others_can_read(tmp_path: Path, mode: int, usual: bool) -> None:
    """Ray itself writes its token for everybody to read; on a shared machine that is no token."""
    path = token_file(tmp_path / (".ray/auth_token" if usual else "elsewhere"), mode=mode)
    variables = {} if usual else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    found = the_one_to_mend(check_token(None, variables, home=tmp_path))
    assert found.found.endswith(f"may read it (mode {mode:04o})")
    assert found.cure == f"chmod 600 {path}"


def test_a_token_that_is_empty_or_not_there(tmp_path: Path) -> None:
    """Ray says of both that a file cannot be opened or is empty, at the end of a page of frames."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert "no token there" in the_one_to_mend(check_token(None, variables, home=tmp_path)).found
    token_file(tmp_path / "token", "\n")
    assert "is empty" in the_one_to_mend(check_token(None, variables, home=tmp_path)).found
    empty = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": " "}
    assert the_one_to_mend(check_token(None, empty, home=tmp_path)).found == "RAY_AUTH_TOKEN is empty"


def test_a_token_that_is_not_shown(tmp_path: Path) -> None:
    """A token file alone does nothing: a client shows it only where RAY_AUTH_MODE says so."""
    token_file(tmp_path / ".ray/auth_token")
    found = the_one_to_mend(check_token("https://head:8265", {}, home=tmp_path))
    assert found.cure == "export RAY_AUTH_MODE=token"
    assert ill(check_token(None, {}, home=tmp_path)) == []


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers /api/version as Ray's dashboard does, with a token."""

    version = metadata.version("ray")
    answer = b""

    def do_GET(self) -> None:
        shown = self.headers.get("Authorization")
        status = 401 if shown is None else 200 if shown == f"Bearer {'ab' * 32}" else 403
        status = status if self.path == "/api/version" else 404
        self.send_response(status)
        self.end_headers()
        if status == 200:
            self.wfile.write(
                self.answer or json.dumps({"version": "4", "ray_version": self.version}).encode()
            )

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of such a dashboard."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., list[Finding]]:
    """check_cluster with a token, the cluster's own by default."""

    def check(address: str | None, token: str | None = "ab" * 32) -> list[Finding]:
        variables: Mapping[str, str] = (
            {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        )
        return check_cluster(address, variables, home=tmp_path)

    return check


Ask = Callable[..., list[Finding]]


def test_a_cluster_that_lets_us_in(dashboard: str, ask: Ask) -> None:
    """The way to a submission, as far as it goes without submitting."""
    (found,) = ask(dashboard)
    assert found.state == "ok"
    assert f"Ray {metadata.version('ray')}" in found.found


@pytest.mark.parametrize(
    ("token", "said"), [(None, "asks for a token, and none is shown"), ("cd" * 32, "refuses our token")]
)
def test_a_cluster_that_does_not(dashboard: str, ask: Ask, token: str | None, said: str) -> None:
    """`Unauthorized` leaves open whether there was no token or a wrong one."""
    assert the_one_to_mend(ask(dashboard, token)).found == f"{dashboard}: {said}"


def test_a_cluster_of_another_ray(dashboard: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses to work across versions, after the package was uploaded."""
    monkeypatch.setattr(Dashboard, "version", "2.49.1")
    found = the_one_to_mend(ask(dashboard))
    assert f"Ray 2.49.1 there, {metadata.version('ray')} here" in found.found
    assert "pip install ray==2.49.1" in found.cure


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}"])
def test_a_server_that_is_no_dashboard(
    dashboard: str, ask: Ask, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """Grafana's port, or a proxy's page, is taken for the dashboard's."""
    monkeypatch.setattr(Dashboard, "answer", answer)
    assert "no Ray dashboard answers there" in the_one_to_mend(ask(dashboard)).found
    assert "answers 404" in the_one_to_mend(ask(f"{dashboard}/elsewhere")).found


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_an_address_where_nothing_answers(ask: Ask, form: str) -> None:
    """Ray itself would try for minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = form.format(probe.getsockname()[1])
    assert "nothing answers there (Connection refused)" in the_one_to_mend(ask(address)).found


def test_a_listener_that_is_no_head(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client waits for an answer as long as one lets it."""
    monkeypatch.setattr(access, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "no Ray head answers" in the_one_to_mend(ask(address)).found


@pytest.mark.parametrize("address", ["head", "head:port", "http://"])
def test_an_address_that_is_none(ask: Ask, address: str) -> None:
    """A slip in the address is not a cluster that is down."""
    assert the_one_to_mend(ask(address)).found == f"{address}: not an address"


def test_an_address_that_sends_the_token_in_clear(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over http the token is read along the way, and with it goes the whole cluster."""
    monkeypatch.setattr(
        socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError(113, "No route"))
    )
    first, second = ill(ask("http://head.example:8265"))
    assert "unencrypted" in first.found
    assert first.cure.startswith("ssh -L 8265:127.0.0.1:8265 head.example")
    assert "No route" in second.found
    assert "unencrypted" not in the_one_to_mend(ask("https://head.example:8265")).found


@pytest.mark.parametrize("address", [None, "local"])
def test_no_cluster_is_no_fault(ask: Ask, address: str | None) -> None:
    """Most people work on one machine."""
    assert [finding.state for finding in ask(address)] == ["ok"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_head(tmp_path: Path) -> None:
    """Both of a head's doors, as Ray itself keeps them; one is asked past Ray's public interface."""
    from cluster.local import LocalCluster

    with LocalCluster(cpus=1) as cluster:
        right = cluster.environment
        wrong = right | {"RAY_AUTH_TOKEN_PATH": str(token_file(tmp_path / "wrong", "cd" * 32))}
        none = {name: value for name, value in right.items() if not name.startswith("RAY_AUTH")}
        for address in (cluster.dashboard, cluster.address):
            (found,) = check_cluster(address, right, home=tmp_path)
            assert found.state == "ok", found
            assert "refuses our token" in the_one_to_mend(check_cluster(address, wrong, home=tmp_path)).found
            assert "none is shown" in the_one_to_mend(check_cluster(address, none, home=tmp_path)).found
        port = cluster.address.rpartition(":")[2]
        said = [finding for finding in check_ports() if f"port {port}" in finding.found]
        assert [finding.found for finding in said] == [
            f"a Ray head runs here, port {port}, on the loopback only"
        ]


def test_whole_shards(shards: Path) -> None:
    """What `prepare` has just written is fit, with all its bytes."""
    (found,) = check_shards(str(shards), deep=True)
    assert found.state == "ok"
    assert "each hash is right" in found.found


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    """Shards to damage."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    return folder


def test_no_shards(tmp_path: Path) -> None:
    """The wrong folder is the commonest slip of all."""
    assert "no prepared shards there" in the_one_to_mend(check_shards(str(tmp_path))).found


def test_shards_of_another_format(copied: Path) -> None:
    """Shards of an older version were copied to a newer cluster."""
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    assert "format 1" in the_one_to_mend(check_shards(str(copied))).found


@pytest.mark.parametrize("kind", ["missing", "cut", "tokenizer"])
def test_shards_that_are_not_all_there(copied: Path, kind: str) -> None:
    """A copy to the cluster that broke off is found by the trial that reads the last shard."""
    shard = copied / json.loads((copied / MANIFEST).read_text())["texts"]["tokens"]["file"]
    if kind == "missing":
        shard.unlink()
    elif kind == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shutil.rmtree(copied / "tokenizer")
    found = the_one_to_mend(check_shards(str(copied)))
    assert {"missing": "(missing)", "cut": "bytes instead of", "tokenizer": "tokenizer.json"}[
        kind
    ] in found.found
    assert "--overwrite true" in found.cure


def test_shards_with_other_bytes(copied: Path) -> None:
    """A flipped byte has the right size; only --deep finds it, and only then says so."""
    shard = copied / json.loads((copied / MANIFEST).read_text())["splits"]["train"][0]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert ill(check_shards(str(copied))) == []
    assert "other bytes" in the_one_to_mend(check_shards(str(copied), deep=True)).found


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


def test_a_fit_teacher(teacher: Path, shards: Path) -> None:
    """`scratch` and a folder that made the shards are fit."""
    assert [found.state for found in check_teacher("scratch", str(shards))] == ["ok"]
    assert [found.state for found in check_teacher(str(teacher), str(shards))] == ["ok"]
    assert [found.state for found in check_teacher(str(teacher), None)] == ["ok"]


def test_a_teacher_with_only_pickled_weights(teacher: Path, shards: Path) -> None:
    """Most folders of older encoders are such; the run refuses them, after it has read the shards."""
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    found = the_one_to_mend(check_teacher(str(teacher), str(shards)))
    assert "only pickled weights (pytorch_model.bin)" in found.found
    (teacher / "pytorch_model.bin").unlink()
    assert "no weights" in the_one_to_mend(check_teacher(str(teacher), str(shards))).found


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "evil"}'])
def test_a_teacher_without_a_usable_config(teacher: Path, text: str | None) -> None:
    """A folder above or below the right one, a cut download, a model of another library."""
    (teacher / "config.json").unlink()
    if text is not None:
        (teacher / "config.json").write_text(text)
    assert "config.json" in the_one_to_mend(check_teacher(str(teacher), None)).found


def test_a_teacher_that_reads_other_tokens(teacher: Path, shards: Path) -> None:
    """The same ids would mean other words: the run would train on noise if it did not refuse."""
    path = teacher / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer))
    found = the_one_to_mend(check_teacher(str(teacher), str(shards)))
    assert "has another tokeniser" in found.found
    assert "newsbert-ray prepare" in found.cure


def test_a_teacher_by_a_name_that_is_nowhere(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in a name, or a machine without network: known before the run, not after the shards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = the_one_to_mend(check_teacher("./no/such/teacher", str(shards)))
    assert "no such folder" in found.found
