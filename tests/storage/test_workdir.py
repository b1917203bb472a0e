"""Runs and inputs in a bucket, against a real S3 server on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from newsbert_ray.config import PrepareSettings, TrainSettings, build_settings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.synthetic import synthesize
from newsbert_ray.evaluation.evaluate import evaluate
from newsbert_ray.record import RecordError, read_record
from newsbert_ray.reporting.report import report
from newsbert_ray.storage import bucket as bucket_module
from newsbert_ray.storage.bucket import Remote, StorageError
from newsbert_ray.storage.workdir import WorkDir, fetch
from newsbert_ray.training.run import RunFolderError, train
from tests.storage.conftest import write_files

if TYPE_CHECKING:
    from tests.conftest import S3, MakeSettings


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are sent from now on, in order."""
    names: list[str] = []
    upload = Remote.upload

    def record(self: Remote, folder: Path, files: Any) -> None:
        names.extend(files := sorted(files))
        upload(self, folder, files)

    monkeypatch.setattr(Remote, "upload", record)
    return names


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_published_files_are_downloaded_on_another_machine(
    bucket: S3, tmp_path: Path, elsewhere: Callable[[], None], kind: str
) -> None:
    """A run that only its own machine can continue is lost with that machine."""
    location = f"{bucket.url}/runs/first" if kind == "s3" else f"file://{tmp_path}/mount/first"
    folder = WorkDir(location).download()
    write_files(folder, settings="1", checkpoints__step__state="22", empty="")
    (folder / ".lock").touch()
    WorkDir(location).publish()
    elsewhere()
    copy = WorkDir(location).download()
    assert copy != folder
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert files == {"settings.json", "checkpoints/step/state.json", "empty.json"}
    assert (copy / "checkpoints/step/state.json").read_text() == "22"


def test_only_changed_files_are_sent(bucket: S3, sent: list[str]) -> None:
    """Every evaluation would upload all checkpoints again."""
    location = f"{bucket.url}/run"
    folder = WorkDir(location).download()
    write_files(folder, a="1", b="1")
    WorkDir(location).publish()
    WorkDir(location).publish()
    assert sent == ["a.json", "b.json"]
    write_files(folder, b="22")
    WorkDir(location).publish()
    assert sent == ["a.json", "b.json", "b.json"]


def test_removed_files_are_removed_from_the_bucket_and_no_others(
    bucket: S3, elsewhere: Callable[[], None]
) -> None:
    """Old checkpoints would fill the bucket; files of another machine must stay."""
    location = f"{bucket.url}/run"
    folder = WorkDir(location).download()
    write_files(folder, settings="1", checkpoints__one__state="1", checkpoints__two__state="1")
    WorkDir(location).publish()
    shutil.rmtree(folder / "checkpoints/one")
    Remote(location).write("theirs.json", b"1")
    WorkDir(location).publish()
    assert Remote(location).files().keys() == {"settings.json", "checkpoints/two/state.json", "theirs.json"}


def test_files_that_name_others_are_sent_last(bucket: S3, sent: list[str]) -> None:
    """A kill between two files leaves a state without its weights, or a record without its student."""
    location = f"{bucket.url}/run"
    folder = WorkDir(location).download()
    names = ["record", "checkpoints__step-2__state", "checkpoints__best-2__state", "student__top", "settings"]
    write_files(folder, **dict.fromkeys(names, "1"))
    (folder / "checkpoints/step-2/weights").write_text("1")
    WorkDir(location).publish()
    assert sent == [
        "settings.json",
        "checkpoints/step-2/weights",
        "student/top.json",
        "checkpoints/best-2/state.json",
        "checkpoints/step-2/state.json",
        "record.json",
    ]


def test_a_copy_that_is_newer_is_kept(bucket: S3) -> None:
    """An epoch that ended while the storage was unavailable would be trained again."""
    location = f"{bucket.url}/run"
    folder = WorkDir(location).download()
    write_files(folder, settings="1")
    WorkDir(location).publish()
    write_files(folder, checkpoints__later__state="1")
    assert (WorkDir(location).download() / "checkpoints/later/state.json").exists()


def test_a_copy_that_is_older_is_updated(bucket: S3, elsewhere: Callable[[], None], tmp_path: Path) -> None:
    """A machine that returns would continue from its own old checkpoint, and overwrite the newer ones."""
    location = f"{bucket.url}/run"
    first = WorkDir(location).download()
    write_files(first, settings="1", checkpoints__one__state="1")
    WorkDir(location).publish()
    elsewhere()
    second = WorkDir(location).download()
    shutil.rmtree(second / "checkpoints/one")
    write_files(second, checkpoints__two__state="2")
    WorkDir(location).publish()
    os.environ["NEWSBERT_CACHE"] = str(tmp_path / "cache")
    WorkDir(location).download()
    assert [path.name for path in (first / "checkpoints").iterdir()] == ["two"]


def test_a_process_that_was_replaced_cannot_write(bucket: S3, elsewhere: Callable[[], None]) -> None:
    """A process that the cluster thinks dead would mix its checkpoints into its successor's."""
    location = f"{bucket.url}/run"
    folder = WorkDir(location).download()
    write_files(folder, settings="1")
    WorkDir(location).publish()
    before = os.environ["NEWSBERT_CACHE"]
    elsewhere()
    WorkDir(location).download()
    os.environ["NEWSBERT_CACHE"] = before
    write_files(folder, settings="22")
    with pytest.raises(StorageError, match="another process has begun to write there"):
        WorkDir(location).publish()
    assert Remote(location).read("settings.json") == b"1"


def test_only_small_files_of_a_finished_run_are_downloaded(bucket: S3, elsewhere: Callable[[], None]) -> None:
    """ "Already finished" would be printed after a download of gigabytes."""
    location = f"{bucket.url}/run"
    write_files(WorkDir(location).download(), record="1", student__top="1", checkpoints__one__state="1")
    WorkDir(location).publish()
    elsewhere()
    folder = WorkDir(location).download()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["record.json"]


def test_a_folder_with_other_files_is_refused(bucket: S3) -> None:
    """A wrong --out would be downloaded whole, and a run mixed into it."""
    Remote(f"{bucket.url}/photos").write("cat.jpg", b"1")
    with pytest.raises(StorageError, match=r"photos: holds other files; give an empty or new folder"):
        WorkDir(f"{bucket.url}/photos").download(markers=("settings.json",))


def test_a_trials_small_files_are_collected_by_the_driver(bucket: S3, elsewhere: Callable[[], None]) -> None:
    """The driver would not know a trial's result, or would delete files that it wrote itself."""
    location = f"{bucket.url}/sweep"
    write_files(WorkDir(location).download(), sweep="1")
    WorkDir(location).publish()
    driver = os.environ["NEWSBERT_CACHE"]
    elsewhere()
    trial = f"{location}/trials/a=1"
    write_files(WorkDir(trial).download(), record="1", student__top="1")
    WorkDir(trial).publish()
    WorkDir(trial).discard()
    assert not WorkDir(trial).path.exists()
    os.environ["NEWSBERT_CACHE"] = driver
    folder = WorkDir(location).path
    write_files(folder, trials__a="driver's")
    write_files(folder / "trials/a=1", stopped="1")
    WorkDir(location).collect("trials/a=1")
    WorkDir(location).publish()
    assert (folder / "trials/a=1/record.json").read_text() == "1"
    assert not (folder / "trials/a=1/student").exists()
    WorkDir(location).remove("trials/a=1/student")
    left = {"sweep.json", "trials/a.json", "trials/a=1/record.json", "trials/a=1/stopped.json"}
    assert Remote(location).files().keys() == left


def test_inputs_are_fetched_once_and_again_when_they_change(bucket: S3) -> None:
    """Each trial would download the shards; or none would notice that they were prepared anew."""
    location = f"{bucket.url}/shards"
    Remote(location).write("train/0.parquet", b"1")
    first = fetch(location)
    (first / "mark").touch()
    assert (fetch(location) / "mark").exists()
    Remote(location).write("train/0.parquet", b"22")
    second = fetch(location)
    assert (second / "train/0.parquet").read_bytes() == b"22"
    assert (first / "train/0.parquet").read_bytes() == b"1"
    with pytest.raises(StorageError, match=r"nowhere: nothing there"):
        fetch(f"{bucket.url}/nowhere")


def test_check_writable(bucket: S3, tmp_path: Path) -> None:
    """A sweep would find out after its first trial that nothing can be written."""
    for location in (f"{bucket.url}/run", str(tmp_path / "new")):
        WorkDir(location).check_writable()
    assert Remote(f"{bucket.url}/run").files() == {}
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(StorageError, match="cannot be written"):
        WorkDir("/proc/here").check_writable()


def test_only_this_user_may_read_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somebody else on the machine could read a corpus, or slip in a checkpoint."""
    monkeypatch.setenv("NEWSBERT_CACHE", str(tmp_path / "copies"))
    assert WorkDir("s3://shelf/run").path.is_relative_to(tmp_path / "copies")
    assert (tmp_path / "copies").stat().st_mode & 0o777 == 0o700


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{path.name}.{name}": tensor
        for path in sorted((folder / "student").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _put(folder: Path, location: str) -> None:
    """Upload a folder by hand."""
    Remote(location).upload(
        folder, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    )


_KILLED = """\
import os, signal, sys
from newsbert_ray.storage import bucket as remote
from newsbert_ray.config import TrainSettings
from newsbert_ray.training.run import train

wanted = sys.argv[2]
put = remote.Remote._put

def killed(self, name, content):
    put(self, name, content)
    if name.startswith(wanted) and name.endswith("weights.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)

remote.Remote._put = killed
train(TrainSettings.model_validate_json(sys.argv[1]), quiet=False)
"""


@pytest.mark.slow
def test_a_run_killed_during_an_upload_ends_with_the_same_weights(
    bucket: S3,
    make_settings: MakeSettings,
    shards: Path,
    tmp_path: Path,
    elsewhere: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A machine that dies during an upload leaves half a checkpoint: the run continues from the one before,
    on any machine, to the same weights."""
    quiet = make_settings(out=str(tmp_path / "undisturbed"))
    train(quiet, quiet=True)
    _put(shards, f"{bucket.url}/shards")
    settings = make_settings(out=f"{bucket.url}/run", data=f"{bucket.url}/shards")
    second = f"checkpoints/step-{2 * _steps(quiet) // 2:09d}"
    command = [sys.executable, "-c", _KILLED, settings.model_dump_json(), second]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = Remote(settings.out).files()
    assert f"{second}/weights.safetensors" in there
    assert f"{second}/state.json" not in there
    elsewhere()
    monkeypatch.setattr(bucket_module, "WAIT_SECONDS", 1.0)
    record = train(settings)
    assert f"{second} cannot be used" in capsys.readouterr().out
    assert record.settings == settings.model_dump()
    assert json.loads(Remote(settings.out).read("settings.json") or b"")["settings"] == settings.model_dump()
    assert read_record(fetch(settings.out)) == record
    ours, theirs = _weights(fetch(settings.out)), _weights(Path(quiet.out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert train(settings, quiet=True) == record


def _steps(settings: TrainSettings) -> int:
    return read_record(settings.out).steps


def test_another_runs_folder_is_refused_on_a_new_machine(
    bucket: S3, make_settings: MakeSettings, elsewhere: Callable[[], None]
) -> None:
    """A run would continue from another run's checkpoints on a machine that has never seen them."""
    settings = make_settings(out=f"{bucket.url}/run")
    Remote(settings.out).write(
        "settings.json", json.dumps({"settings": settings.model_dump(), "fingerprint": "another"}).encode()
    )
    Remote(settings.out).write("checkpoints/step-000000001/state.json", b"{}")
    with pytest.raises(RunFolderError, match=r"s3://.*/run: holds another run, with shards that have been"):
        train(settings, quiet=True)


def test_all_verbs_work_through_a_bucket(
    bucket: S3, make_settings: MakeSettings, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    """If one verb accepts only paths, the results of the others in a bucket are useless to it."""
    sources = synthesize(tmp_path / "mind", news=200, users=8, topics=3, seed=3)
    shards = f"{bucket.url}/shards"
    _put(sources[0], f"{bucket.url}/mind/{sources[0].name}")
    shutil.make_archive(str(tmp_path / "later"), "zip", sources[1])
    Remote(f"{bucket.url}/mind").upload(tmp_path, ["later.zip"])
    there = [f"{bucket.url}/mind/{sources[0].name}", f"{bucket.url}/mind/later.zip"]
    values = {"source": there, "teacher": "scratch", "out": shards, "workers": 0}
    preparation = build_settings(PrepareSettings, {**values, "scratch": {"vocabulary": 300}})
    lines: list[str] = []
    manifest = prepare(preparation, say=lines.append)
    assert f"{shards} holds the shards" in "\n".join(lines)
    assert {source.folder for source in manifest.sources} == {sources[0].name, "later"}
    elsewhere()
    lines.clear()
    assert prepare(preparation, say=lines.append) == manifest
    assert lines[-1].startswith(f"already prepared: {shards} holds")
    settings = make_settings(out=f"{bucket.url}/run", data=shards, epochs=1, **{"scratch.layers": 2})
    record = train(settings, quiet=True)
    metrics = evaluate(settings.out)
    assert metrics["data"] == shards
    assert metrics["student"]["accuracy"] == pytest.approx(record.metrics["test"]["student"]["accuracy"])
    assert "teacher" in metrics
    page = report([settings.out], out=tmp_path / "report")[0].read_text()
    assert "scratch" in page
    with pytest.raises(RecordError, match=f"{bucket.url}/nowhere: no such folder"):
        report([f"{bucket.url}/nowhere"], out=tmp_path / "report")


def test_a_student_in_a_bucket_can_be_a_teacher(
    bucket: S3, make_settings: MakeSettings, shards: Path
) -> None:
    """Retrieval starts from the student of an earlier run, wherever that run was written."""
    first = make_settings(out=f"{bucket.url}/run", epochs=1, **{"scratch.layers": 2})
    train(first, quiet=True)
    values = {"teacher": f"{bucket.url}/run/student", "out": f"{bucket.url}/second", "epochs": 1}
    record = train(make_settings(**values, **{"student.layers": 1}), quiet=True)
    assert record.settings["teacher"] == f"{bucket.url}/run/student"
    assert record.settings["data"] == str(shards)
