"""The first word with a cluster's dashboard: its address, the token it asks for, its version. Knows no Ray.

Ray's own client has no time-out, lets RAY_ADDRESS go over what it is given, and answers a slip with a page.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from newsbert_ray.deploy.ports import is_loopback

ANSWER_SECONDS = 15.0
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


class ContactError(ValueError):
    """A cluster that cannot be spoken to; the text names the address and the cure."""


@dataclass(frozen=True)
class Contact:
    """A dashboard that has answered. `token`: what it asks for, None where it lets everybody in."""

    address: str
    token: str | None
    ray: str

    def __repr__(self) -> str:
        """Without the token, which would end up in a log."""
        return f"Contact({self.address!r}, ray={self.ray!r})"


def make_contact(
    address: str | None,
    *,
    token_file: str | Path | None = None,
    say: Callable[[str], None],
    environment: Mapping[str, str] = os.environ,
) -> Contact:
    """Ask the dashboard for its version: first without the token, which is shown to who asks for it only.

    Args:
        address: http(s)://HOST:PORT, or HOST:PORT; RAY_API_SERVER_ADDRESS by default.
        token_file: file with the token; RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token by default.
        say: hears of what is unsafe, or unlike on the two sides.
    Raises:
        ContactError: no address, nobody answers, a token is asked for and none known, or it is the wrong one.
    """
    address = _whole(address or environment.get(ADDRESS_VARIABLE))
    host = urlsplit(address).hostname or ""
    if urlsplit(address).scheme != "https" and not is_loopback(host):
        say(
            f"warning: {address} is neither https nor on this machine: token, code and log travel readable; "
            f"take https, or a tunnel (ssh -L 8265:127.0.0.1:8265 {host}, then --address "
            "http://127.0.0.1:8265)"
        )
    token = _named_token(token_file, say) if token_file else None
    version = _version(address, None)
    if version is not None:
        if not is_loopback(host):
            say(f"warning: {address} asks for no token: whoever reaches it runs programs on the cluster")
    else:
        token = token or _usual_token(environment, say)
        if token is None:
            raise ContactError(
                f"{address}: the cluster asks for a token, and none is known here; give --token_file FILE, "
                "or RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE"
            )
        version = _version(address, token)
        if version is None:
            raise ContactError(
                f"{address}: the cluster refuses the token; copy its own (of the head: ~/.ray/auth_token) to "
                "the file of --token_file or RAY_AUTH_TOKEN_PATH"
            )
        return _compared(Contact(address, token, version), say)
    return _compared(Contact(address, None, version), say)


def _compared(contact: Contact, say: Callable[[str], None]) -> Contact:
    here = metadata.version("ray")
    if contact.ray != here:
        say(
            f"warning: Ray is {contact.ray} there and {here} here; take an image with ray=={here} for the "
            f"cluster, or pip install ray=={contact.ray} here"
        )
    return contact


def _whole(given: str | None) -> str:
    if not given or not given.strip():
        raise ContactError(
            f"no cluster named; give --address http://HOST:8265 (its dashboard), or set {ADDRESS_VARIABLE}"
        )
    address = given.strip()
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        place = urlsplit(address)
        host, _ = place.hostname, place.port
    except ValueError:
        place, host = urlsplit(""), None
    if place.scheme == "ray":
        raise ContactError(f"--address {address}: jobs go to the dashboard, http://{host or 'HOST'}:8265")
    if place.scheme not in ("http", "https") or not host:
        raise ContactError(f"--address {given}: expected http://HOST:8265, the cluster's dashboard")
    if "@" in place.netloc:
        raise ContactError(f"--address: a password in it would be shown in logs; leave {host} without it")
    return address


def _named_token(path: str | Path, say: Callable[[str], None]) -> str:
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="ascii").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        reason = "holds no token" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ContactError(f"{path}: {reason}; expected a file with the cluster's token") from error
    if not text or len(text.split()) > 1:
        raise ContactError(f"{path}: holds no token; expected one word, the cluster's token")
    if mode & 0o077:
        say(f"warning: {path} can be read by other users of this machine; chmod 600 {path}")
    return text


def _usual_token(environment: Mapping[str, str], say: Callable[[str], None]) -> str | None:
    """The token where Ray looks for it, in Ray's order."""
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return text
    if path := environment.get("RAY_AUTH_TOKEN_PATH"):
        return _named_token(path, say)
    usual = Path(environment.get("HOME") or Path.home()) / ".ray/auth_token"
    return _named_token(usual, say) if usual.is_file() else None


class _Still(HTTPRedirectHandler):
    """Follows no redirect: the token would go with it, to another host too."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _version(address: str, token: str | None) -> str | None:
    """Ray's version there; None where the token is missing or wrong."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with build_opener(_Still()).open(
            Request(f"{address}/api/version", headers=headers), timeout=ANSWER_SECONDS
        ) as answer:
            return str(json.loads(answer.read(100_000))["ray_version"])
    except HTTPError as error:
        if error.code in (401, 403):
            return None
        elsewhere = error.headers.get("Location")
        cure = f"it sends on to {elsewhere}" if elsewhere else "is it the cluster's dashboard?"
        raise ContactError(f"{address}: answers {error.code} when asked for its version; {cure}") from error
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ContactError(
            f"{address}: no cluster answers there ({reason}); start it, correct --address (the dashboard's, "
            "usually port 8265), or open the tunnel to it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ContactError(f"{address}: something else than Ray's dashboard answers there") from error
