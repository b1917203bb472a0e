"""Remote files, retries and the lease of a folder, against a real S3 server on the loopback."""

from __future__ import annotations

import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from newsbert_ray.storage import bucket as bucket_module
from newsbert_ray.storage.bucket import Remote, StorageError
from newsbert_ray.storage.workdir import WorkDir, fetch, open_workdir
from tests.storage.conftest import write_files

if TYPE_CHECKING:
    from tests.conftest import S3


@pytest.mark.slow
def test_an_outage_is_retried(bucket: S3, caplog: pytest.LogCaptureFixture) -> None:
    """A storage that is unavailable for a minute would end a run of a day."""
    location = f"{bucket.url}/run"
    folder = WorkDir(location).download()
    write_files(folder, settings="1", a="1", b="1")
    bucket.stop()
    back = threading.Timer(8.0, bucket.start)  # the S3 client itself tries for 6 s
    back.start()
    with caplog.at_level(logging.WARNING, logger="newsbert_ray"):
        WorkDir(location).publish()
    back.join()
    assert Remote(location).files().keys() == {"settings.json", "a.json", "b.json"}
    away, again = [r.message for r in caplog.records if r.name == "newsbert_ray.storage.bucket"]
    assert "the storage is unavailable" in away
    assert "the storage is back after" in again


@pytest.mark.slow
def test_a_long_outage_ends_with_a_message(bucket: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for ever holds its machines for ever."""
    monkeypatch.setenv("NEWSBERT_STORAGE_PATIENCE", "0")
    bucket.stop()
    try:
        with pytest.raises(
            StorageError, match=rf"{bucket.url}/run: the storage has been unavailable .* once it is back"
        ):
            WorkDir(f"{bucket.url}/run").download()
    finally:
        bucket.start()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("s3://no-such-bucket/run", "there is no bucket 'no-such-bucket'; create it"),
        ("s3://KEY:hidden@shelf/run", r"s3://KEY:\*\*\*@shelf/run: a secret in a URL"),
        ("s3://shelf/run?access_key=hidden&region=x", r"access_key=\*\*\*&region=x: a secret in a URL"),
        ("nfs://shelf/run", "nfs://shelf/run: cannot be opened"),
    ],
)
def test_an_impossible_url_is_refused_at_once(bucket: S3, location: str, message: str) -> None:
    """A typing error would be retried like an outage; a secret would be printed."""
    began = time.monotonic()
    with pytest.raises(StorageError, match=message) as caught:
        WorkDir(location).download()
    assert time.monotonic() - began < 5
    assert "hidden" not in str(caught.value)


def test_missing_permission_is_reported_at_once(bucket: S3) -> None:
    """Wrong credentials would be retried like an outage."""
    address = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"

    def ask_for_keys(after: str) -> None:
        request = urllib.request.Request(
            address, after.encode(), {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(request).close()

    url = f"{bucket.url}/run"
    ask_for_keys("0")
    began = time.monotonic()
    try:
        for action in (WorkDir(url).download, WorkDir(url).check_writable, lambda: fetch(url)):
            with pytest.raises(StorageError, match=r"not permitted .*; give credentials that may"):
                action()
    finally:
        ask_for_keys("inf")
    assert time.monotonic() - began < 5


def test_only_one_process_works_in_a_folder(
    bucket: S3, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that train into one folder leave a mixture of both."""
    location = f"{bucket.url}/run"
    monkeypatch.setattr(bucket_module, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(bucket_module, "WAIT_SECONDS", 4.0)
    with open_workdir(location, markers=()):
        with (
            pytest.raises(StorageError, match="another process works in it"),
            open_workdir(location, markers=()),
        ):
            pass
        elsewhere()
        with (
            pytest.raises(StorageError, match="another process works in it"),
            open_workdir(location, markers=()),
        ):
            pass
    with open_workdir(location, markers=()):
        pass


def test_a_killed_process_releases_the_folder(
    bucket: S3, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process would hold its folder for ever; its own machine knows at once that it is dead."""
    location = f"{bucket.url}/run"
    Remote(location).write(bucket_module.LEASE, b'{"holder": "killed", "beat": 3}')
    monkeypatch.setattr(bucket_module, "WAIT_SECONDS", 1.0)
    began = time.monotonic()
    with open_workdir(location, markers=()):
        assert 1.0 < time.monotonic() - began < 5
        holder = Remote(location).read(bucket_module.LEASE)
    assert holder is not None
    Remote(location).write(bucket_module.LEASE, holder)
    monkeypatch.setattr(bucket_module, "WAIT_SECONDS", 60.0)
    began = time.monotonic()
    with open_workdir(location, markers=()):
        pass
    assert time.monotonic() - began < 5
