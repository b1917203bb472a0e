"""Who listens on a machine, read from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.deploy.doctor import check_ports
from tests.deploy.conftest import ill, notes, the_one_to_mend

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
