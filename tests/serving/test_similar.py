"""Texts like a given one, and texts that a user would read, from embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from newsbert_ray.cli import main
from newsbert_ray.config import SettingsError
from newsbert_ray.model.heads import ClickHead
from newsbert_ray.model.saved import load_student
from newsbert_ray.serving.embed import embed, read_embedded, similar
from newsbert_ray.training.run import train

if TYPE_CHECKING:
    from tests.conftest import MakeSettings

POINTS = {"a": (1.0, 0.0), "b": (2.0, 0.2), "c": (0.0, 1.0), "d": (-1.0, 0.0), "e": (2.0, 0.2)}


def vectors(folder: Path, points: Mapping[str, tuple[float, ...]] = POINTS, **described: object) -> Path:
    """Embeddings as `embed` leaves them; e has b's text."""
    folder.mkdir()
    values = np.array(list(points.values()), dtype=np.float32)
    width = values.shape[1]
    table = pa.table(
        {
            "id": list(points),
            "text": [f"text {'b' if name == 'e' else name}" for name in points],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width),
        }
    )
    pq.write_table(table, folder / "part-00000.parquet")
    known = {"state": "whole", "parts": ["part-00000.parquet"], "dimensions": width, "task": "topics"}
    (folder / "embedded.json").write_text(json.dumps(known | described))
    return folder


def names(found: Sequence[tuple[float, str, str]]) -> list[str]:
    """Ids, best first."""
    return [one[1] for one in found]


def test_texts_like_a_text(tmp_path: Path) -> None:
    """By cosine; without the text itself; equal texts once."""
    answer = similar(vectors(tmp_path / "v"), to="a")
    assert answer.query == ["text a"]
    assert names(answer.matches) == ["b", "c", "d"]
    scores = [one.score for one in answer.matches]
    assert scores == pytest.approx([2 / np.hypot(2, 0.2), 0.0, -1.0])
    assert names(similar(tmp_path / "v", to="a", top=1).matches) == ["b"]


def test_user_without_a_click_model(tmp_path: Path) -> None:
    """Cosine to the mean of what was read, as the answer says."""
    answer = similar(vectors(tmp_path / "v"), read=["a", "c", "unknown"])
    assert names(answer.matches) == ["b", "d"]
    assert "cosine to their mean" in answer.question
    assert "who read 2 of these" in answer.question


def test_user_with_a_click_model(make_settings: MakeSettings, tmp_path: Path) -> None:
    """The inner product with the user encoder's output for the last history in behaviors.tsv."""
    settings = make_settings(task="recommendation", epochs=1)
    train(settings, quiet=True)
    rows = [(f"N{n}", f"story {n} of the day") for n in range(12)]
    news = tmp_path / "news.tsv"
    news.write_text("".join(f"{n}\tnews\tx\t{t}\t\thttps://a\t[]\t[]\n" for n, t in rows))
    embed(settings.out, input=[str(news)], out=tmp_path / "v", workers=0, say=lambda _: None)
    behaviors = tmp_path / "behaviors.tsv"
    behaviors.write_text(
        "1\tU1\t11/11/2019 9:00:00 AM\tN1\tN2-1 N3-0\n"
        "2\tU1\t11/12/2019 9:00:00 AM\tN1 N2 N5\tN4-1 N3-0\n"
        "3\tU2\t11/13/2019 9:00:00 AM\tN7\tN4-1 N3-0\n"
    )
    answer = similar(tmp_path / "v", user="U1", behaviors=behaviors, top=20)
    assert answer.query == ["story 1 of the day", "story 2 of the day", "story 5 of the day"]
    assert not {"N1", "N2", "N5"} & set(names(answer.matches))
    assert len(answer.matches) == 9
    known = read_embedded(tmp_path / "v")
    _, top, _ = load_student(Path(settings.out) / "student")
    with torch.inference_mode():
        history = torch.from_numpy(known.embeddings[[1, 2, 5]])[None]
        user = cast("ClickHead", top.head).encode_users(history, torch.ones(1, 3))[0]
    expected = known.embeddings @ user.numpy()
    for one in answer.matches:
        assert one.score == pytest.approx(float(expected[known.names.index(one.name)]), abs=1e-5)
    assert [one.score for one in answer.matches] == sorted(
        (one.score for one in answer.matches), reverse=True
    )
    same = similar(tmp_path / "v", to="story 3 of the day").matches
    assert same[0].score == pytest.approx(1.0, abs=1e-5)
    other = make_settings(task="recommendation", epochs=1, seed=4, out=str(tmp_path / "other"))
    train(other, quiet=True)
    with pytest.raises(SettingsError, match="did not embed these texts"):
        similar(tmp_path / "v", to="any other text", run=other.out)
    with pytest.raises(SettingsError, match="no impression of this user"):
        similar(tmp_path / "v", user="U9", behaviors=behaviors)
    with pytest.raises(SettingsError, match="give --behaviors"):
        similar(tmp_path / "v", user="U1")


def test_wrong_queries(tmp_path: Path) -> None:
    """None, two, unknown texts, and a run that has moved."""
    folder = vectors(tmp_path / "v", run=str(tmp_path / "gone"))
    for question in ({}, {"to": "a", "read": ["b"]}):
        with pytest.raises(SettingsError, match="give one of"):
            similar(folder, **question)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="none of the 1 texts"):
        similar(folder, read=["unknown"])
    with pytest.raises(SettingsError, match="give --run"):
        similar(folder, to="any other text")


def test_screen_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, JSON for programs."""
    folder = vectors(tmp_path / "v")
    assert main(["similar", str(folder), "--read", "a", "c"]) == 0
    shown = capsys.readouterr().out
    assert "text a" in shown
    assert "0.774" in shown
    assert main(["similar", str(folder), "--to", "a", "--top", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "b"
