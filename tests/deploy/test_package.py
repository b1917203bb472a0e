""""""

from __future__ import annotations

import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from newsbert_ray.config import SettingsError
from newsbert_ray.deploy import package
from newsbert_ray.deploy.package import (
    LIMIT_BYTES,
    Package,
    PackageError,
    Parcel,
    check_reach,
    check_words,
    checked_name,
    entrypoint_of,
    find_files,
    job_name,
    read_entrypoint,
    read_variables,
    require_small,
    runtime_of,
    write_archive,
)

CHECKOUT = Path(__file__).parents[2]


def _write(root: Path, *names: str, content: str = "x\n") -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def _names(found: Package) -> set[str]:
    """What goes along beside newsbert_ray itself."""
    return {file.name for file in found.files if not file.name.startswith("newsbert_ray/")}


def _sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def test_results_caches_data_and_secrets_stay_here(tmp_path: Path) -> None:
    """A run's checkpoints in the package refuse every submission; a secret in it is everybody's."""
    kept = {"space.yaml", "own/model.py", "own/data/rows.tsv"}
    _write(tmp_path, *kept, ".git/HEAD", ".venv/bin/python", "own/__pycache__/model.pyc", "x.egg-info/PKG")
    _write(tmp_path, "runs/a/record.json", "data/news.tsv", "demo/a", "bench/a", "shards/0.json")
    _write(tmp_path, "weights.pt", "own/model.safetensors", ".env", "own/host.pem", ".aws/credentials")
    assert _names(find_files(tmp_path)) == kept


def test_ignore_files_hold_below_themselves(tmp_path: Path) -> None:
    """A .gitignore read otherwise than git reads it sends what its owner believes to be left out."""
    _write(tmp_path, "a/notes.txt", "a/log.txt", "b/notes.txt", "b/big/1", "b/big/2", "keep.log", "c.log")
    (tmp_path / ".gitignore").write_text("*.log\n!keep.log\n")
    (tmp_path / "a/.gitignore").write_text("/notes.txt\n")
    (tmp_path / "b/.rayignore").write_text("big/\n")
    names = _names(find_files(tmp_path)) - {".gitignore", "a/.gitignore", "b/.rayignore"}
    assert names == {"a/log.txt", "b/notes.txt", "keep.log"}


def test_asked_for_goes_over_what_is_left_out(tmp_path: Path) -> None:
    """A small folder of shards can go along, whatever its files end with; what is excluded by name never."""
    _write(tmp_path, "shards/0.parquet", "shards/manifest.json", "shards/notes.md", "other/0.parquet")
    found = find_files(tmp_path, include=["/shards/"], exclude=["*.md"])
    assert _names(found) == {"shards/0.parquet", "shards/manifest.json"}
    assert found.holds("shards")
    assert not found.holds("shar")
    assert not found.holds("other")


def test_links_that_lead_out_stay_here(tmp_path: Path) -> None:
    """A link to a key or to a disk of data would be sent as what it leads to; a link to itself for ever."""
    secret = _write(tmp_path, "secret/id").joinpath("secret")
    root = _write(tmp_path / "project", "own.txt", "deep/more.txt")
    (root / "key").symlink_to(secret / "id")
    (root / "disk").symlink_to(secret)
    (root / "deep/loop").symlink_to(root)
    (root / "same.txt").symlink_to("own.txt")
    found = find_files(root)
    assert _names(found) == {"own.txt", "deep/more.txt", "same.txt"}
    assert found.links == ("deep/loop", "disk", "key")


def test_too_large_names_the_folders_and_the_cure(tmp_path: Path) -> None:
    """Ray itself refuses after the upload, with a number and no hint of what is so large."""
    _sparse(tmp_path / "corpus/a.tsv", 90_000_000)
    _sparse(tmp_path / "models/b.onnx", 30_000_000)
    _write(tmp_path, "notes.txt")
    found = find_files(tmp_path)
    with pytest.raises(
        PackageError,
        match=r"12\d\.\d MB in .* 100\.0 MB .*corpus/ 90\.0 MB, models/ 30\.0 MB.*--exclude corpus/",
    ):
        require_small(found)
    require_small(find_files(tmp_path, exclude=["corpus/"]))


def test_limit_is_met_to_the_byte(tmp_path: Path) -> None:
    """One byte more than is allowed is refused, exactly as much is not."""
    rest = find_files(_write(tmp_path)).bytes
    _sparse(tmp_path / "rows.tsv", LIMIT_BYTES - rest)
    require_small(find_files(tmp_path))
    _sparse(tmp_path / "rows.tsv", LIMIT_BYTES - rest + 1)
    with pytest.raises(PackageError):
        require_small(find_files(tmp_path))


def test_home_folder_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submission from a home folder must not count a million files first."""
    monkeypatch.setattr(package, "MOST_FILES", 5)
    _write(tmp_path, *(f"mail/{number}" for number in range(9)))
    with pytest.raises(PackageError, match=r"more than 5 files, so far most in mail/ 6; .*--exclude mail/"):
        find_files(tmp_path)


def test_own_package_goes_along_from_any_folder(tmp_path: Path) -> None:
    """Without it the job would run whatever newsbert_ray the cluster has, or none."""
    found = find_files(_write(tmp_path, "space.yaml"))
    assert not found.own
    assert found.holds("newsbert_ray/cli.py")
    assert found.holds("newsbert_ray/data/mind.py")
    assert not any("__pycache__" in file.name for file in found.files)


def test_checkout_sends_itself_once_and_small() -> None:
    """The checkout's own data/ is data, its newsbert_ray/data/ is source."""
    found = find_files(CHECKOUT)
    names = [file.name for file in found.files]
    assert found.own
    assert found.holds("newsbert_ray/data/mind.py")
    assert found.holds("search_spaces/cloud.yaml")
    assert len(names) == len(set(names))
    assert found.bytes < 10_000_000


def test_archive_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    """Ray knows a package by its bytes: a time of day in it would send it anew each time."""
    root = _write(tmp_path / "project", "a.txt", "b/run.sh")
    (root / "b/run.sh").chmod(0o755)
    first = write_archive(find_files(root), tmp_path / "1.zip").read_bytes()
    _write(root, "a.txt", "b/run.sh")
    second = write_archive(find_files(root), tmp_path / "2.zip")
    assert second.read_bytes() == first
    with zipfile.ZipFile(second) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("b/run.sh").external_attr >> 16 & 0o777 == 0o755
        assert archive.getinfo("a.txt").external_attr >> 16 & 0o777 == 0o644


ODD = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40)


@settings(max_examples=15)
@given(st.lists(ODD, max_size=6))
def test_archive_names_stay_in_their_folder(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    """A name that leads out of the folder would be skipped by Ray, or written where nobody expects it."""
    root = tmp_path_factory.mktemp("odd")
    for name in set(names) - {".", ".."}:
        (root / name).write_text("x")
    with zipfile.ZipFile(write_archive(find_files(root), root.parent / f"{root.name}.zip")) as archive:
        assert not any(name.startswith("/") or ".." in name.split("/") for name in archive.namelist())


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A file that went away while it was packed must not end in a trace."""
    found = find_files(_write(tmp_path, "a.txt"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(PackageError, match=r"a\.txt': cannot be sent .*--exclude"):
        write_archive(found, tmp_path / "p.zip")


def test_no_folder_is_said(tmp_path: Path) -> None:
    """A slip in --working_dir ends here, not in an empty package."""
    with pytest.raises(PackageError, match="no folder there"):
        find_files(tmp_path / "nowhere")


def test_command_survives_the_shell() -> None:
    """The entrypoint is a shell's line: a value with a space or a `;` must stay one word, and run nothing."""
    command = ["sweep", "my space.yaml", "--vary", "seeds=0,1", "--out", "s3://b/a; touch x"]
    text = entrypoint_of(command)
    assert shlex.split(text)[3:] == command
    assert read_entrypoint(text) == ("sweep", "s3://b/a; touch x")


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("python -m newsbert_ray.cli train --out=/x --data a", ("train", "/x")),
        ("python -m newsbert_ray.cli report a", ("report", None)),
        ("python -m newsbert_ray.cli report --out", ("report", None)),
        ("python -m newsbert_ray.cli", ("", None)),
        ("python other.py --out x", ("", None)),
        ("echo 'unfinished", ("", None)),
        ("", ("", None)),
    ],
)
def test_entrypoints_of_others_are_left_alone(text: str, known: tuple[str, str | None]) -> None:
    """A cluster has other people's jobs too; listing or stopping one must not stumble over its command."""
    assert read_entrypoint(text) == known


def test_names_are_readable_and_unlike() -> None:
    """Two people who sweep in the same minute must not get the same name."""
    names = {job_name(None, ["sweep", "x"]) for _ in range(20)}
    assert len(names) > 15
    assert all(re.fullmatch(r"newsbert-sweep-\d{8}-\d{4}-[0-9a-f]{4}", name) for name in names)


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "a b", "-x", "a?b", "a\n", "é", "x" * 101])
def test_name_that_would_lead_elsewhere_is_refused(name: str) -> None:
    """A job's name becomes part of an address and of a log's file name on the head."""
    with pytest.raises(SettingsError, match="no job's name"):
        checked_name(name)


def test_requirements_leave_ray_to_the_cluster(tmp_path: Path) -> None:
    """Another Ray inside a job than outside breaks it; constraints.txt names Ray too."""
    file = tmp_path / "constraints.txt"
    file.write_text("# pinned\nnumpy==2.4.6  # ids\n\nray==2.60.0\nray[data]>=2\nray-extra==1\n")
    found = runtime_of(Parcel(pip=str(file), variables={"A": "1"}))
    assert found["pip"]["packages"] == ["numpy==2.4.6", "ray-extra==1"]
    assert found["env_vars"]["A"] == "1"
    assert "pip" not in runtime_of(Parcel())
    with pytest.raises(SettingsError, match="--pip nowhere"):
        runtime_of(Parcel(pip="nowhere"))


def test_environment_is_not_the_submitters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in a person's environment, keys of a cloud among it, stays with the person."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    assert "hunter2" not in str(runtime_of(Parcel()))


def test_variables_are_read() -> None:
    """A value may hold an equals sign; a name without a value is a slip."""
    assert read_variables(["A=b=c", "B="]) == {"A": "b=c", "B": ""}
    with pytest.raises(SettingsError, match="--env A: expected NAME=VALUE"):
        read_variables(["A"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a search space that is sent, and shards and a run that are not."""
    for name in ("spaces/a.yaml", "shards/manifest.json", "runs/a/record.json", "corpus/news.tsv"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True)
        path.write_text("x")
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "shards"}, r"--data shards: the cluster cannot see it.*--include /shards/$"),
        ({"data": "./shards/"}, r"--data \./shards/: .*--include /shards/$"),
        ({"run": "runs/a"}, r"the run runs/a: the cluster cannot see it"),
        ({"data": "nowhere"}, r"--data nowhere: not in .*project, which is sent"),
        ({"source": ["corpus", "shards"]}, r"--source shards: "),
        ({"folders": ["s3://b/x", "runs"]}, r"the folder runs: "),
        ({"input": ["corpus/news.tsv", "runs/a/news.tsv"]}, r"--input runs/a/news\.tsv: not in"),
        ({"vectors": "runs/a"}, r"the vectors runs/a: the cluster cannot see it"),
        ({"teacher": "shards"}, r"--teacher shards: the cluster cannot see it"),
        ({"config": "run.yaml"}, r"--config run\.yaml: not in"),
        ({"data": "../other"}, r"--data \.\./other: not in"),
        ({"out": "runs/b"}, r"--out runs/b: would lie in the job's own folder .*s3://BUCKET"),
        ({"submission": "p.zip"}, r"--submission p\.zip: would lie in the job's own folder"),
    ],
)
def test_what_the_cluster_cannot_see_is_refused(values: dict[str, Any], message: str, root: Path) -> None:
    """Found out on the cluster, it is a failed job some minutes later; for --out, results that are gone."""
    with pytest.raises(SettingsError, match=message):
        check_reach(values, find_files(root))


def test_what_the_cluster_can_see_passes(root: Path) -> None:
    """What is sent, what has a URL, and a name of Hugging Face's need no shared disk."""
    values = {
        "space": "spaces/a.yaml",
        "data": "s3://bucket/shards",
        "source": ["corpus"],
        "teacher": "bert-base-uncased",
        "out": "gs://bucket/out",
        "config": None,
    }
    assert check_reach(values, find_files(root)) == []
    assert check_reach({"data": "shards"}, find_files(root, include=["/shards/"])) == []


def test_absolute_paths_are_pointed_out(root: Path) -> None:
    """They may lie on a disk that all nodes share: the person knows, not we."""
    lines = check_reach({"data": "/mnt/shards", "out": "~/runs/b"}, find_files(root))
    assert lines == ["note: every node must see --data /mnt/shards, --out ~/runs/b at that path"]


@pytest.mark.parametrize(
    "word",
    [
        "s3://AKIA123:wJalr@bucket/out",
        "--search.storage=mysql://me:hunter2@host/db",
        "s3://bucket/out?secret_key=hunter2&region=x",
        "https://host/file?X-Amz-Security-Token=hunter2",
    ],
)
def test_secret_in_a_word_is_refused_and_not_repeated(word: str) -> None:
    """Ray shows a job's command to everybody who may list jobs, and writes it into its log."""
    with pytest.raises(SettingsError, match="shown to everybody") as caught:
        check_words(["sweep", word], {})
    assert "hunter2" not in str(caught.value)
    assert "wJalr" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "PGPASSWORD", "OPENAI_API_KEY", "key"]
)
def test_secret_in_the_environment_is_refused(name: str) -> None:
    """A job's environment stands in its description."""
    with pytest.raises(SettingsError, match=rf"--env {name}: .*shown to everybody") as caught:
        check_words([], {name: "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_what_is_no_secret_passes() -> None:
    """An endpoint, a region and ordinary settings must not be refused for their looks."""
    variables = {"AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu", "HF_HOME": "/shared/keys"}
    words = ["sweep", "--out", "s3://bucket/a?endpoint_override=http://store:9000", "--vary", "seeds=0,1"]
    check_words([*words, "--token_budget", "4096", "--search.storage", "sqlite:////shared/a.db"], variables)
