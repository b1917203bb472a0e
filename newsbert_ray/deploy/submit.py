"""`newsbert-ray submit`: run a verb as a job of a Ray cluster, and follow it to its end."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.config import SettingsError
from newsbert_ray.deploy.job_client import (
    ADDRESS_VARIABLE,
    Dashboard,
    JobEnd,
    connect,
    follow_log,
    job_end,
    job_status,
)
from newsbert_ray.deploy.package import (
    HEAD_RESOURCES,
    PackageFiles,
    check_job_name,
    check_paths,
    check_secrets,
    check_size,
    find_files,
    link_files,
    make_entrypoint,
    make_job_name,
    read_entrypoint,
    read_variables,
    runtime_environment,
)
from newsbert_ray.files import format_size
from newsbert_ray.ray_session import environment
from newsbert_ray.secrets import mask_text

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Say = Callable[[str], None]

START_SECONDS = 60.0
"""A head that answers takes jobs after at most so long."""
STOP_SECONDS = 60.0
REQUEST_SECONDS = 60.0
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
_NO_AGENT = "No available agent"
_QUIET = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
"""Loggers of Ray that comment on every upload."""


class SubmitError(RuntimeError):
    """A request that a cluster refuses; the text is a complete message."""


def _print(line: str) -> None:
    print(line, flush=True)  # also into a pipe, whose reader waits for it


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    token_file: str | None = None,
    working_dir: str = ".",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    env: Sequence[str] = (),
    pip: str | None = None,
    id: str | None = None,
    wait: bool = True,
    settings: Mapping[str, Any] | None = None,
    say: Say = _print,
) -> int:
    """Send a verb to a Ray cluster as a job, follow its log, and return its exit code.

    Arguments, result and errors are those of `newsbert_ray.submit`. `settings` are the command's settings by
    name ({"data": "shards"}), whose paths are checked before anything is sent.
    """
    if not command:
        raise SettingsError("nothing to submit; write the verb after --, as in: -- sweep FILE --out s3://...")
    settings, variables = settings or {}, read_variables(env)
    job = make_job_name(command) if id is None else check_job_name(id)
    check_secrets(command, variables)
    package = find_files(
        working_dir, include=include, exclude=[*exclude, *_token_pattern(working_dir, token_file)]
    )
    check_size(package)
    for line in check_paths(settings, package):
        say(line)
    dashboard = _connect(address, token_file, say)
    runtime = runtime_environment(variables, pip)
    say(_describe(package))
    try:
        client = _open_client(dashboard)
        with tempfile.TemporaryDirectory(prefix="nb-submit-") as folder:
            link_files(package, Path(folder))
            send = partial(
                client.submit_job,
                entrypoint=make_entrypoint(command),
                submission_id=job,
                runtime_env={"working_dir": folder, **runtime},
                entrypoint_resources=dict(HEAD_RESOURCES),
                entrypoint_num_cpus=0,
            )
            _retry_until_ready(partial(_call, send, job), say)
    except KeyboardInterrupt:
        say(f"\ninterrupted while sending; {_command(dashboard)} --list shows whether {job} has arrived")
        return INTERRUPTED
    say(f"{job} is on the cluster; {_command(dashboard)} --stop {job} stops it")
    if not wait:
        say(f"its log: {_command(dashboard)} --logs {job}")
        return 0
    return _follow(client, dashboard, job, say, verb=command[0], out=settings.get("out"))


def show_log(
    job: str, *, address: str | None = None, token_file: str | None = None, say: Say = _print
) -> int:
    """Follow the log of a submitted job from its first line; returns its exit code, as `submit` does."""
    dashboard = _connect(address, token_file, say)
    client = _open_client(dashboard)
    verb, out = read_entrypoint(_call(partial(client.get_job_info, check_job_name(job)), job).entrypoint)
    return _follow(client, dashboard, job, say, verb=verb, out=out)


def stop_job(
    job: str, *, address: str | None = None, token_file: str | None = None, say: Say = _print
) -> int:
    """Stop a job as Ctrl-C would, and wait until it has stopped.

    Raises:
        SubmitError: no such job, or one that does not stop.
    """
    client = _open_client(_connect(address, token_file, say))
    end = job_end(_call(partial(client.get_job_info, check_job_name(job)), job))
    if end is not None:
        say(f"{job} has already ended: {end.status}")
        return 0
    _call(partial(client.stop_job, job), job)
    say(f"stopping {job} ...")
    deadline = time.monotonic() + STOP_SECONDS
    while (end := job_end(info := _call(partial(client.get_job_info, job), job))) is None:
        if time.monotonic() > deadline:
            raise SubmitError(f"{job}: still {job_status(info)} after {STOP_SECONDS:g} s")
        time.sleep(0.5)
    say(f"{job}: {end.status}{_how_to_resume(read_entrypoint(info.entrypoint)[0])}")
    return 0


def list_jobs(*, address: str | None = None, token_file: str | None = None, say: Say = _print) -> int:
    """List the cluster's submitted jobs, newest last: name, state, start, command."""
    client = _open_client(_connect(address, token_file, say))
    jobs = [info for info in _call(client.list_jobs, "jobs") if info.submission_id]
    width = max((len(info.submission_id) for info in jobs), default=0)
    for info in sorted(jobs, key=lambda info: info.start_time or 0):
        start = time.strftime("%d %b %H:%M", time.localtime((info.start_time or 0) / 1000))
        command = mask_text(info.entrypoint).replace(make_entrypoint(()), "newsbert-ray")
        say(f"{info.submission_id:<{width}}  {job_status(info):<9}  {start}  {command[:200]}")
    if not jobs:
        say("no jobs")
    return 0


def _connect(address: str | None, token_file: str | None, say: Say) -> Dashboard:
    def warn(problem: str, cure: str) -> None:
        say(f"warning: {problem}; {cure}")

    return connect(address, token_file=token_file, warn=warn)


def _open_client(dashboard: Dashboard) -> JobSubmissionClient:
    """Ray's client for this address, whatever Ray's own variables say, and with a time-out."""
    headers = {"Authorization": f"Bearer {dashboard.token}"} if dashboard.token else {}
    with environment({ADDRESS_VARIABLE: dashboard.address}, over=True):
        from ray.job_submission import JobSubmissionClient

        for name in _QUIET:
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
        client: JobSubmissionClient = _call(
            partial(JobSubmissionClient, dashboard.address, headers=headers), dashboard.address
        )
    client._do_request = partial(client._do_request, timeout=REQUEST_SECONDS)  # type: ignore[method-assign]
    return client


def _retry_until_ready(call: Callable[[], Any], say: Say) -> None:
    """Repeat a call until a head that has just started takes jobs: its agent starts after its dashboard."""
    deadline, told = time.monotonic() + START_SECONDS, False
    while True:
        try:
            call()
            return
        except SubmitError as error:
            if _NO_AGENT not in str(error):
                raise
            if time.monotonic() > deadline:
                raise SubmitError(
                    f"{error} Its agent does not run: dashboard_agent.log on the head tells why (a second "
                    "head on one machine needs `ray start --dashboard-agent-listen-port 0`)"
                ) from error
            if not told:
                say("the head does not take jobs yet; waiting ...")
            told = True
            time.sleep(1.0)


def _call(request: Callable[[], Any], job: str) -> Any:
    """The cluster's answer; Ray's own error text is a stack trace of the head.

    Raises:
        SubmitError: the refusal in one line.
    """
    try:
        return request()
    except (RuntimeError, OSError) as error:
        text = str(error)
        if "already exists" in text:
            raise SubmitError(
                f"--id {job}: the cluster already has a job of this name; --logs {job} shows its log, "
                "another --id starts a new job"
            ) from error
        if "status code 404" in text:
            raise SubmitError(f"{job}: the cluster knows no such job; --list shows its jobs") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
        raise SubmitError(f"{job}: the cluster refuses it: {mask_text(lines[-1])[:500]}") from error


def _follow(
    client: JobSubmissionClient, dashboard: Dashboard, job: str, say: Say, *, verb: str, out: str | None
) -> int:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        end = follow_log(client, job, write=write, say=say, address=dashboard.address)
    except KeyboardInterrupt:
        say(f"\n{job} continues; its log: {_command(dashboard)} --logs {job}")
        say(f"to stop it: {_command(dashboard)} --stop {job}")
        return INTERRUPTED
    for line in _closing_lines(job, end, verb=verb, out=out):
        say(line)
    return end.code


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


def _describe(package: PackageFiles) -> str:
    source = "that folder" if package.has_newsbert_ray else "this installation"
    links = f"; links not followed: {', '.join(package.links[:5])}" if package.links else ""
    size = f"{len(package.files):,} files, {format_size(package.bytes)}"
    return f"sending {package.root}: {size}, with newsbert_ray from {source}{links}"


def _token_pattern(working_dir: str, token_file: str | None) -> list[str]:
    """A pattern that keeps the token's own file from being sent."""
    token = token_file or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token is None:
        return []
    return [f"/{os.path.relpath(Path(token).expanduser().resolve(), Path(working_dir).resolve())}"]


def _command(dashboard: Dashboard) -> str:
    return f"newsbert-ray submit --address {dashboard.address}"
