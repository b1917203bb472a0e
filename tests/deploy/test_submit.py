"""Jobs on a real head; and what is refused before anything is sent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.local import LocalCluster
from newsbert_ray import cli
from newsbert_ray.deploy.job_client import JobEnd
from newsbert_ray.deploy.package import ENVIRONMENT, LIMIT_BYTES
from newsbert_ray.deploy.submit import SubmitError, _closing_lines, _retry_until_ready

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CHECKOUT = Path(__file__).parents[2]
Submit = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def head() -> Iterator[LocalCluster]:
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
    assert output.splitlines()[-2:] == ["out of luck", "three: failed (exit code 3)"]


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


def test_new_head_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard answers seconds before its head takes jobs; an agent that never starts is named."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    refusals = [SubmitError("job: No available agent to submit job, please try again later.")] * 2
    output: list[str] = []

    def call() -> None:
        if refusals:
            raise refusals.pop()

    _retry_until_ready(call, output.append)
    assert output == ["the head does not take jobs yet; waiting ..."]
    refusals.append(SubmitError("job: something else"))
    with pytest.raises(SubmitError, match="something else"):
        _retry_until_ready(call, output.append)
    refusals.append(SubmitError("job: No available agent to submit job, please try again later."))
    monkeypatch.setattr("newsbert_ray.deploy.submit.START_SECONDS", -1.0)
    with pytest.raises(SubmitError, match=r"agent does not run: .*--dashboard-agent-listen-port 0"):
        _retry_until_ready(call, output.append)


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
