"""optuna-dashboard opens a sweep's memory: the command that every sweep prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna_dashboard import wsgi
from optuna_dashboard._storage_url import get_storage
from werkzeug.test import Client

from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.storage import JOURNAL
from newsbert_ray.tune.study import Memory

WriteSpace = Callable[..., Path]
SPACE = """\
name: shown
settings: {data: nowhere, teacher: scratch}
space:
  distill.beta: {float: [0.0, 0.3]}
search: {trials: 3}
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the dashboard leaves its own page's file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["journal", "database"])
def test_the_dashboard_shows_every_trial(where: str, write_space: WriteSpace, tmp_path: Path) -> None:
    """The link that a sweep prints leads to an error page, or to a study without its early ends."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = f", storage: '{url}'" if where == "database" else ""
    space = read_space(write_space(SPACE.replace("trials: 3", f"trials: 3{storage}")))
    memory = Memory(space, tmp_path, "this one")
    for values, curve, stopped in (
        ((0.5,), [(1.0, 0.3), (2.0, 0.5)], False),
        ((), [(1.0, 0.2)], True),
        (None, [], False),
    ):
        found = memory.next_point()
        assert found is not None
        memory.tell(found[0], values, curve=curve, stopped=stopped)
    opened = get_storage(str(tmp_path / JOURNAL) if where == "journal" else url)
    client = Client(wsgi(opened))
    page = client.get("/dashboard", follow_redirects=True)
    assert (page.status_code, b"<html" in page.data) == (200, True)
    (study,) = json.loads(client.get("/api/studies").data)["study_summaries"]
    assert study["study_name"] == "shown"
    detail = json.loads(client.get(f"/api/studies/{study['study_id']}?after=0").data)
    assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Pruned", "Fail"]
    first = detail["trials"][0]
    assert first["values"] == [0.5]
    assert [value["value"] for value in first["intermediate_values"]] == [0.3, 0.5]
    assert detail["objective_names"] == ["validation.student.accuracy"]
