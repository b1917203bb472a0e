"""What one user read and would be shown: titles of the history, and the candidates in a model's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from newsbert_ray.data.clicks import impressions_of
from newsbert_ray.data.reading import read_impressions
from newsbert_ray.data.shards import Manifest, ShardError, read_shard
from newsbert_ray.evaluation.evaluate import Trained, load_trained, require_recommendation, split_named
from newsbert_ray.evaluation.ranking import encode_rows, score_block


@dataclass(frozen=True)
class Title:
    """A news as a person sees it."""

    news_id: str
    title: str
    category: str


@dataclass(frozen=True)
class Offer:
    """A candidate: its news, score, and whether it was clicked (None: unknown)."""

    news: Title
    score: float
    clicked: bool | None


@dataclass(frozen=True)
class Shown:
    """One impression of a user: what they had read, oldest first, and the candidates, best first."""

    impression_id: str
    user_id: str
    time: str
    history: list[Title]
    offers: list[Offer]


def show(
    run: str | Path,
    user: str,
    *,
    data: str | Path | None = None,
    split: str = "test",
    model: str = "student",
) -> list[Shown]:
    """A user's impressions in a split as a run's model ranks them.

    Args:
        user: a user id of the behaviours.
        model: student or teacher.
    Raises:
        ShardError: the user has no impression in this split; the message names some who have.
        SettingsError: the run does not recommend, or does not keep that model.
    """
    part = split_named(split)
    trained = load_trained(run, data=data)
    require_recommendation(trained.settings, "--show")
    chosen = trained.require(model)
    rows = _rows_of(trained, user, part)
    block = impressions_of(rows, history=trained.settings.recommendation.history)
    named = np.unique(np.concatenate([block.history, block.candidates]))
    news = encode_rows(chosen, trained.folder, trained.manifest, named, place=trained.place)
    scores = score_block(chosen, news, block, place=trained.place)[model]
    titles = read_titles(trained.folder, trained.manifest, named.tolist())
    found = []
    for i in range(len(block)):
        own = slice(int(block.offsets[i]), int(block.offsets[i + 1]))
        read = block.history[block.history_offsets[i] : block.history_offsets[i + 1]]
        offers = [
            Offer(titles[row], score, None if click < 0 else bool(click))
            for row, score, click in zip(
                block.candidates[own].tolist(), scores[own].tolist(), block.clicked[own].tolist(), strict=True
            )
        ]
        found.append(
            Shown(
                impression_id=rows.column("impression_id")[i].as_py(),
                user_id=user,
                time=str(rows.column("time")[i].as_py()),
                history=[titles[row] for row in read.tolist()],
                # As metrics and submissions order them: of equal scores the later candidate comes first.
                offers=sorted(reversed(offers), key=lambda offer: -offer.score),
            )
        )
    return found


def read_titles(folder: Path, manifest: Manifest, wanted: Iterable[int]) -> dict[int, Title]:
    """The news at some rows of the table of texts, by row."""
    rows = np.array(sorted(wanted), np.int64)
    found: dict[int, Title] = {}
    for shard, start in manifest.news:
        inside = rows[(rows >= start) & (rows < start + shard.rows)]
        if len(inside):
            table = read_shard(folder, shard, ["news_id", "title", "category"]).take(pa.array(inside - start))
            columns = (table.column(name).to_pylist() for name in ("news_id", "title", "category"))
            found |= {row: Title(*news) for row, *news in zip(inside.tolist(), *columns, strict=True)}
    return found


def _rows_of(trained: Trained, user: str, split: str) -> pa.Table:
    tables = list(_matching(trained, user, split))
    if tables:
        return pa.concat_tables(tables)
    first, _ = next(read_impressions(trained.folder, trained.manifest, split_named(split), history=1))
    raise ShardError(
        f"user '{user}': no impression in the {split} split; {first.column('user_id')[0].as_py()} has one"
    )


def _matching(trained: Trained, user: str, split: str) -> Iterator[pa.Table]:
    for table, _ in read_impressions(trained.folder, trained.manifest, split_named(split), history=1):
        mine = table.filter(pc.equal(table.column("user_id"), user))
        if mine.num_rows:
            yield mine
