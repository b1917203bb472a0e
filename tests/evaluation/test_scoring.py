"""Scoring both models of a pair, and the pace it measures on the way."""

from __future__ import annotations

import pytest

from newsbert_ray.data.shards import read_manifest
from newsbert_ray.evaluation.encoding import Pace
from newsbert_ray.evaluation.scoring import score_pair
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.training.run import train
from newsbert_ray.world import World
from tests.conftest import MakeSettings


def test_speed_is_titles_over_each_models_own_seconds() -> None:
    """A speed that mixed the models up, or their ratio upside down, would turn the Pareto front around."""
    speed = Pace(titles=600, seconds={"teacher": 3.0, "student": 1.5}).speed
    assert speed == {
        "student_titles_per_second": 400.0,
        "teacher_titles_per_second": 200.0,
        "times_teacher": 2.0,
    }


def test_timing_leaves_the_scores_alone(make_settings: MakeSettings) -> None:
    """A record's metrics are compared bit for bit between runs; a clock may not enter them."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    pair = assemble_pair(settings, manifest)
    pace = Pace()
    found = [
        score_pair(pair, settings, manifest, "test", world=World(), pace=given) for given in (None, pace)
    ]
    assert found[0] == found[1]
    assert pace.titles == manifest.rows("test")
    assert set(pace.seconds) == {"teacher", "student"}
    assert min(pace.seconds.values()) > 0.0


def test_a_record_says_how_fast_its_student_is(make_settings: MakeSettings) -> None:
    """A sweep over quality and speed is judged by these numbers; a deeper teacher is the slower one."""
    sizes = {"layers": 8, "hidden": 64, "heads": 2, "feed_forward": 256}
    settings = make_settings(scratch=sizes, epochs=1, **{"student.layers": 1})
    speed = train(settings, quiet=True).metrics["speed"]
    ratio = speed["student_titles_per_second"] / speed["teacher_titles_per_second"]
    assert speed["times_teacher"] == pytest.approx(ratio)
    assert speed["times_teacher"] > 1.5
