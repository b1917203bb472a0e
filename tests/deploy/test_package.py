"""Which files a job takes along, and what is refused before anything is sent."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from newsbert_ray.config import SettingsError
from newsbert_ray.deploy import package
from newsbert_ray.deploy.package import (
    LIMIT_BYTES,
    Package,
    PackageError,
    check_job_name,
    check_paths,
    check_secrets,
    find_files,
    make_entrypoint,
    runtime_environment,
    write_zip,
)

CHECKOUT = Path(__file__).parents[2]


def write(root: Path, *names: str) -> Path:
    """Small files below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n")
    return root


def write_sparse(path: Path, size: int) -> None:
    """A file of `size` bytes that takes no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def names(files: Package) -> set[str]:
    """What is sent beside newsbert_ray itself."""
    return {name for name in files.files if not name.startswith("newsbert_ray/")}


def test_results_caches_data_and_secrets_are_not_sent(tmp_path: Path) -> None:
    """A run's checkpoints make the package too large; a secret in it is everybody's, even with --include."""
    kept = {"space.yaml", "own/model.py", "own/data/rows.tsv"}
    secrets = {".env", "own/host.pem", ".aws/credentials", "own/auth_token"}
    write(
        tmp_path,
        *kept,
        *secrets,
        ".git/HEAD",
        ".venv/bin/python",
        "own/__pycache__/model.pyc",
        "x.egg-info/P",
    )
    write(tmp_path, "runs/a/record.json", "data/news.tsv", "demo/a", "bench/a", "shards/0.json")
    write(tmp_path, "weights.pt", "own/model.safetensors")
    assert names(find_files(tmp_path)) == kept
    included = names(find_files(tmp_path, include=["*", "/own/", ".env", "/.aws/"]))
    assert included >= kept | {"weights.pt"}
    assert not included & secrets


def test_ignore_files_hold_in_their_folder(tmp_path: Path) -> None:
    """As git and Ray read them."""
    write(tmp_path, "a/notes.txt", "a/log.txt", "b/notes.txt", "b/big/1", "b/big/2", "keep.log", "c.log")
    (tmp_path / ".gitignore").write_text("*.log\n!keep.log\n")
    (tmp_path / "a/.gitignore").write_text("/notes.txt\n")
    (tmp_path / "b/.rayignore").write_text("big/\n")
    sent = names(find_files(tmp_path)) - {".gitignore", "a/.gitignore", "b/.rayignore"}
    assert sent == {"a/log.txt", "b/notes.txt", "keep.log"}


def test_include_and_exclude(tmp_path: Path) -> None:
    """A small folder of shards can be sent although .gitignore names it; what --exclude names never is."""
    write(
        tmp_path,
        "shards/0.parquet",
        "shards/manifest.json",
        "shards/notes.md",
        "other/0.parquet",
        "deep/a/b.pt",
    )
    (tmp_path / ".gitignore").write_text("shards/\n.gitignore\n")
    files = find_files(tmp_path, include=["/shards/", "b.pt"], exclude=["*.md"])
    assert names(files) == {"shards/0.parquet", "shards/manifest.json", "deep/a/b.pt"}
    assert files.contains("shards")
    assert not files.contains("shar")
    assert not files.contains("other")
    for pattern in ("../other", "/"):
        with pytest.raises(PackageError, match="expected a pattern such as /shards/"):
            find_files(tmp_path, include=[pattern])


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """Such a link may lead to a key or to a disk of data; a link to a folder may lead in a circle."""
    secret = write(tmp_path, "secret/id") / "secret"
    root = write(tmp_path / "project", "own.txt", "deep/more.txt")
    (root / "key").symlink_to(secret / "id")
    (root / "disk").symlink_to(secret)
    (root / "deep/loop").symlink_to(root)
    (root / "same.txt").symlink_to("own.txt")
    files = find_files(root)
    assert names(files) == {"own.txt", "deep/more.txt", "same.txt"}
    assert files.links == {"deep/loop", "disk", "key"}


def test_size_limit_to_the_byte(tmp_path: Path) -> None:
    """Ray refuses only after the upload, and does not say what is large."""
    write_sparse(tmp_path / "models/b.onnx", 30_000_000)
    rest = LIMIT_BYTES - find_files(tmp_path).bytes
    write_sparse(tmp_path / "corpus/a.tsv", rest)
    find_files(tmp_path)
    write_sparse(tmp_path / "corpus/a.tsv", rest + 1)
    with pytest.raises(
        PackageError, match=r"100\.0 MB in .*largest: corpus/ 6\d\.\d MB, models/ 30\.0 MB.*--exclude corpus/"
    ):
        find_files(tmp_path)
    find_files(tmp_path, exclude=["corpus/"])


def test_home_folder_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without counting a million files first."""
    monkeypatch.setattr(package, "MAX_FILES", 5)
    write(tmp_path, *(f"mail/{number}" for number in range(9)))
    with pytest.raises(PackageError, match=r"more than 5 files, most of them in mail/ 6; .*--exclude mail/"):
        find_files(tmp_path)


def test_newsbert_ray_is_sent_from_any_folder(tmp_path: Path) -> None:
    """Without it the job would run another version, or none. The checkout sends itself once."""
    files = find_files(write(tmp_path, "space.yaml"))
    assert not files.has_newsbert_ray
    assert files.contains("newsbert_ray/cli.py")
    assert files.contains("newsbert_ray/data/mind.py")
    assert not any("__pycache__" in name for name in files.files)
    checkout = find_files(CHECKOUT)
    assert checkout.has_newsbert_ray
    assert checkout.contains("newsbert_ray/data/mind.py")
    assert checkout.contains("search_spaces/cloud.yaml")
    assert checkout.bytes < 10_000_000


def test_exactly_these_files_are_packed(tmp_path: Path) -> None:
    """Ray obeys a .gitignore in a folder that it packs: it would drop what --include added."""
    root = write(tmp_path / "project", "a.txt", "shards/0.parquet", "b/run.sh")
    (root / ".gitignore").write_text("shards/\n")
    (root / "b/run.sh").chmod(0o755)
    package = find_files(root, include=["/shards/"])
    write_zip(package, tmp_path / "p.zip")
    write_zip(package, tmp_path / "same.zip")
    assert (tmp_path / "p.zip").read_bytes() == (tmp_path / "same.zip").read_bytes()  # Ray uploads it once
    with ZipFile(tmp_path / "p.zip") as archive:
        packed = {name for name in archive.namelist() if not name.startswith("newsbert_ray/")}
        assert packed == {".gitignore", "a.txt", "shards/0.parquet", "b/run.sh"}
        assert archive.read("a.txt") == b"x\n"
        assert archive.getinfo("b/run.sh").external_attr >> 16 & 0o777 == 0o755


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    """A file that vanished meanwhile, or a name that no archive can hold, must not end in a stack trace."""
    files = find_files(write(tmp_path, "a.txt"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(PackageError, match=r"a\.txt': cannot be sent .*--exclude"):
        write_zip(files, tmp_path / "p.zip")
    (tmp_path / "b\udcff.txt").write_text("x")
    with pytest.raises(PackageError, match=r"b\\udcff\.txt': cannot be sent"):
        write_zip(find_files(tmp_path, exclude=["p.zip"]), tmp_path / "p.zip")
    with pytest.raises(PackageError, match="no such folder"):
        find_files(tmp_path / "nowhere")


def test_command_survives_the_shell() -> None:
    """The entrypoint is a shell command: a value with a blank or a `;` stays one word and runs nothing."""
    command = ["sweep", "my space.yaml", "--vary", "seeds=0,1", "--out", "s3://b/a; touch x"]
    text = make_entrypoint(command)
    assert shlex.split(text)[3:] == command


def test_job_names() -> None:
    """They become a part of addresses and file names."""
    assert check_job_name("newsbert-sweep-20261125-1231-ab12") == "newsbert-sweep-20261125-1231-ab12"
    for name in ("../../etc", "a/b", "", "a b", "-x", "a?b", "a\n", "é", "x" * 101):
        with pytest.raises(SettingsError, match="not a job's name"):
            check_job_name(name)


def test_requirements_without_ray(tmp_path: Path) -> None:
    """Another Ray inside a job than outside breaks it; constraints.txt names Ray too."""
    file = tmp_path / "constraints.txt"
    file.write_text("# pinned\nnumpy==2.4.6  # ids\n\nray==2.60.0\nray[data]>=2\nray-extra==1\n")
    runtime = runtime_environment(["A=1"], str(file))
    assert runtime["pip"]["packages"] == ["numpy==2.4.6", "ray-extra==1"]
    assert runtime["env_vars"]["A"] == "1"
    with pytest.raises(SettingsError, match="--pip nowhere"):
        runtime_environment([], "nowhere")


def test_environment_of_the_user_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold keys of a cloud."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    assert "hunter2" not in str(runtime_environment([], None))
    variables = runtime_environment(["A=b=c", "B="], None)["env_vars"]
    assert (variables["A"], variables["B"]) == ("b=c", "")
    with pytest.raises(SettingsError, match="--env A: expected NAME=VALUE"):
        runtime_environment(["A"], None)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a search space that is sent, and shards and a run that are not."""
    return write(
        tmp_path / "project", "spaces/a.yaml", "shards/manifest.json", "runs/a/record.json", "corpus/news.tsv"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "shards"}, r"--data shards: is not sent, .*--include /shards/$"),
        ({"data": "./shards/"}, r"--data \./shards/: .*--include /shards/$"),
        ({"run": "runs/a"}, r"run runs/a: is not sent"),
        ({"data": "nowhere"}, r"--data nowhere: not in .*project, which is sent"),
        ({"source": ["corpus", "shards"]}, r"--source shards: "),
        ({"folders": ["s3://b/x", "runs"]}, r"folder runs: "),
        ({"input": ["corpus/news.tsv", "runs/a/news.tsv"]}, r"--input runs/a/news\.tsv: not in"),
        ({"vectors": "runs/a"}, r"vectors runs/a: is not sent"),
        ({"teacher": "shards"}, r"--teacher shards: is not sent"),
        ({"config": "run.yaml"}, r"--config run\.yaml: not in"),
        ({"data": "../other"}, r"--data \.\./other: not in"),
        ({"out": "runs/b"}, r"--out runs/b: a relative path is in the job's own folder .*s3://BUCKET"),
        ({"submission": "p.zip"}, r"--submission p\.zip: a relative path is in the job's own folder"),
    ],
)
def test_paths_that_the_cluster_cannot_read(settings: dict[str, Any], message: str, project: Path) -> None:
    """On the cluster they would be a job that fails after minutes; with --out, lost results."""
    with pytest.raises(SettingsError, match=message):
        check_paths(settings, find_files(project))


def test_paths_that_the_cluster_can_read(project: Path) -> None:
    """What is sent, a URL, a Hugging Face name; an absolute path may be on a shared disk, as a note says."""
    settings = {
        "space": "spaces/a.yaml",
        "data": "s3://bucket/shards",
        "source": ["corpus"],
        "teacher": "bert-base-uncased",
        "out": "gs://bucket/out",
        "config": None,
    }
    files = find_files(project)
    assert check_paths(settings, files) == []
    assert check_paths({"data": "shards"}, find_files(project, include=["/shards/"])) == []
    lines = check_paths({"data": "/mnt/shards", "out": "~/runs/b"}, files)
    assert lines == ["note: every node must be able to read --data /mnt/shards, --out ~/runs/b at that path"]


@pytest.mark.parametrize(
    "word",
    [
        "s3://AKIA123:wJalr@bucket/out",
        "--search.storage=mysql://me:hunter2@host/db",
        "s3://bucket/out?secret_key=hunter2&region=x",
        "https://host/file?X-Amz-Security-Token=hunter2",
    ],
)
def test_secret_in_a_command_is_refused_and_not_shown(word: str) -> None:
    """Ray shows a job's command to everyone who may list jobs, and logs it."""
    with pytest.raises(SettingsError, match="visible to everyone") as caught:
        check_secrets(["sweep", word])
    assert "hunter2" not in str(caught.value)
    assert "wJalr" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "PGPASSWORD", "key"]
)
def test_secret_in_the_environment_is_refused(name: str) -> None:
    """A job's environment is a part of its description."""
    with pytest.raises(SettingsError, match=rf"--env {name}: .*visible to everyone") as caught:
        runtime_environment([f"{name}=hunter2"], None)
    assert "hunter2" not in str(caught.value)


def test_ordinary_settings_are_not_taken_for_secrets() -> None:
    """An endpoint, a region, a budget of tokens."""
    variables = ["AWS_ENDPOINT_URL=http://store:9000", "AWS_REGION=eu", "HF_HOME=/shared/keys"]
    words = ["sweep", "--out", "s3://bucket/a?endpoint_override=http://store:9000", "--vary", "seeds=0,1"]
    check_secrets([*words, "--token_budget", "4096", "--search.storage", "sqlite:////shared/a.db"])
    runtime_environment(variables, None)
