from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from newsbert_ray.deploy import package
from newsbert_ray.deploy.package import (
    LIMIT_BYTES,
    Package,
    PackageError,
    find_files,
    require_small,
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
