"""`newsbert-ray submit`: one of our own verbs as a job of a Ray cluster, followed to its end."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.deploy.job_client import ADDRESS_VARIABLE, Contact, JobEnd, end_of, follow, make_contact
from newsbert_ray.deploy.package import (
    HEAD,
    Package,
    Parcel,
    check_reach,
    check_words,
    checked_name,
    entrypoint_of,
    find_files,
    job_name,
    read_entrypoint,
    require_small,
    runtime_of,
    write_archive,
)
from newsbert_ray.files import format_size
from newsbert_ray.ray_session import environment
from newsbert_ray.secrets import mask_text

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Say = Callable[[str], None]

START_SECONDS = 60.0
"""How long a head may take from answering to taking jobs."""
_NO_AGENT = "No available agent"
STOP_SECONDS = 60.0
REQUEST_SECONDS = 60.0
DETACHED = 130
"""Exit code after Ctrl-C."""


class SubmitError(RuntimeError):
    """What a cluster refuses; the text is one whole message for a person."""


def _say(line: str) -> None:
    """At once, also into a pipe: who waits wants to know for what."""
    print(line, flush=True)


@dataclass(frozen=True)
class Cluster:
    """Where to submit to: its dashboard's address, and the file with its token; both have defaults."""

    address: str | None = None
    token_file: str | None = None


def submit(
    command: Sequence[str],
    *,
    cluster: Cluster | None = None,
    parcel: Parcel | None = None,
    named: Mapping[str, Any] | None = None,
    job: str | None = None,
    wait: bool = True,
    say: Say = _say,
) -> int:
    """Send a verb and its settings to a cluster, follow the log, hand the exit code back.

    Args:
        command: as on the command line: ["sweep", "search_spaces/cloud.yaml", "--out", "s3://..."].
        named: its settings by name, as far as they name paths: {"data": "shards"}; looked through before
            anything is sent.
        job: the job's name on the cluster; made from the verb and the time by default.
        wait: follow the log; or return at once.
    Returns:
        0: done, or sent and not waited for; the job's own exit code; 130: Ctrl-C, and the job goes on.
    Raises:
        SettingsError: a path that the cluster cannot see, a secret, a name that cannot be.
        PackageError: the folder cannot be sent.
        ContactError, SubmitError, FollowError: the cluster does not answer, or refuses.
    """
    cluster, parcel, named = cluster or Cluster(), parcel or Parcel(), named or {}
    job = job_name(job, command)
    check_words(command, parcel.variables)
    package = find_files(parcel.folder, include=parcel.include, exclude=_excluded(cluster, parcel))
    require_small(package)
    for line in check_reach(named, package):
        say(line)
    contact = make_contact(cluster.address, token_file=cluster.token_file, say=say)
    runtime = runtime_of(parcel)
    say(_described(package))
    try:
        client = _open(contact)
        _send(client, contact, package, command, job=job, runtime=runtime, say=say)
    except KeyboardInterrupt:
        say(f"\nstopped while it was being sent; {_again(contact)} --list says whether {job} has arrived")
        return DETACHED
    say(f"{job} is on the cluster; {_again(contact)} --stop {job} ends it")
    if not wait:
        say(f"its log: {_again(contact)} --logs {job}")
        return 0
    return _follow(client, contact, job, say, verb=command[0], out=named.get("out"))


def show_log(job: str, *, cluster: Cluster | None = None, say: Say = _say) -> int:
    """Follow a job that was submitted before, from its first line; returns as `submit` does."""
    contact, client = _reach(cluster, say)
    verb, out = read_entrypoint(_asked(partial(client.get_job_info, checked_name(job)), job).entrypoint)
    return _follow(client, contact, job, say, verb=verb, out=out)


def stop_job(job: str, *, cluster: Cluster | None = None, say: Say = _say) -> int:
    """Stop a job as Ctrl-C would, and wait until it has stopped.

    Raises:
        SubmitError: no such job, or one that does not stop.
    """
    _, client = _reach(cluster, say)
    end = end_of(_asked(partial(client.get_job_info, checked_name(job)), job))
    if end is not None:
        say(f"{job} had ended already: {end.status}")
        return 0
    _asked(partial(client.stop_job, job), job)
    say(f"stopping {job} ...")
    last = time.monotonic() + STOP_SECONDS
    while (end := end_of(info := _asked(partial(client.get_job_info, job), job))) is None:
        if time.monotonic() > last:
            raise SubmitError(f"{job}: still {_word(info)} {STOP_SECONDS:g} s after it was told to stop")
        time.sleep(0.5)
    say(f"{job}: {end.status}{_go_on(read_entrypoint(info.entrypoint)[0])}")
    return 0


def list_jobs(*, cluster: Cluster | None = None, say: Say = _say) -> int:
    """Show the cluster's submitted jobs, newest last: name, state, start, command."""
    _, client = _reach(cluster, say)
    found = [info for info in _asked(client.list_jobs, "jobs") if info.submission_id]
    width = max((len(info.submission_id) for info in found), default=0)
    for info in sorted(found, key=lambda info: info.start_time or 0):
        began = time.strftime("%d %b %H:%M", time.localtime((info.start_time or 0) / 1000))
        command = mask_text(info.entrypoint).replace(entrypoint_of(()), "newsbert-ray")
        say(f"{info.submission_id:<{width}}  {_word(info):<9}  {began}  {command[:200]}")
    if not found:
        say("no jobs")
    return 0


def _reach(cluster: Cluster | None, say: Say) -> tuple[Contact, JobSubmissionClient]:
    cluster = cluster or Cluster()
    contact = make_contact(cluster.address, token_file=cluster.token_file, say=say)
    return contact, _open(contact)


def _open(contact: Contact) -> JobSubmissionClient:
    """Ray's client for just this address: its own variables would go over it."""
    headers = {"Authorization": f"Bearer {contact.token}"} if contact.token else None
    with environment({ADDRESS_VARIABLE: contact.address}, over=True):
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        client: JobSubmissionClient = _asked(
            partial(JobSubmissionClient, contact.address, headers=headers), contact.address
        )
    # Its requests would wait for ever.
    client._do_request = partial(client._do_request, timeout=REQUEST_SECONDS)  # type: ignore[method-assign]
    return client


def _send(
    client: JobSubmissionClient,
    contact: Contact,
    package: Package,
    command: Sequence[str],
    *,
    job: str,
    runtime: Mapping[str, Any],
    say: Say,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="nb-submit-"))
    try:
        archive = write_archive(package, folder / "package.zip")
        call = partial(
            client.submit_job,
            entrypoint=entrypoint_of(command),
            submission_id=job,
            runtime_env={"working_dir": str(archive), **runtime},
            entrypoint_resources=dict(HEAD),
            entrypoint_num_cpus=0,
        )
        _once_ready(partial(_asked, call, job, contact), say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _once_ready(call: Callable[[], Any], say: Say) -> None:
    """Call until a head that has only just started takes jobs: its agent comes after its dashboard."""
    last, waiting = time.monotonic() + START_SECONDS, False
    while True:
        try:
            call()
            return
        except SubmitError as error:
            if _NO_AGENT not in str(error):
                raise
            if time.monotonic() > last:
                raise SubmitError(
                    f"{error} Its agent does not run: dashboard_agent.log on the head says why (a second "
                    "head on one machine needs `ray start --dashboard-agent-listen-port 0`)"
                ) from error
            if not waiting:
                say("the head does not take jobs yet; waiting ...")
            waiting = True
            time.sleep(1.0)


def _asked(call: Callable[[], Any], job: str, contact: Contact | None = None) -> Any:
    """What the cluster answers.

    Raises:
        SubmitError: its refusal in one line; Ray's own text is a trace of the head's.
    """
    try:
        return call()
    except (RuntimeError, OSError) as error:
        text = str(error)
        if "already exists" in text and contact is not None:
            raise SubmitError(
                f"--id {job}: the cluster has a job of that name; {_again(contact)} --logs {job} shows it, "
                "another --id starts a new one"
            ) from error
        if "status code 404" in text:
            raise SubmitError(f"{job}: the cluster knows no such job; --list shows those it knows") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
        raise SubmitError(f"{job}: the cluster does not take it: {mask_text(lines[-1])[:500]}") from error


def _follow(
    client: JobSubmissionClient, contact: Contact, job: str, say: Say, *, verb: str, out: str | None
) -> int:
    try:
        end = follow(client, job, write=_write, say=say, address=contact.address)
    except KeyboardInterrupt:
        say(f"\n{job} goes on running; follow it again: {_again(contact)} --logs {job}")
        say(f"to end it: {_again(contact)} --stop {job}")
        return DETACHED
    for line in _closing(job, end, verb=verb, out=out):
        say(line)
    return end.code


def _closing(job: str, end: JobEnd, *, verb: str, out: str | None) -> Iterator[str]:
    """How it ended, where the results are, how to go on."""
    if end.status == "SUCCEEDED":
        yield f"{job}: done" + (f"; results: {out}" if out else "")
        if out and verb in ("train", "sweep") and ("://" in out or Path(out).exists()):
            yield f"  newsbert-ray report {shlex.quote(out)} --out report"
        return
    why = "\n".join(mask_text(end.reason).splitlines()[:20])
    said = "stopped" if end.status == "STOPPED" else f"failed ({why})"
    yield f"{job}: {said}{_go_on(verb) if end.code != 2 else ''}"


def _go_on(verb: str) -> str:
    again = {"sweep": "the same command with --resume", "train": "the same command"}.get(verb)
    return f"; {again} goes on where it was" if again else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _described(package: Package) -> str:
    whose = "newsbert_ray of that folder" if package.own else "newsbert_ray as it is here"
    links = f"; links not followed: {', '.join(package.links[:5])}" if package.links else ""
    size = f"{len(package.files):,} files, {format_size(package.bytes)}"
    return f"sending {package.root}: {size}, with {whose}{links}"


def _excluded(cluster: Cluster, parcel: Parcel) -> tuple[str, ...]:
    """The token's own file stays here, wherever it lies."""
    token = cluster.token_file or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token is None:
        return parcel.exclude
    inside = os.path.relpath(Path(token).expanduser().resolve(), Path(parcel.folder).resolve())
    return (*parcel.exclude, f"/{inside}")


def _again(contact: Contact) -> str:
    return f"newsbert-ray submit --address {contact.address}"


def _word(info: Any) -> str:
    return str(getattr(info.status, "value", info.status))
