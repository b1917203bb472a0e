"""What the command line prints for results, at 80 columns."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from newsbert_ray.deploy.doctor import Finding
from newsbert_ray.evaluation.evaluate import NewsTitle, RankedCandidate, RankedImpression
from newsbert_ray.evaluation.metrics import TopicRow
from newsbert_ray.screens import VerbError, print_result
from newsbert_ray.serving.embed import Answer, Match


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


NEWS = NewsTitle("N1", "A title [in brackets] that is longer than the column of a table can be", "sports")
IMPRESSIONS = [
    RankedImpression(
        "I1",
        "U1",
        "2019-11-15",
        [NEWS],
        [RankedCandidate(NEWS, 0.25, True), RankedCandidate(NEWS, 0.1, None)],
    )
]
ANSWER = Answer("like N1", [f"text {n}" for n in range(7)], [Match(0.9, "N2", "[bold]another[/bold] title")])
TOPICS = [TopicRow("sports", 1234, 1200, 0.5, None, 0.25, "news")]


def test_results_fit_the_terminal_and_keep_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """Titles are printed as they are, even if they look like markup."""
    print_result("evaluate", IMPRESSIONS, {"show": "U1", "model": "teacher"}, as_json=False)
    print_result("similar", ANSWER, {}, as_json=False)
    print_result("evaluate", TOPICS, {"by_topic": True}, as_json=False)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "ranked by the teacher",
        "unknown",
        "(the last 5 of 7)",
        "[bold]another[/bold]",
        "1,234",
        "50.0",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("verb", "result", "expected"),
    [
        ("similar", ANSWER, {"score": 0.9, "name": "N2", "text": "[bold]another[/bold] title"}),
        ("evaluate", TOPICS, TOPICS[0]._asdict()),
        (
            "doctor",
            [Finding("disk", "ok", "fine")],
            {"topic": "disk", "state": "ok", "message": "fine", "cure": ""},
        ),
    ],
)
def test_json_has_every_field(
    verb: str, result: object, expected: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script reads the same values as a person."""
    print_result(verb, result, {}, as_json=True)
    assert json.loads(capsys.readouterr().out) == [expected]


def test_a_problem_of_the_doctor_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """A script must notice a problem; a person must see its cure."""
    findings = [Finding("disk", "ok", "fine"), Finding("ports", "fix", "8265 is taken", "use another port")]
    with pytest.raises(VerbError, match="1 problem; each has its cure"):
        print_result("doctor", iter(findings), {}, as_json=False)
    assert "cure: use another port" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("best", "failures", "message"),
    [(None, {}, "o: no trial finished"), ("a point", {"beta=0": "why"}, "o: 1 trials failed")],
)
def test_failed_trials_are_a_failure(best: object, failures: dict[str, str], message: str) -> None:
    """A script must not continue with the report of an incomplete sweep."""
    with pytest.raises(VerbError, match=message):
        print_result("sweep", SimpleNamespace(best=best, failures=failures), {"out": "o"}, as_json=False)
