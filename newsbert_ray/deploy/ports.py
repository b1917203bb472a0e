"""Who listens on this machine: Ray's usual ports, and heads that others can reach. Starts no Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from newsbert_ray.deploy.finding import Finding, Topic

NEW_TOKEN = "(umask 077; ray get-auth-token --generate > /dev/null)"
"""Writes ~/.ray/auth_token for its user alone; without the umask Ray lets everybody read it."""
PORTS: Mapping[int, tuple[str, str]] = {
    6379: ("a head's own", "--port"),
    8265: ("its dashboard's, for jobs", "--dashboard-port"),
    10001: ("Ray Client's", "--ray-client-server-port"),
}
"""Ray's usual ports: what listens there, and the option of `ray start` that takes another."""


def check_ports(root: Path = Path("/")) -> list[Finding]:
    """Ray's usual ports on this machine, and whether a head here can be reached from other machines.

    Args:
        root: of the file system that says so (/proc).
    """
    topic = Topic("ports")
    listening = _listeners(root / "proc/net")
    taken = sorted(PORTS.keys() & listening.keys())
    for port in taken:
        whose, option = PORTS[port]
        topic.note(
            f"port {port} ({whose}) is taken, at {', '.join(sorted(listening[port]))}",
            f"where a second head is to start here: ray start --head {option} ANOTHER",
        )
    if not taken:
        topic.ok(f"Ray's usual ports are free ({', '.join(map(str, PORTS))})")
    for port, variables in _heads(root / "proc"):
        outside = sorted(address for address in listening.get(port, ()) if not is_loopback(address))
        where = "a Ray head runs here" + (f", port {port}" if port else "")
        if not outside:
            topic.ok(f"{where}, on the loopback only")
        elif variables is None:
            topic.note(f"{where}, reachable from other machines; another user's: is a token asked for?")
        elif variables.get("RAY_AUTH_MODE", "").lower() == "token":
            topic.ok(f"{where}, reachable from other machines at {', '.join(outside)}, and asks for a token")
        else:
            topic.mend(
                f"{where}, reachable from other machines at {', '.join(outside)} and asks for no token: "
                "whoever reaches it runs programs as you",
                f"end that head; {NEW_TOKEN}; RAY_AUTH_MODE=token ray start --head ...",
            )
    return topic.findings


def _listeners(folder: Path) -> dict[int, set[str]]:
    """Port -> addresses on which some process of this machine listens for TCP."""
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (folder / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":
                address, _, port = fields[1].partition(":")
                found.setdefault(int(port, 16), set()).add(_address(address))
    return found


def _address(digits: str) -> str:
    """`0100007F` -> `127.0.0.1`: the kernel writes words of four bytes, each the wrong way round."""
    raw = bytes.fromhex(digits)
    found = ip_address(b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4)))
    return str(getattr(found, "ipv4_mapped", None) or found)


def _heads(folder: Path) -> Iterator[tuple[int, Mapping[str, str] | None]]:
    """Port and environment of each Ray head's central process on this machine; None for another user's."""
    for path in sorted(folder.glob("[0-9]*/cmdline")):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        port = re.search(r"--gcs_server_port=(\d+)", " ".join(words))
        if Path(words[0]).name != "gcs_server" or port is None:
            continue
        try:
            lines = path.with_name("environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            yield int(port[1]), None
            continue
        yield int(port[1]), dict(line.split("=", 1) for line in lines if "=" in line)


def is_loopback(host: str) -> bool:
    """Whether a host or address is this machine's own, which no other can reach."""
    if host == "localhost":
        return True
    try:
        found = ip_address(host)
    except ValueError:
        return False
    return found.is_loopback
