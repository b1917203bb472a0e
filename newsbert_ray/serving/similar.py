"""`newsbert-ray similar`: the embedded texts that are like a given one, or that a user would read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from newsbert_ray.config import SettingsError
from newsbert_ray.data.mind import Impression, parse_behaviors
from newsbert_ray.data.sources import BadLine
from newsbert_ray.serving.embed import Embedded, read_embedded
from newsbert_ray.serving.predictor import (
    NOT_NEEDED,
    Floats,
    Predictor,
    cosine_to_mean,
    cosines,
    load_predictor,
    weights_hash,
)
from newsbert_ray.storage.workdir import fetch


class Match(NamedTuple):
    """A text, its id, and its score: a cosine, or the click score for a user."""

    score: float
    name: str
    text: str


class Answer(NamedTuple):
    """The query in words, the texts that it consists of, and the matches, best first."""

    question: str
    query: list[str]
    matches: list[Match]


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
    """The verb `similar`. Arguments, result and errors are those of `newsbert_ray.similar`."""
    if sum(map(bool, (to, read, user))) != 1:
        raise SettingsError("give one of: --to ID_OR_TEXT, --read ID ID ..., --user USER --behaviors FILE")
    embedded = read_embedded(vectors)
    indices = {name: index for index, name in enumerate(embedded.names)}
    if to is not None:
        if to in indices:
            rows = [indices[to]]
            query, vector = [embedded.texts[rows[0]]], embedded.embeddings[rows[0]]
        else:
            rows, query, vector = [], [to], _load_student(embedded, run).embed([to])[0]
        scores = cosines(embedded.embeddings, vector)
        return Answer(f"like {to}", query, _best_matches(scores, embedded, set(rows), top))
    clicked = list(read) if user is None else _read_history(user, behaviors)
    rows = [indices[name] for name in clicked if name in indices]
    if not rows:
        raise SettingsError(f"none of the {len(clicked)} texts that were read is among these embeddings")
    history = embedded.embeddings[rows]
    if embedded.description.get("task") == "recommendation":
        kind = "click score"
        scores = _load_student(embedded, run).user_scores(history, embedded.embeddings)
    else:
        kind = "cosine to their mean: not trained on clicks"
        scores = cosine_to_mean(history, embedded.embeddings)
    question = f"{user or 'a user'} who read {len(rows)} of these ({kind})"
    matches = _best_matches(scores, embedded, set(rows), top)
    return Answer(question, [embedded.texts[row] for row in rows], matches)


def _best_matches(scores: Floats, embedded: Embedded, query: set[int], top: int) -> list[Match]:
    """The texts outside the query, best first; equal texts with other ids appear once."""
    matches: list[Match] = []
    seen = {embedded.texts[row] for row in query}
    for row in np.argsort(-scores, kind="stable").tolist():
        if len(matches) == top:
            break
        text = embedded.texts[row]
        if row not in query and text not in seen:
            seen.add(text)
            matches.append(Match(float(scores[row]), embedded.names[row], text))
    return matches


def _load_student(embedded: Embedded, run: str | Path | None) -> Predictor:
    location = run or embedded.description.get("run")
    student = fetch(location, without=NOT_NEEDED) / "student" if location else Path()
    if not location or not student.is_dir():
        raise SettingsError(f"the run that embedded these texts is not at {location}; give --run")
    if weights_hash(student) != embedded.description["model_sha256"]:
        raise SettingsError(f"the student of {location} did not embed these texts; embed them again")
    return load_predictor(student, device="cpu")


def _read_history(user: str, behaviors: str | Path | None) -> list[str]:
    """What a user of behaviors.tsv had read before the last impression there."""
    if behaviors is None:
        raise SettingsError(f"--user {user}: give --behaviors, a behaviors.tsv with this user's impressions")
    last: Impression | None = None
    with fetch(behaviors).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if f"\t{user}\t" not in line:
                continue
            try:
                impression = parse_behaviors(line.rstrip("\r\n"))
            except BadLine:
                continue
            if impression.user_id == user and (last is None or impression.time >= last.time):
                last = impression
    if last is None:
        raise SettingsError(f"--user {user}: no impression of this user in {behaviors}")
    return last.history
