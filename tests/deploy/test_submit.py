"""Jobs on a real head; what is refused before; the token is not given away, a log is followed completely."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from cluster.local import LocalCluster
from newsbert_ray import cli
from newsbert_ray.deploy import submit as submission
from newsbert_ray.deploy.package import ENVIRONMENT, LIMIT_BYTES
from newsbert_ray.deploy.submit import (
    DashboardError,
    JobEnd,
    SubmitError,
    _closing_lines,
    _retry_until_ready,
    connect,
    follow_log,
    job_end,
)
from tests.deploy.conftest import dashboard, guarded, version

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


CHECKOUT = Path(__file__).parents[2]
Submit = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def head() -> Iterator[LocalCluster]:
    # Children inherit an ignored SIGINT, which a shell's `&` sets.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with LocalCluster(cpus=2) as started:
        yield started


@pytest.fixture
def submit(
    head: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Submit:
    """Runs `newsbert-ray submit` in a folder without newsbert_ray: its exit code and its output."""
    for name, value in _environment(head).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: str) -> tuple[int, str]:
        code = cli.main(["submit", *words])
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def _environment(head: LocalCluster) -> dict[str, str]:
    return head.environment | {"PYTHONPATH": str(CHECKOUT), "AWS_SECRET_ACCESS_KEY": "hunter2"}


def _token(head: LocalCluster) -> str:
    return (head.folder / "token").read_text()


def _client(head: LocalCluster) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(head.dashboard, headers={"Authorization": f"Bearer {_token(head)}"})


def _logs(head: LocalCluster) -> str:
    folder = head.folder / "ray/session_latest/logs"
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


@pytest.mark.ray
@pytest.mark.slow
def test_verb_runs_on_the_cluster_from_any_folder(submit: Submit, head: LocalCluster, tmp_path: Path) -> None:
    """Sent, run, log and exit code returned; no secret is logged anywhere."""
    out = tmp_path / "corpus"
    words = [
        "--id",
        "first",
        "--env",
        "AWS_REGION=eu",
        "--",
        "synthesize",
        "--out",
        str(out),
        "--news",
        "300",
    ]
    code, output = submit(*words)
    assert code == 0, output
    assert f"note: every node must be able to read --out {out} at that path" in output
    assert re.search(r"sending .*here: \d+ files, .* MB, with newsbert_ray from this installation", output)
    assert output.count(f"\n{out}/synthetic_train\n") == 1
    assert output.endswith(f"first: done; results: {out}\n")
    assert (out / "synthetic_train/news.tsv").is_file()
    code, again = submit(*words)
    assert code == 1
    assert "--id first: the cluster already has a job of this name" in again.splitlines()[-1]
    runtime = _client(head).get_job_info("first").runtime_env
    assert runtime is not None
    assert runtime["env_vars"] == {**ENVIRONMENT, "AWS_REGION": "eu"}
    for secret in (_token(head), "hunter2"):
        assert secret not in _logs(head) + output + again + str(runtime)


@pytest.mark.ray
@pytest.mark.slow
def test_exit_code_is_the_jobs(submit: Submit, head: LocalCluster) -> None:
    """A script must not take a failed job for a successful one."""
    program = "import sys; print('out of luck'); sys.exit(3)"
    _client(head).submit_job(entrypoint=f'python -c "{program}"', submission_id="three")
    code, output = submit("--logs", "three")
    assert code == 3
    lines = output.splitlines()
    assert "out of luck" in lines  # Ray writes its own first line late on a busy machine
    assert lines[-1] == "three: failed (exit code 3)"


@pytest.mark.ray
@pytest.mark.slow
def test_interrupted_submission_leaves_the_sweep_running(
    submit: Submit, head: LocalCluster, shards: Path, tmp_path: Path
) -> None:
    """Ctrl-C must not end a night's sweep; --stop must, so that it can be resumed."""
    out = tmp_path / "sweep"
    sweep = ["sweep", "search_spaces/demo.yaml", "--data", str(shards), "--teacher", "scratch"]
    sweep += ["--epochs", "300", "--out", str(out)]
    command = [sys.executable, "-m", "newsbert_ray.cli", "submit", "--id", "night"]
    with subprocess.Popen(
        [*command, "--working_dir", str(CHECKOUT), "--", *sweep],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as following:
        assert following.stdout is not None
        for line in following.stdout:
            if "Ctrl-C stops the sweep" in line:
                break
        following.send_signal(signal.SIGINT)
        rest = following.stdout.read()
        assert following.wait(60) == 130, rest
    again = f"newsbert-ray submit --address {head.dashboard}"
    assert f"night continues; its log: {again} --logs night" in rest
    assert f"to stop it: {again} --stop night" in rest
    assert re.search(r"^night +RUNNING +.* newsbert-ray sweep ", submit("--list")[1], re.MULTILINE)
    code, output = submit("--stop", "night")
    assert code == 0, output
    assert "night: STOPPED; the same command with --resume continues it" in output
    code, output = submit("--logs", "night")
    assert code == 1
    assert output.count("Ctrl-C stops the sweep") == 1
    assert "\ninterrupted: " in output
    assert "night: stopped; the same command with --resume continues it" in output
    assert "night has already ended: STOPPED" in submit("--stop", "night")[1]


@pytest.mark.ray
@pytest.mark.slow
def test_plain_ray_job_submit_works_too(head: LocalCluster, tmp_path: Path) -> None:
    """For scripts that use Ray's own command."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/notes.txt").write_text("of mine")
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "job", "submit"]
    command += ["--working-dir", str(tmp_path / "work"), "--", "newsbert-ray", "synthesize"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "corpus"), "--news", "300"],
        env={**os.environ, **_environment(head)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "corpus/synthetic_dev/news.tsv").is_file()


@pytest.mark.ray
@pytest.mark.slow
def test_token_is_required(
    submit: Submit, head: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can submit can run programs as the cluster's owner."""
    # Ray's own client would prefer this variable to --address.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    address = ("--address", head.dashboard)
    assert submit(*address, "--list")[0] == 0
    code, output = submit(*address, "--logs", "nobody")
    assert code == 1
    assert "nobody: the cluster knows no such job; --list shows its jobs" in output
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, output = submit(*address, "--list")
    assert code == 1
    assert "requires a token, and none was found; give --token_file" in output
    (tmp_path / "wrong").write_text("f" * 64)
    (tmp_path / "wrong").chmod(0o600)
    wrong = ("--token_file", str(tmp_path / "wrong"), "--", "synthesize", "--out", "/x")
    code, output = submit(*address, *wrong)
    assert code == 1
    assert "the cluster refuses the token" in output


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """The command line sets variables for libraries; other tests keep theirs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--list", "--stop", "x"], "give one of: -- VERB SETTINGS, --logs JOB, --stop JOB, --list"),
        (["--"], "give one of"),
        (["--", "trian"], "-- trian: cannot be submitted; one of prepare,"),
        (["--", "submit", "--list"], "-- submit: cannot be submitted"),
        (["--", "train", "--data", "/a", "--out", "/b"], "train: required and not given: teacher"),
        (
            ["--", "synthesize", "--out", "/b", "--nws", "3"],
            "unknown setting 'nws', did you mean 'news'?",
        ),
        (["--", "sweep", "no.yaml", "--out", "/b"], "sweep: no.yaml: cannot be read"),
        (["--id", "a/b", "--", "synthesize", "--out", "/b"], "'a/b' is not a job's name"),
        (["--env", "HF_TOKEN=hunter2", "--", "synthesize", "--out", "/b"], "--env HF_TOKEN: a secret"),
        (["--", "synthesize", "--out", "corpus"], "--out corpus: a relative path is in the job's own folder"),
        (
            ["--working_dir", "nowhere", "--", "synthesize", "--out", "/b"],
            "--working_dir nowhere: no such folder",
        ),
    ],
)
def test_wrong_command_is_refused_before_it_is_sent(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the cluster it would cost minutes, and a log to read."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", "--address", "127.0.0.1:1", *words]) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1


def test_search_space_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings and folders are a part of the command."""
    monkeypatch.chdir(tmp_path)
    space = tmp_path / "a.yaml"
    common = "name: a\nspace: {distill.beta: {grid: [0, 0.1]}}\nseeds: [0]\n"
    for settings, message in (
        ("{teacher: scratch, data: shards}", "--data shards: not in"),
        ("{teacher: scratch, data: /shards, epochs: 0}", "epochs"),
        ("{teacher: scratch, data: s3://b/shards}", "no cluster answers"),
    ):
        space.write_text(f"{common}settings: {settings}\n")
        code = cli.main(["submit", "--address", "127.0.0.1:1", "--", "sweep", "a.yaml", "--out", "s3://b/o"])
        assert code == (1 if "cluster" in message else 2)
        assert message in capsys.readouterr().err


def test_large_folder_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is checked before the connection."""
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "corpus.tsv").open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    words = ["--", "synthesize", "--out", "/corpus"]
    assert cli.main(["submit", "--address", "127.0.0.1:1", *words]) == 1
    assert "largest: corpus.tsv 100.0 MB" in capsys.readouterr().err
    assert cli.main(["submit", "--address", "127.0.0.1:1", "--exclude", "corpus.tsv", *words]) == 1
    assert "no cluster answers" in capsys.readouterr().err


def test_new_head_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A dashboard answers seconds before its head takes jobs; an agent that never starts is named."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    refusals = [SubmitError("job: No available agent to submit job, please try again later.")] * 2

    def call() -> None:
        if refusals:
            raise refusals.pop()

    _retry_until_ready(call)
    assert capsys.readouterr().out == "the head does not take jobs yet; waiting ...\n"
    refusals.append(SubmitError("job: something else"))
    with pytest.raises(SubmitError, match="something else"):
        _retry_until_ready(call)
    refusals.append(SubmitError("job: No available agent to submit job, please try again later."))
    monkeypatch.setattr("newsbert_ray.deploy.submit.START_SECONDS", -1.0)
    with pytest.raises(SubmitError, match=r"agent does not run: .*--dashboard-agent-listen-port 0"):
        _retry_until_ready(call)


@pytest.mark.parametrize(
    ("end", "verb", "out", "lines"),
    [
        (
            JobEnd("SUCCEEDED", 0, ""),
            "sweep",
            "s3://b/o",
            ["job: done; results: s3://b/o", "  newsbert-ray report s3://b/o --out report"],
        ),
        (JobEnd("SUCCEEDED", 0, ""), "sweep", "/not/here", ["job: done; results: /not/here"]),
        (JobEnd("SUCCEEDED", 0, ""), "", None, ["job: done"]),
        (
            JobEnd("FAILED", 3, "exit code 3"),
            "sweep",
            "s3://b/o",
            ["job: failed (exit code 3); the same command with --resume continues it"],
        ),
        (JobEnd("FAILED", 2, "exit code 2"), "sweep", "s3://b/o", ["job: failed (exit code 2)"]),
        (
            JobEnd("STOPPED", 1, ""),
            "train",
            "s3://b/o",
            ["job: stopped; the same command continues it"],
        ),
    ],
)
def test_last_lines_name_the_next_command(end: JobEnd, verb: str, out: str | None, lines: list[str]) -> None:
    """To resume, or to see the results."""
    assert list(_closing_lines("job", end, verb=verb, out=out)) == lines


OWN = metadata.version("ray")


def no_warning(*warning: str) -> None:
    """For connections that are safe."""
    pytest.fail(f"{warning}")


def token_file(folder: Path, text: str = "abc123", mode: int = 0o600) -> Path:
    """A file with a token."""
    path = folder / "its-token"
    path.write_text(f"{text}\n")
    path.chmod(mode)
    return path


def test_only_a_dashboard_that_asks_for_a_token_gets_it(tmp_path: Path) -> None:
    """A token sent to any server at an address is a token given away."""
    with dashboard(lambda _: (200, {}, version())) as (address, received):
        client = connect(address, token_file=token_file(tmp_path), warn=no_warning)
    assert (received, client.token) == ([None], None)
    with dashboard(guarded("abc123")) as (address, received):
        client = connect(address, token_file=token_file(tmp_path), warn=no_warning)
    assert (received, client.token) == ([None, "Bearer abc123"], "abc123")
    assert "abc123" not in repr(client)


def test_token_does_not_follow_a_redirect(tmp_path: Path) -> None:
    """urllib would send the token to the other host."""
    with dashboard(guarded("abc123")) as (other, received):
        target = {"Location": f"{other}/api/version"}
        with (
            dashboard(lambda header: (302, target, b"") if header else (401, {}, b"")) as (address, _),
            pytest.raises(DashboardError, match=f"answers 302 .*redirects to {other}"),
        ):
            connect(address, token_file=token_file(tmp_path), warn=no_warning)
        assert received == []


def test_token_is_read_where_ray_reads_it(tmp_path: Path) -> None:
    """Whatever RAY_AUTH_MODE says: Ray's own client would have the token and not send it."""
    (tmp_path / ".ray").mkdir()
    token_file(tmp_path / ".ray", "home").rename(tmp_path / ".ray/auth_token")
    file = str(token_file(tmp_path, "file"))
    for token, more in (
        ("word", {"RAY_AUTH_TOKEN": "word", "RAY_AUTH_TOKEN_PATH": file}),
        ("file", {"RAY_AUTH_TOKEN_PATH": file}),
        ("home", {}),
    ):
        with dashboard(guarded(token)) as (address, _):
            variables = {"HOME": str(tmp_path), "RAY_API_SERVER_ADDRESS": address, **more}
            with patch.dict(os.environ, variables, clear=True):
                assert connect(None, warn=no_warning).token == token


def test_missing_and_wrong_token_have_a_cure(tmp_path: Path) -> None:
    """401 and 403 do not tell which file is missing."""
    with dashboard(guarded("right")) as (address, _):
        with (
            patch.dict(os.environ, {"HOME": str(tmp_path)}, clear=True),
            pytest.raises(DashboardError, match=r"none was found; give --token_file .*RAY_AUTH_TOKEN_PATH"),
        ):
            connect(address, warn=no_warning)
        with pytest.raises(DashboardError, match="refuses the token; copy the cluster's token") as caught:
            connect(address, token_file=token_file(tmp_path, "wrong1"), warn=no_warning)
        assert "wrong1" not in str(caught.value)


def test_warning_about_a_token_file_that_others_can_read(tmp_path: Path) -> None:
    """Whoever can read the token can run programs as its owner."""
    warnings: list[tuple[str, str]] = []
    path = token_file(tmp_path, mode=0o644)
    with dashboard(guarded("abc123")) as (address, _):
        connect(address, token_file=path, warn=lambda *warning: warnings.append(warning))
    assert warnings == [(f"{path}: other users of this machine can read it (mode 0644)", f"chmod 600 {path}")]


@pytest.mark.parametrize("text", ["", "two words", "ümlaut"])
def test_file_without_a_token_is_refused(text: str, tmp_path: Path) -> None:
    """A wrong file must not be sent to a cluster as its token, nor be shown in a message."""
    with pytest.raises(DashboardError, match=r"its-token: contains no token") as caught:
        connect("127.0.0.1:1", token_file=token_file(tmp_path, text), warn=no_warning)
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://10.255.255.1:8265", True),
        ("cluster.invalid:8265", True),
        ("https://cluster.invalid", False),
        ("127.0.0.1:1", False),
        ("http://[::1]:1", False),
        ("http://127.0.0.1.evil.invalid", True),
    ],
)
def test_warning_about_unencrypted_connections(
    address: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over plain http others can read the token and the code on their way."""
    monkeypatch.setattr(submission, "_ask_version", lambda *_: None)
    warnings: list[tuple[str, str]] = []
    with (
        patch.dict(os.environ, {"HOME": "/nonexistent"}, clear=True),
        pytest.raises(DashboardError, match="none was found"),
    ):
        connect(address, warn=lambda *warning: warnings.append(warning))
    assert bool(warnings) == warned
    assert all("unencrypted" in problem and "ssh -L" in cure for problem, cure in warnings)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "no cluster given; give --address"),
        ("ray://head:10001", "is Ray Client's; give the dashboard's: http://head:8265"),
        ("ftp://head", "not an address; give the dashboard's: http://HOST:8265"),
        ("http://", "not an address"),
        ("http://head:port", "not an address"),
        ("http://me:hunter2@head:8265", "a password, which logs would show"),
    ],
)
def test_wrong_address_names_the_right_form(address: str | None, message: str) -> None:
    """A slip in the address must not end in a stack trace, nor show a password."""
    with patch.dict(os.environ, clear=True), pytest.raises(DashboardError, match=message) as caught:
        connect(address, warn=no_warning)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"null"])
def test_another_server_is_not_taken_for_a_dashboard(body: bytes) -> None:
    """Jupyter or a proxy may use the port."""
    with (
        dashboard(lambda _: (200, {}, body)) as (address, _),
        pytest.raises(DashboardError, match="is not Ray's dashboard"),
    ):
        connect(address, warn=no_warning)
    with (
        dashboard(lambda _: (404, {}, body)) as (address, _),
        pytest.raises(DashboardError, match=r"answers 404 .*is this the cluster's dashboard\?"),
    ):
        connect(address, warn=no_warning)


def test_no_answer_names_the_tunnel() -> None:
    """A closed tunnel is the usual reason."""
    with pytest.raises(DashboardError, match=r"127\.0\.0\.1:1: no cluster answers .*open the tunnel"):
        connect("127.0.0.1:1", warn=no_warning)


def test_warnings_about_a_missing_token_and_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without a token is open to everyone; another Ray fails with a misleading error."""
    monkeypatch.setattr(submission, "_ask_version", lambda *_: "2.9.0")
    warnings: list[tuple[str, str]] = []
    assert connect("https://head:8265", warn=lambda *warning: warnings.append(warning)).token is None
    (problem, _), (versions, cure) = warnings
    assert problem.startswith("https://head:8265 asks for no token: everyone who can reach it")
    assert versions == f"https://head:8265 runs Ray 2.9.0, this machine has Ray {OWN}"
    assert cure.startswith("pip install ray==2.9.0 here")


LOG = "first\nsecond\nthird\nlast ünd\n"


@dataclass
class Info:
    """A job as Ray describes it."""

    status: str = "RUNNING"
    driver_exit_code: int | None = None
    message: str | None = None


DONE = Info("SUCCEEDED", 0)


class FakeJobs:
    """A cluster that behaves as told.

    `logs` and `infos`: the answers to requests for the job's log and state; the last one for ever.
    """

    def __init__(self, logs: Sequence[Any], infos: Sequence[Any]) -> None:
        self._logs, self._infos = list(logs), list(infos)

    def get_job_info(self, job_id: str) -> Any:
        return self._next(self._infos)

    def get_job_logs(self, job_id: str) -> str:
        return str(self._next(self._logs))

    def _next(self, answers: list[Any]) -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def follow(jobs: FakeJobs) -> tuple[JobEnd, str, list[str]]:
    """The job's end, its log, and the lines of explanation."""
    written: list[str] = []
    lines: list[str] = []
    with patch.multiple(submission, _write_log=written.append, _say=lines.append):
        end = follow_log(jobs, "job", "http://head")
    return end, "".join(written), lines


@pytest.fixture(autouse=True)
def _short_waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for a real cluster, whose jobs are pending for seconds."""
    if request.node.get_closest_marker("ray"):
        return
    for name in ("PENDING_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(submission, name, 0.05)


def test_log_is_written_once() -> None:
    """No line is lost or repeated, also after requests that failed."""
    logs = ["first\n", "first\nsecond\nthi", ConnectionResetError("gone"), "", LOG]
    end, written, lines = follow(FakeJobs(logs, [*[Info()] * 4, DONE]))
    assert (end.code, written, lines) == (0, LOG, [])
    end, written, lines = follow(FakeJobs(["first\n", OSError("gone")], [Info(), DONE]))
    assert (end.code, written, lines) == (0, "first\n", ["the end of the log could not be read"])


def test_pending_job_is_explained() -> None:
    """An installation of minutes looks like a cluster that hangs."""
    pending = Info("PENDING", message="Waiting for the runtime environment to be set up.\nmore")
    start = time.monotonic()

    class Slow(FakeJobs):
        def get_job_info(self, job_id: str) -> Any:
            return pending if time.monotonic() < start + 0.3 else super().get_job_info(job_id)

    _, written, lines = follow(Slow([LOG], [DONE]))
    assert written == LOG
    assert 1 <= len(lines) <= 3
    assert "still pending after" in lines[0]
    assert "Waiting for the runtime environment to be set up. (" in lines[0]


def test_unreachable_cluster_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard that restarts must not end the log of a day's sweep; one that stays away must."""
    monkeypatch.setattr(submission, "LOST_SECONDS", 0.02)
    away = ConnectionError("refused")
    _, written, lines = follow(FakeJobs(["first\n", LOG], [Info(), away, away, Info(), away, DONE]))
    assert (written, lines) == (LOG, ["the connection to http://head was lost; trying again ..."] * 2)
    monkeypatch.setattr(submission, "GIVE_UP_SECONDS", 0.05)
    with pytest.raises(SubmitError, match=r"http://head: no answer for 0\.05 s; job may still be running"):
        follow(FakeJobs([""], [Info(), away]))


def test_unknown_job_ends_at_once() -> None:
    """A restarted head has forgotten the job: no reason to ask for five minutes."""
    with pytest.raises(SubmitError, match=r"job: the cluster knows no such job; .*head that was restarted"):
        follow(FakeJobs([""], [RuntimeError("Request failed with status code 404: Job job does not exist")]))


def test_ctrl_c_ends_at_once() -> None:
    """Taken for a lost connection, it would never give the terminal back."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        follow(FakeJobs(["first\n"], [Info()]))
    assert time.monotonic() - start < 5
    timer.join()


@pytest.mark.parametrize(
    ("info", "end"),
    [
        (Info(), None),
        (Info("PENDING"), None),
        (DONE, JobEnd("SUCCEEDED", 0, "")),
        (Info("FAILED", 3, "last lines of the log"), JobEnd("FAILED", 3, "exit code 3")),
        (Info("FAILED", -9, "text"), JobEnd("FAILED", 1, "killed by signal 9")),
        (Info("FAILED", None, "no such package\n"), JobEnd("FAILED", 1, "no such package")),
        (Info("FAILED", 0, "supervisor died"), JobEnd("FAILED", 1, "supervisor died")),
        (Info("STOPPED", None, None), JobEnd("STOPPED", 1, "")),
    ],
)
def test_end_has_the_exit_code(info: Info, end: JobEnd | None) -> None:
    """A script must not take a failed job for a successful one."""
    assert job_end(info) == end
