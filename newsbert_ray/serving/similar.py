"""`newsbert-ray similar`: from embedded news, the texts that are like one, or what a user would read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from newsbert_ray.config import SettingsError
from newsbert_ray.data.mind import Impression, parse_behaviors
from newsbert_ray.data.sources import BadLine
from newsbert_ray.model.heads import ClickHead
from newsbert_ray.serving.embed import Embedded, read_embedded
from newsbert_ray.serving.predictor import TextEncoder, load_encoder, weights_hash
from newsbert_ray.storage.workdir import download_input, fetch

Floats = npt.NDArray[np.float32]


class Found(NamedTuple):
    """A text that was found; `score` is the cosine, or of a user the click score."""

    score: float
    name: str
    text: str


class Answer(NamedTuple):
    """What was asked for, in words, the texts that it was asked by, and what was found, best first."""

    question: str
    given: list[str]
    found: list[Found]


def similar(
    vectors: str | Path,
    *,
    to: str | None = None,
    read: Sequence[str] = (),
    user: str | None = None,
    behaviors: str | Path | None = None,
    run: str | Path | None = None,
    top: int = 10,
) -> Answer:
    """Texts among `vectors` that are like one, or those that a user would read.

    Arguments, result and errors are those of `newsbert_ray.similar`.
    """
    if sum(map(bool, (to, read, user))) != 1:
        raise SettingsError("give one of: --to ID_OR_TEXT, --read ID ID ..., --user USER --behaviors FILE")
    known = read_embedded(vectors)
    places = {name: place for place, name in enumerate(known.names)}
    if to is not None:
        if to in places:
            given, vector, left = [known.texts[places[to]]], known.embeddings[places[to]], {places[to]}
        else:
            given, vector, left = [to], _encoder(known, run).encode([to])[0], set()
        return Answer(f"like {to}", given, _best(_cosines(known.embeddings, vector), known, left, top))
    clicked = list(read) if user is None else _history(user, behaviors)
    rows = [places[name] for name in clicked if name in places]
    if not rows:
        raise SettingsError(f"none of the {len(clicked)} texts that were read is among these vectors")
    scores, how = _user_scores(known, rows, run)
    question = f"{user or 'a user'} who read {len(rows)} of these ({how})"
    return Answer(question, [known.texts[row] for row in rows], _best(scores, known, set(rows), top))


def _user_scores(known: Embedded, rows: Sequence[int], run: str | Path | None) -> tuple[Floats, str]:
    """Of every text for a user who read some, and how they were made."""
    chosen = known.embeddings[list(rows)]
    if known.described.get("task") != "recommendation":
        unit = chosen / np.linalg.norm(chosen, axis=1, keepdims=True)
        return _cosines(known.embeddings, unit.mean(0)), "cosine to their mean: the model learned no clicks"
    head = cast("ClickHead", _encoder(known, run).top.head)
    with torch.inference_mode():
        users = head.encode_users(torch.from_numpy(chosen)[None], torch.ones(1, len(rows)))
    vector = users[0].numpy()
    scores: Floats = known.embeddings @ vector
    return scores, "click score"


def _cosines(embeddings: Floats, vector: Floats) -> Floats:
    norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(vector)
    cosines: Floats = embeddings @ vector / np.maximum(norms, np.finfo(np.float32).tiny)
    return cosines


def _best(scores: Floats, known: Embedded, left: set[int], top: int) -> list[Found]:
    """The first of each text, best first; equal texts of other ids come once."""
    found: dict[str, Found] = {}
    seen = {known.texts[row] for row in left}
    for row in np.argsort(-scores, kind="stable").tolist():
        text = known.texts[row]
        if row not in left and text not in seen and text not in found:
            found[text] = Found(float(scores[row]), known.names[row], text)
        if len(found) == top:
            break
    return list(found.values())


def _encoder(known: Embedded, run: str | Path | None) -> TextEncoder:
    place: Any = run or known.described.get("run")
    folder = fetch(place) / "student" if place else Path()
    if not place or not folder.is_dir():
        raise SettingsError(f"the run that embedded these is not at {place}; give --run")
    if weights_hash(folder) != known.described["model_sha256"]:
        raise SettingsError(
            f"the student of {place} is not the one that embedded these; embed the texts anew"
        )
    return load_encoder(folder)


def _history(user: str, behaviors: str | Path | None) -> list[str]:
    """What a user of behaviors.tsv had read by the last of their impressions there."""
    if behaviors is None:
        raise SettingsError(f"--user {user}: give --behaviors, a behaviors.tsv with this user's impressions")
    last: Impression | None = None
    with Path(download_input(str(behaviors))).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if f"\t{user}\t" not in line:
                continue
            try:
                found = parse_behaviors(line.rstrip("\r\n"))
            except BadLine:
                continue
            if found.user_id == user and (last is None or found.time >= last.time):
                last = found
    if last is None:
        raise SettingsError(f"--user {user}: no impression of this user in {behaviors}")
    return last.history
