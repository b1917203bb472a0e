"""Places in a bucket, against a real S3 server on the loopback."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
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
from newsbert_ray.storage import bucket as lease
from newsbert_ray.storage import inputs
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.bucket import Remote
from newsbert_ray.storage.workdir import StorageError
from newsbert_ray.training.run import RunFolderError, train

if TYPE_CHECKING:
    from tests.conftest import S3, MakeSettings


def _write(folder: Path, **contents: str) -> None:
    """_write(folder, record="{}") writes record.json; __ stands for a slash."""
    for name, content in contents.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, this process is on another machine: it has another cache."""

    def leave() -> None:
        monkeypatch.setenv("NEWSBERT_CACHE", str(tmp_path / "another machine"))

    return leave


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are sent from now on, in order."""
    names: list[str] = []
    upload = Remote.upload

    def noted(self: Remote, folder: Path, given: Any) -> None:
        names.extend(given := sorted(given))
        upload(self, folder, given)

    monkeypatch.setattr(Remote, "upload", noted)
    return names


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_what_is_published_is_brought_elsewhere(
    bucket: S3, tmp_path: Path, elsewhere: Callable[[], None], kind: str
) -> None:
    """A run that only its own machine can go on with is lost with that machine."""
    place = f"{bucket.url}/runs/first" if kind == "s3" else f"file://{tmp_path}/mount/first"
    folder = storage.bring(place)
    _write(folder, settings="1", checkpoints__step__state="22", empty="")
    (folder / ".lock").touch()
    storage.publish(place)
    elsewhere()
    found = storage.bring(place)
    assert found != folder
    files = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert files == {"settings.json", "checkpoints/step/state.json", "empty.json"}
    assert (found / "checkpoints/step/state.json").read_text() == "22"


def test_only_what_has_changed_is_sent(bucket: S3, sent: list[str]) -> None:
    """Every evaluation would cost the upload of all checkpoints that are there."""
    place = f"{bucket.url}/run"
    folder = storage.bring(place)
    _write(folder, a="1", b="1")
    storage.publish(place)
    storage.publish(place)
    assert sent == ["a.json", "b.json"]
    _write(folder, b="22")
    storage.publish(place)
    assert sent == ["a.json", "b.json", "b.json"]


def test_what_is_gone_here_goes_there_and_nothing_else(bucket: S3, elsewhere: Callable[[], None]) -> None:
    """Checkpoints that nobody goes on from fill the bucket; what another machine has written is not ours."""
    place = f"{bucket.url}/run"
    folder = storage.bring(place)
    _write(folder, settings="1", checkpoints__one__state="1", checkpoints__two__state="1")
    storage.publish(place)
    shutil.rmtree(folder / "checkpoints/one")
    Remote(place).write("theirs.json", b"1")
    storage.publish(place)
    assert Remote(place).files().keys() == {"settings.json", "checkpoints/two/state.json", "theirs.json"}


def test_what_names_others_is_sent_last(bucket: S3, sent: list[str]) -> None:
    """A kill between two files leaves a state without its weights, or a record without its student."""
    place = f"{bucket.url}/run"
    folder = storage.bring(place)
    names = ["record", "checkpoints__step-2__state", "checkpoints__best-2__state", "student__top", "settings"]
    _write(folder, **dict.fromkeys(names, "1"))
    (folder / "checkpoints/step-2/weights").write_text("1")
    storage.publish(place)
    assert sent == [
        "settings.json",
        "checkpoints/step-2/weights",
        "student/top.json",
        "checkpoints/best-2/state.json",
        "checkpoints/step-2/state.json",
        "record.json",
    ]


def test_a_copy_that_is_ahead_stays(bucket: S3) -> None:
    """An epoch that ended while the storage was away would be trained again."""
    place = f"{bucket.url}/run"
    folder = storage.bring(place)
    _write(folder, settings="1")
    storage.publish(place)
    _write(folder, checkpoints__later__state="1")
    assert (storage.bring(place) / "checkpoints/later/state.json").exists()


def test_a_copy_that_is_behind_follows(bucket: S3, elsewhere: Callable[[], None], tmp_path: Path) -> None:
    """A machine that comes back would go on from its own old checkpoint, and overwrite the newer ones."""
    place = f"{bucket.url}/run"
    first = storage.bring(place)
    _write(first, settings="1", checkpoints__one__state="1")
    storage.publish(place)
    elsewhere()
    second = storage.bring(place)
    shutil.rmtree(second / "checkpoints/one")
    _write(second, checkpoints__two__state="2")
    storage.publish(place)
    os.environ["NEWSBERT_CACHE"] = str(tmp_path / "cache")
    storage.bring(place)
    assert [path.name for path in (first / "checkpoints").iterdir()] == ["two"]


def test_who_has_been_overtaken_writes_no_more(bucket: S3, elsewhere: Callable[[], None]) -> None:
    """A process that the cluster thinks dead would mix its checkpoints into its successor's."""
    place = f"{bucket.url}/run"
    folder = storage.bring(place)
    _write(folder, settings="1")
    storage.publish(place)
    before = os.environ["NEWSBERT_CACHE"]
    elsewhere()
    storage.bring(place)
    os.environ["NEWSBERT_CACHE"] = before
    _write(folder, settings="22")
    with pytest.raises(StorageError, match="another process has begun to write there"):
        storage.publish(place)
    assert Remote(place).read("settings.json") == b"1"


def test_of_a_finished_run_only_the_small_files_come(bucket: S3, elsewhere: Callable[[], None]) -> None:
    """ "Already finished" would be said after the download of gigabytes."""
    place = f"{bucket.url}/run"
    _write(storage.bring(place), record="1", student__top="1", checkpoints__one__state="1")
    storage.publish(place)
    elsewhere()
    folder = storage.bring(place)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["record.json"]


def test_foreign_files_are_left_alone(bucket: S3) -> None:
    """A wrong --out would be downloaded whole, and a run mixed into it."""
    Remote(f"{bucket.url}/photos").write("cat.jpg", b"1")
    with pytest.raises(StorageError, match=r"photos: holds other files; give an empty or new folder"):
        storage.bring(f"{bucket.url}/photos", marks=("settings.json",))


def test_a_trials_small_files_come_to_the_driver(bucket: S3, elsewhere: Callable[[], None]) -> None:
    """The driver would not know what a trial has come to, or delete what it wrote itself."""
    place = f"{bucket.url}/sweep"
    _write(storage.bring(place), sweep="1")
    storage.publish(place)
    driver = os.environ["NEWSBERT_CACHE"]
    elsewhere()
    trial = f"{place}/trials/a=1"
    _write(storage.bring(trial), record="1", student__top="1")
    storage.publish(trial)
    storage.discard(trial)
    assert not storage.local(trial).exists()
    os.environ["NEWSBERT_CACHE"] = driver
    folder = storage.local(place)
    _write(folder, trials__a="driver's")
    _write(folder / "trials/a=1", stopped="1")
    storage.collect(place, "trials/a=1")
    storage.publish(place)
    assert (folder / "trials/a=1/record.json").read_text() == "1"
    assert not (folder / "trials/a=1/student").exists()
    storage.remove(place, "trials/a=1/student")
    left = {"sweep.json", "trials/a.json", "trials/a=1/record.json", "trials/a=1/stopped.json"}
    assert Remote(place).files().keys() == left


def test_inputs_are_fetched_once_and_again_when_they_change(bucket: S3) -> None:
    """Each trial would download the shards; or none would notice that they were prepared anew."""
    place = f"{bucket.url}/shards"
    Remote(place).write("train/0.parquet", b"1")
    first = inputs.fetch(place)
    (first / "mark").touch()
    assert (inputs.fetch(place) / "mark").exists()
    Remote(place).write("train/0.parquet", b"22")
    second = inputs.fetch(place)
    assert (second / "train/0.parquet").read_bytes() == b"22"
    assert (first / "train/0.parquet").read_bytes() == b"1"
    with pytest.raises(StorageError, match=r"nowhere: nothing there"):
        inputs.fetch(f"{bucket.url}/nowhere")


def test_an_outage_is_waited_out(bucket: S3, caplog: pytest.LogCaptureFixture) -> None:
    """A storage that is away for a minute would end a run of a day."""
    place = f"{bucket.url}/run"
    folder = storage.bring(place)
    _write(folder, settings="1", a="1", b="1")
    bucket.stop()
    back = threading.Timer(8.0, bucket.start)  # the S3 client itself tries for 6 s
    back.start()
    with caplog.at_level(logging.WARNING, logger="newsbert_ray"):
        storage.publish(place)
    back.join()
    assert Remote(place).files().keys() == {"settings.json", "a.json", "b.json"}
    away, again = [r.message for r in caplog.records if r.name == "newsbert_ray.storage.bucket"]
    assert "the storage is away" in away
    assert "the storage is back after" in again


def test_patience_ends_with_a_message(bucket: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for ever holds its machines for ever."""
    monkeypatch.setenv("NEWSBERT_STORAGE_PATIENCE", "0")
    bucket.stop()
    try:
        with pytest.raises(
            StorageError, match=rf"{bucket.url}/run: the storage has been away .* once it is back"
        ):
            storage.bring(f"{bucket.url}/run")
    finally:
        bucket.start()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://no-such-bucket/run", "there is no bucket 'no-such-bucket'; create it"),
        ("s3://KEY:hidden@shelf/run", r"s3://KEY:\*\*\*@shelf/run: a secret in a URL"),
        ("s3://shelf/run?access_key=hidden&region=x", r"access_key=\*\*\*&region=x: a secret in a URL"),
        ("nfs://shelf/run", "nfs://shelf/run: no place that can be opened"),
    ],
)
def test_a_place_that_cannot_be_is_refused_at_once(bucket: S3, place: str, message: str) -> None:
    """A typing error would be waited for like an outage; a secret would be printed."""
    began = time.monotonic()
    with pytest.raises(StorageError, match=message) as caught:
        storage.bring(place)
    assert time.monotonic() - began < 5
    assert "hidden" not in str(caught.value)


def test_no_permission_is_said_at_once(bucket: S3) -> None:
    """Wrong credentials would be waited for like an outage."""
    address = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"

    def ask_for_keys(after: str) -> None:
        request = urllib.request.Request(
            address, after.encode(), {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(request).close()

    ask_for_keys("0")
    began = time.monotonic()
    try:
        for action in (storage.bring, storage.check_writable, inputs.fetch):
            with pytest.raises(StorageError, match=r"not permitted .*; give credentials that may"):
                action(f"{bucket.url}/run")
    finally:
        ask_for_keys("inf")
    assert time.monotonic() - began < 5


def test_a_place_is_checked_for_writing(bucket: S3, tmp_path: Path) -> None:
    """A sweep would find out after its first trial that nothing can be kept."""
    for place in (f"{bucket.url}/run", str(tmp_path / "new")):
        storage.check_writable(place)
    assert Remote(f"{bucket.url}/run").files() == {}
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(StorageError, match="cannot be written"):
        storage.check_writable("/proc/here")


def test_a_place_is_held_by_one(
    bucket: S3, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that train into one folder leave a mixture of both."""
    place = f"{bucket.url}/run"
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "WAIT_SECONDS", 4.0)
    with storage.working(place, marks=()):
        with (
            pytest.raises(StorageError, match="another process works in it"),
            storage.working(place, marks=()),
        ):
            pass
        elsewhere()
        with (
            pytest.raises(StorageError, match="another process works in it"),
            storage.working(place, marks=()),
        ):
            pass
    with storage.working(place, marks=()):
        pass


def test_a_dead_holder_is_waited_for(
    bucket: S3, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed head would hold its folder for ever; at home the system knows at once that it is dead."""
    place = f"{bucket.url}/run"
    Remote(place).write(lease.LEASE, b'{"holder": "killed", "beat": 3}')
    monkeypatch.setattr(lease, "WAIT_SECONDS", 1.0)
    began = time.monotonic()
    with storage.working(place, marks=()):
        assert 1.0 < time.monotonic() - began < 5
        holder = Remote(place).read(lease.LEASE)
    assert holder is not None
    Remote(place).write(lease.LEASE, holder)
    monkeypatch.setattr(lease, "WAIT_SECONDS", 60.0)
    began = time.monotonic()
    with storage.working(place, marks=()):
        pass
    assert time.monotonic() - began < 5


def test_copies_are_this_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somebody else on the machine could read a corpus, or slip in a checkpoint."""
    monkeypatch.setenv("NEWSBERT_CACHE", str(tmp_path / "copies"))
    assert storage.local("s3://shelf/run").is_relative_to(tmp_path / "copies")
    assert (tmp_path / "copies").stat().st_mode & 0o777 == 0o700


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{path.name}.{name}": tensor
        for path in sorted((folder / "student").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _put(folder: Path, place: str) -> None:
    """Upload a folder by hand."""
    Remote(place).upload(folder, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])


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
def test_a_run_killed_in_mid_upload_ends_as_if_it_had_not_been(
    bucket: S3,
    make_settings: MakeSettings,
    shards: Path,
    tmp_path: Path,
    elsewhere: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A machine that dies in mid-upload leaves half a checkpoint: the run goes on from the one before,
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
    monkeypatch.setattr(lease, "WAIT_SECONDS", 1.0)
    record = train(settings)
    assert f"{second} cannot be used" in capsys.readouterr().out
    assert record.settings == settings.model_dump()
    assert json.loads(Remote(settings.out).read("settings.json") or b"")["settings"] == settings.model_dump()
    assert read_record(inputs.fetch(settings.out)) == record
    ours, theirs = _weights(inputs.fetch(settings.out)), _weights(Path(quiet.out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert train(settings, quiet=True) == record


def _steps(settings: TrainSettings) -> int:
    return read_record(settings.out).steps


def test_a_run_keeps_to_its_settings(
    bucket: S3, make_settings: MakeSettings, elsewhere: Callable[[], None]
) -> None:
    """Another run's checkpoints would be gone on from, on a machine that has never seen them."""
    settings = make_settings(out=f"{bucket.url}/run")
    Remote(settings.out).write(
        "settings.json", json.dumps({"settings": settings.model_dump(), "fingerprint": "another"}).encode()
    )
    with pytest.raises(
        RunFolderError, match=r"s3://.*/run: holds another run \(the shards were prepared anew\)"
    ):
        train(settings, quiet=True)


def test_the_way_from_files_to_a_report_goes_through_a_bucket(
    bucket: S3, make_settings: MakeSettings, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    """One verb that knows only paths, and what another has left in the bucket is of no use."""
    sources = synthesize(tmp_path / "mind", news=200, users=8, topics=3, seed=3)
    shards = f"{bucket.url}/shards"
    _put(sources[0], f"{bucket.url}/mind/{sources[0].name}")
    shutil.make_archive(str(tmp_path / "later"), "zip", sources[1])
    Remote(f"{bucket.url}/mind").upload(tmp_path, ["later.zip"])
    there = [f"{bucket.url}/mind/{sources[0].name}", f"{bucket.url}/mind/later.zip"]
    given = {"source": there, "teacher": "scratch", "out": shards, "workers": 0}
    asked = build_settings(PrepareSettings, {**given, "scratch": {"vocabulary": 300}})
    said: list[str] = []
    manifest = prepare(asked, say=said.append)
    assert f"{shards} holds the shards" in "\n".join(said)
    assert {source.folder for source in manifest.sources} == {sources[0].name, "later"}
    elsewhere()
    said.clear()
    assert prepare(asked, say=said.append) == manifest
    assert said[-1].startswith(f"already prepared: {shards} holds")
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


def test_a_student_in_a_bucket_is_a_teacher(bucket: S3, make_settings: MakeSettings, shards: Path) -> None:
    """Retrieval goes on from an earlier run's student, which lies where that run was told to leave it."""
    first = make_settings(out=f"{bucket.url}/run", epochs=1, **{"scratch.layers": 2})
    train(first, quiet=True)
    values = {"teacher": f"{bucket.url}/run/student", "out": f"{bucket.url}/second", "epochs": 1}
    record = train(make_settings(**values, **{"student.layers": 1}), quiet=True)
    assert record.settings["teacher"] == f"{bucket.url}/run/student"
    assert record.settings["data"] == str(shards)
