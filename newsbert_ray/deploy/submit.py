"""`newsbert-ray submit`: run a verb as a job of a Ray cluster, and follow its log to its end.

The first request to a dashboard is our own: Ray's client has no time-out, prefers RAY_ADDRESS to the given
address, and shows the token to any server.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from newsbert_ray.deploy import package
from newsbert_ray.files import format_size
from newsbert_ray.ray_session import environment, host_and_port, is_loopback
from newsbert_ray.secrets import mask_text

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
ANSWER_SECONDS = 15.0
REQUEST_SECONDS, STOP_SECONDS = 60.0, 60.0
START_SECONDS = 60.0
"""A head that answers takes jobs after at most so long."""
PENDING_SECONDS = 20.0
"""A job that is pending for so long is explained; again after twice, four times ... as long."""
POLL_SECONDS = 1.0
"""Shortest time between two requests for a log; a large log is requested less often."""
LOST_SECONDS = 10.0
"""A cluster that has not answered for so long is reported."""
GIVE_UP_SECONDS = 300.0
"""How long a cluster may be unreachable."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
_NOISY_LOGGERS = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env")
Warn = Callable[[str, str], None]
"""Takes a warning and its cure."""

_say = partial(print, flush=True)  # also into a pipe, whose reader waits for it
_write_log = partial(_say, end="")


class DashboardError(ValueError):
    """A dashboard that cannot be used; `args`: the problem, which names the address, and the cure."""

    def __str__(self) -> str:
        return "; ".join(self.args)


class SubmitError(RuntimeError):
    """A request that a cluster refuses, or no longer answers; the text is a complete message."""


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that has answered. `token` is None where it asks for none; it must not reach a log."""

    address: str
    token: str | None = field(repr=False)


def submit(
    command: Sequence[str],
    *,
    address: str | None,
    token_file: str | None,
    working_dir: str,
    include: Sequence[str],
    exclude: Sequence[str],
    env: Sequence[str],
    pip: str | None,
    id: str | None,
    wait: bool,
    settings: Mapping[str, Any],
) -> int:
    """Send a verb to a Ray cluster as a job, follow its log, and return its exit code; see
    `newsbert_ray.submit`. The paths in `settings`, the command's by name, are checked first."""
    unique = f"{time.strftime('%Y%m%d-%H%M')}-{secrets.token_hex(2)}"
    job = f"newsbert-{command[0]}-{unique}" if id is None else package.check_job_name(id)
    package.check_secrets(command)
    runtime = package.runtime_environment(env, pip)
    token = Path(token_file).expanduser() if token_file else token_path()
    own_token = os.path.relpath(token.resolve(), Path(working_dir).resolve())  # never sent
    sent = package.find_files(working_dir, include=include, exclude=[*exclude, f"/{own_token}"])
    for line in package.check_paths(settings, sent):
        _say(line)
    cluster, out = Cluster(address, token_file), settings.get("out")
    source = "that folder" if sent.has_newsbert_ray else "this installation"
    links = f"; links not followed: {', '.join(sorted(sent.links)[:5])}" if sent.links else ""
    size = f"{len(sent.files):,} files, {format_size(sent.bytes)}"
    _say(f"sending {sent.root}: {size}, with newsbert_ray from {source}{links}")
    try:
        with tempfile.TemporaryDirectory(prefix="nb-submit-") as folder:
            archive = Path(folder, "package.zip")
            package.write_zip(sent, archive)
            send = partial(
                cluster.client.submit_job,
                entrypoint=package.make_entrypoint(command),
                submission_id=job,
                metadata={"verb": command[0]} | ({"out": out} if out else {}),
                runtime_env={"working_dir": str(archive), **runtime},
                entrypoint_resources={"node:__internal_head__": 0.001},  # the head is not preempted
                entrypoint_num_cpus=0,
            )
            _retry_until_ready(partial(_call, job, send))
    except KeyboardInterrupt:
        _say(f"\ninterrupted while sending; {cluster.command} --list shows whether {job} has arrived")
        return INTERRUPTED
    _say(f"{job} is on the cluster; {cluster.command} --stop {job} stops it")
    if not wait:
        _say(f"its log: {cluster.command} --logs {job}")
        return 0
    return cluster.follow(job, verb=command[0], out=out)


class Cluster:
    """A cluster whose dashboard has answered, and Ray's client for its jobs."""

    def __init__(self, address: str | None, token_file: str | Path | None) -> None:
        def warn(problem: str, cure: str) -> None:
            _say(f"warning: {problem}; {cure}")

        dashboard = connect(address, token_file=token_file, warn=warn)
        self.address = dashboard.address
        self.command = f"newsbert-ray submit --address {self.address}"
        headers = {"Authorization": f"Bearer {dashboard.token}"} if dashboard.token else {}
        with environment({ADDRESS_VARIABLE: self.address}, over=True):  # Ray's client prefers the variable
            from ray.job_submission import JobSubmissionClient

            for name in _NOISY_LOGGERS:
                logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
            make = partial(JobSubmissionClient, headers=headers)
            self.client: Any = _call(self.address, make, self.address)
        self.client._do_request = partial(self.client._do_request, timeout=REQUEST_SECONDS)

    def show_log(self, job: str) -> int:
        """Follow the log of a submitted job from its first line; returns its exit code, as `submit` does."""
        ours = self._info(job).metadata or {}
        return self.follow(job, verb=ours.get("verb", ""), out=ours.get("out"))

    def stop(self, job: str) -> int:
        """Stop a job as Ctrl-C would, and wait until it has; SubmitError: there is none, or it goes on."""
        if end := job_end(self._info(job)):
            _say(f"{job} has already ended: {end.status}")
            return 0
        _call(job, self.client.stop_job, job)
        _say(f"stopping {job} ...")
        deadline = time.monotonic() + STOP_SECONDS
        while (end := job_end(info := self._info(job))) is None:
            if time.monotonic() > deadline:
                raise SubmitError(f"{job}: still {info.status} after {STOP_SECONDS:g} s")
            time.sleep(0.5)
        verb = (info.metadata or {}).get("verb", "")
        _say(f"{job}: {end.status}{_how_to_resume(verb)}")
        return 0

    def list_jobs(self) -> int:
        """List the cluster's submitted jobs, newest last: name, state, start, command."""
        jobs = [info for info in _call("jobs", self.client.list_jobs) if info.submission_id]
        width = max((len(info.submission_id) for info in jobs), default=0)
        for info in sorted(jobs, key=lambda info: info.start_time or 0):
            start = time.strftime("%d %b %H:%M", time.localtime((info.start_time or 0) / 1000))
            command = mask_text(info.entrypoint).replace(package.make_entrypoint(()), "newsbert-ray")
            _say(f"{info.submission_id:<{width}}  {info.status!s:<9}  {start}  {command[:200]}")
        if not jobs:
            _say("no jobs")
        return 0

    def follow(self, job: str, *, verb: str, out: str | None) -> int:
        """Print the job's log to its end, and what to do then; returns its exit code."""
        try:
            end = follow_log(self.client, job, self.address)
        except KeyboardInterrupt:
            _say(f"\n{job} continues; its log: {self.command} --logs {job}")
            _say(f"to stop it: {self.command} --stop {job}")
            return INTERRUPTED
        for line in _closing_lines(job, end, verb=verb, out=out):
            _say(line)
        return end.code

    def _info(self, job: str) -> Any:
        return _call(job, self.client.get_job_info, package.check_job_name(job))


def _retry_until_ready(call: Callable[[], Any]) -> Any:
    """Repeat a call until a head that has just started takes jobs: its agent starts after its dashboard."""
    deadline, told = time.monotonic() + START_SECONDS, False
    while True:
        try:
            return call()
        except SubmitError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                why = "Its agent does not run: dashboard_agent.log on the head tells why"
                cure = "a second head on one machine needs `ray start --dashboard-agent-listen-port 0`"
                raise SubmitError(f"{error} {why} ({cure})") from error
        if not told:
            _say("the head does not take jobs yet; waiting ...")
        told = True
        time.sleep(1.0)


def _call(job: str, request: Callable[..., Any], *arguments: Any) -> Any:
    """The cluster's answer; a refusal in one line, because Ray's own text is a stack trace of the head."""
    try:
        return request(*arguments)
    except (RuntimeError, OSError) as error:
        text = str(error)
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
        message = f"{job}: the cluster refuses it: {mask_text(lines[-1])[:500]}"
        if "already exists" in text:
            cure = f"--logs {job} shows its log, another --id starts a new job"
            message = f"--id {job}: the cluster already has a job of this name; {cure}"
        elif "status code 404" in text:
            why = "a head that was restarted has forgotten the jobs before"
            message = f"{job}: the cluster knows no such job; --list shows its jobs ({why})"
        raise SubmitError(message) from error


def _closing_lines(job: str, end: JobEnd, *, verb: str, out: str | None) -> Iterator[str]:
    """How the job ended, where its results are, and how to continue."""
    if end.status == "SUCCEEDED":
        yield f"{job}: done" + (f"; results: {out}" if out else "")
        if out and verb in ("train", "sweep") and ("://" in out or Path(out).exists()):
            yield f"  newsbert-ray report {shlex.quote(out)} --out report"
        return
    reason = "\n".join(mask_text(end.reason).splitlines()[:20])
    outcome = "stopped" if end.status == "STOPPED" else f"failed ({reason})"
    yield f"{job}: {outcome}{_how_to_resume(verb) if end.code != 2 else ''}"


def _how_to_resume(verb: str) -> str:
    again = {"sweep": "the same command with --resume", "train": "the same command"}.get(verb)
    return f"; {again} continues it" if again else ""


def connect(address: str | None, *, token_file: str | Path | None = None, warn: Warn) -> Dashboard:
    """Ask a dashboard for its version. The token is shown only to a dashboard that asks for one.

    `address` is http(s)://HOST:PORT or HOST:PORT, RAY_API_SERVER_ADDRESS by default; the token is in
    `token_file`, by default where Ray looks for it. `warn` is called with what is unsafe or differs between
    both sides, and the cure. DashboardError: no address, no answer, or a token that is missing or wrong.
    """
    address = _full_address(address or os.environ.get(ADDRESS_VARIABLE))
    host, port = host_and_port(address)
    is_local = is_loopback(host or "")
    if not is_local and not address.startswith("https:"):
        problem = "is neither https nor on this machine: token, code and log are sent unencrypted"
        tunnel = f"ssh -L 8265:127.0.0.1:{port or 80} {host}, then --address http://127.0.0.1:8265"
        warn(f"{address} {problem}", f"use https, or a tunnel ({tunnel})")
    own_token = read_token(Path(token_file).expanduser(), warn) if token_file else None
    token, version = None, _ask_version(address, None)
    if version is None:
        if (token := own_token or _find_token(warn)) is None:
            cure = "give --token_file FILE, or RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE"
            raise DashboardError(f"{address}: the cluster requires a token, and none was found", cure)
        if (version := _ask_version(address, token)) is None:
            cure = "copy the cluster's token (on the head: ~/.ray/auth_token) to the file of --token_file or"
            raise DashboardError(f"{address}: the cluster refuses the token", f"{cure} RAY_AUTH_TOKEN_PATH")
    elif not is_local:
        problem = "asks for no token: everyone who can reach it can run programs on the cluster"
        warn(f"{address} {problem}", "start the head with RAY_AUTH_MODE=token")
    if version != (own := metadata.version("ray")):
        cure = f"pip install ray=={version} here, or use an image with ray=={own} for the cluster"
        warn(f"{address} runs Ray {version}, this machine has Ray {own}", cure)
    return Dashboard(address, token)


def _full_address(text: str | None) -> str:
    form = "give the dashboard's: http://HOST:8265"
    if not text or not text.strip():
        cure = f"give --address http://HOST:8265 (its dashboard), or set {ADDRESS_VARIABLE}"
        raise DashboardError("no cluster given", cure)
    address = (text.strip() if "://" in text else f"http://{text.strip()}").rstrip("/")
    scheme, host = address.partition("://")[0], host_and_port(address)[0]
    if scheme == "ray":
        raise DashboardError(f"--address {address} is Ray Client's", form.replace("HOST", host or "HOST"))
    if scheme not in ("http", "https") or not host:
        raise DashboardError(f"--address {text} is not an address", form)
    if "@" in address:
        raise DashboardError("--address holds a password, which logs would show", f"give {host} without it")
    return address


def read_token(path: Path, warn: Warn) -> str:
    """The token in a file; `warn` is told if other users can read it. DashboardError: there is none."""
    cure = "copy the cluster's token there, as one word, with mode 0600"
    try:
        text = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        text = ""
    except OSError as error:
        raise DashboardError(f"{path}: {error.strerror}", cure) from error
    if len(text.split()) != 1:
        raise DashboardError(f"{path}: contains no token", cure)
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        warn(f"{path}: other users of this machine can read it (mode {mode:04o})", f"chmod 600 {path}")
    return text


def _find_token(warn: Warn) -> str | None:
    """The token from the variables and files that Ray reads, in Ray's order."""
    if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return text
    path = token_path()
    return read_token(path, warn) if os.environ.get("RAY_AUTH_TOKEN_PATH") or path.is_file() else None


def token_path() -> Path:
    """The file in which Ray looks for its token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirect: the token would be sent along, possibly to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask_version(address: str, token: str | None) -> str | None:
    """The cluster's Ray version; None if the token is missing or wrong."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = Request(f"{address}/api/version", headers=headers)
    try:
        with build_opener(_NoRedirect()).open(request, timeout=ANSWER_SECONDS) as answer:
            return str(json.loads(answer.read(100_000))["ray_version"])
    except HTTPError as error:
        if error.code in (401, 403):
            return None
        target = error.headers.get("Location")
        cure = f"it redirects to {target}" if target else "is this the cluster's dashboard?"
        raise DashboardError(f"{address}: answers {error.code} when asked for its version", cure) from error
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        cure = "start it, correct --address (the dashboard's, usually port 8265), or open the tunnel to it"
        raise DashboardError(f"{address}: no cluster answers ({reason})", cure) from error
    except (ValueError, KeyError, TypeError) as error:
        cure = "give http://HOST:8265 of the head"
        raise DashboardError(f"{address}: answers, but is not Ray's dashboard", cure) from error


class JobEnd(NamedTuple):
    """How a job ended: Ray's status, our exit code, and the reason."""

    status: str
    code: int
    reason: str


def job_end(info: Any) -> JobEnd | None:
    """The end of a job from Ray's description of it; None while it has not ended."""
    status, code = str(info.status), info.driver_exit_code
    if status not in ("SUCCEEDED", "FAILED", "STOPPED"):
        return None
    failure = code if isinstance(code, int) and 0 < code < 256 else 1
    if isinstance(code, int) and code:
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    else:
        reason = (info.message or "").strip()
    return JobEnd(status, 0 if status == "SUCCEEDED" else failure, reason)


def follow_log(client: Any, job: str, address: str) -> JobEnd:
    """Print the log of a job from its beginning until the job ends, and lines that explain delays.

    The whole log is requested each time: a stream through a proxy or a tunnel may end without an error.
    Raises SubmitError where the cluster does not know the job, or was unreachable for GIVE_UP_SECONDS.
    """
    written, hint, lost = 0, PENDING_SECONDS, False
    start = answered = time.monotonic()
    while True:
        polled = time.monotonic()
        info = _ask(client.get_job_info, job)
        end = info and job_end(info)
        log = _ask(client.get_job_logs, job) if info and info.status != "PENDING" else ""
        if new := (log or "")[written:]:
            _write_log(new)
            written += len(new)
        if end:
            if log is None:
                _say("the end of the log could not be read")
            return end
        answered = polled if info else answered
        if polled - answered > GIVE_UP_SECONDS:
            raise SubmitError(f"{address}: no answer for {GIVE_UP_SECONDS:g} s; {job} may still be running")
        if lost < (lost := polled - answered > LOST_SECONDS):
            _say(f"the connection to {address} was lost; trying again ...")
        if info and info.status == "PENDING" and polled - start >= hint:
            hint *= 2
            reason = (info.message or "").strip().split("\n")[0] or "the head has not started it"
            why = "the first start unpacks the files; --pip installs packages, which takes minutes"
            _say(f"still pending after {polled - start:.0f} s: {reason} ({why})")
        time.sleep(min(30.0, max(POLL_SECONDS, 20 * (time.monotonic() - polled))))


def _ask(request: Callable[[str], Any], job: str) -> Any:
    """The cluster's answer about a job; None where there is none."""
    try:
        return _call(job, request, job)
    except SubmitError as error:
        if "no such job" in str(error):
            raise
        return None
