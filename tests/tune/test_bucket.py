"""A whole sweep in a bucket, on Ray, against an S3 server on the loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from newsbert_ray.record import RECORD
from newsbert_ray.storage import bucket as lease
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.bucket import Remote
from newsbert_ray.tune import trials as jobs_module
from newsbert_ray.tune.sweep import sweep

if TYPE_CHECKING:
    from tests.conftest import S3

SPACE = """\
name: small
settings:
  data: {data}
  teacher: scratch
  scratch: {{layers: 2, hidden: 16, heads: 2, feed_forward: 32}}
  model.query_size: 8
  student.layers: 1
  learning_rate: 2.0e-3
  epochs: 1
space:
  distill.beta: {{grid: [0.0, 0.2]}}
seeds: [0]
keep_students: 1
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_in_a_bucket_goes_on_on_another_machine(
    bucket: S3,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A head that dies takes its disk along: its trials would be trained again, or counted twice."""
    place = f"{bucket.url}/sweep"
    names = [path.relative_to(shards).as_posix() for path in shards.rglob("*") if path.is_file()]
    Remote(f"{bucket.url}/shards").upload(shards, names)
    (tmp_path / "space.yaml").write_text(SPACE.format(data=f"{bucket.url}/shards"))
    finish = jobs_module.Jobs.finish

    def interrupted(self: jobs_module.Jobs, *args: object, **values: object) -> None:
        finish(self, *args, **values)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(jobs_module.Jobs, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "space.yaml", out=place, concurrency=1)
    assert f"--out {place} --resume" in capsys.readouterr().out
    there = Remote(place).files()
    assert [name.split("/")[1] for name in there if name.endswith(RECORD)] == ["beta=0,seed=0"]
    monkeypatch.setenv("NEWSBERT_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setattr(lease, "WAIT_SECONDS", 1.0)
    result = sweep(tmp_path / "space.yaml", out=place, concurrency=1, resume=True)
    said = capsys.readouterr().out
    assert "1 of them had ended before" in said
    assert "checkpoints 0 B now" in said
    assert "at most 0 B" not in said
    assert result.failures == {}
    assert len([point for point in result.points if point.values]) == 2
    there = Remote(place).files()
    assert {"sweep.json", "optuna.journal", "report/report.html", "events.jsonl"} <= there.keys()
    assert len([name for name in there if name.endswith("student/top.json")]) == 1
    assert not [name for name in there if "/checkpoints/" in name]
    for trial in ("beta=0,seed=0", "beta=0.2,seed=0"):
        record = json.loads(Remote(place).read(f"trials/{trial}/{RECORD}") or b"")
        assert record["settings"]["out"] == f"{place}/trials/{trial}"
        assert record["settings"]["data"] == f"{bucket.url}/shards"
        assert not storage.local(f"{place}/trials/{trial}").exists()
    plan = json.loads(Remote(place).read("sweep.json") or b"")
    assert plan["state"] == "finished"
