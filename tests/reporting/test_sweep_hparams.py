"""TensorBoard's HParams tab, read by TensorBoard's own backend."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from torch.utils.tensorboard import SummaryWriter

from newsbert_ray.methods import TASKS
from newsbert_ray.reporting.sweep_data import Axis, State, Trial
from newsbert_ray.reporting.sweep_page import HParams

AXES = (
    Axis(name="distill.beta", low=0.0, high=0.3),
    Axis(name="student.layers", values=(1, 2)),
    Axis(name="optimizer.decay", values=("linear", "cosine")),
    Axis(name="model.teacher_layers", values=(None, 4)),
    Axis(name="distill.soft_label_t2", values=(False, True)),
)
POINT = {
    "distill.beta": 0.1,
    "student.layers": 2,
    "optimizer.decay": "cosine",
    "model.teacher_layers": None,
    "distill.soft_label_t2": True,
}


def _trial(name: str, state: State = "finished", *values: float) -> Trial:
    return Trial(name, POINT, 1, state, values=values)


GOALS = ("validation.student.accuracy", "speed.student_titles_per_second")
ACCURACY = "validation/student/accuracy"


class _Tab:
    """What the tab would ask and get."""

    def __init__(self, logdir: Path) -> None:
        runs = EventMultiplexer()
        runs.AddRunsFromDirectory(str(logdir))
        runs.Reload()
        provider = MultiplexerDataProvider(runs, str(logdir))
        self.backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
        self.request = context.RequestContext()

    def experiment(self) -> Any:
        asked = api_pb2.GetExperimentRequest()
        return get_experiment.Handler(self.request, self.backend, "", asked).run()

    def sessions(self) -> dict[str, Any]:
        """Session groups by name."""
        asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=[0, 1, 2, 3])
        found = list_session_groups.Handler(self.request, self.backend, "", asked).run()
        assert len({group.name for group in found.session_groups}) == len(found.session_groups)
        return {group.name: group for group in found.session_groups}


def _numbers(group: Any) -> dict[str, float]:
    return {value.name.tag: value.value for value in group.metric_values}


def _values(group: Any) -> dict[str, Any]:
    return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in group.hparams.items()}


@pytest.fixture
def hparams(tmp_path: Path) -> HParams:
    """Of two seeds and two goals."""
    return HParams(tmp_path, AXES, seeds=(0, 1), goals=GOALS, task=TASKS["topics"])


def _train(folder: Path, values: Mapping[int, float]) -> None:
    """What a trial leaves: its settings, and its scalars as the journal logs them."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text("{}")
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for step, value in values.items():
            board.add_scalar(ACCURACY, value, step)


def test_tab_has_domains_and_metrics(hparams: HParams, tmp_path: Path) -> None:
    """Without domains the tab cannot filter; without metrics it shows settings only."""
    experiment = _Tab(tmp_path).experiment()
    found = {info.name: info for info in experiment.hparam_infos}
    assert set(found) == {*POINT, "seed"}
    assert (
        found["distill.beta"].domain_interval.min_value,
        found["distill.beta"].domain_interval.max_value,
    ) == (
        0.0,
        0.3,
    )
    domains = {name: list(info.domain_discrete) for name, info in found.items()}
    assert domains["student.layers"] == [1, 2]
    assert domains["optimizer.decay"] == ["cosine", "linear"]
    assert domains["model.teacher_layers"] == ["4", "none"]
    assert domains["distill.soft_label_t2"] == [False, True]
    assert domains["seed"] == [0, 1]
    assert [info.name.tag for info in experiment.metric_infos] == [
        ACCURACY,
        "speed/student_titles_per_second",
        "validation/student/macro_f1",
        "validation/teacher/accuracy",
    ]


def test_trial_is_a_session_with_settings_and_last_values(hparams: HParams, tmp_path: Path) -> None:
    """The tab is empty where a trial's session and its scalars are not in one run."""
    _train(tmp_path / "a,seed=1", {1: 0.5, 2: 0.75})
    assert hparams.end(_trial("a,seed=1", "finished", 0.7, 900.0))
    (group,) = _Tab(tmp_path).sessions().values()
    assert group.name == "a,seed=1"
    assert _values(group) == {**POINT, "model.teacher_layers": "none", "seed": 1}
    assert _numbers(group) == pytest.approx({ACCURACY: 0.75, "speed/student_titles_per_second": 900.0})
    (session,) = group.sessions
    assert session.status == api_pb2.STATUS_SUCCESS
    assert session.end_time_secs >= session.start_time_secs > 0


def test_status_is_shown(hparams: HParams, tmp_path: Path) -> None:
    """A failed trial must not look like a success, nor a running one like a failure."""
    for name in ("runs", "failed"):
        _train(tmp_path / name, {1: 0.5})
    assert hparams.start(_trial("runs"))
    assert hparams.end(_trial("failed", "failed"))
    status = {name: group.sessions[0].status for name, group in _Tab(tmp_path).sessions().items()}
    assert status == {"runs": api_pb2.STATUS_UNKNOWN, "failed": api_pb2.STATUS_FAILURE}


def test_resume_makes_no_second_session(hparams: HParams, tmp_path: Path) -> None:
    """A trial that failed, was repeated and finished appears once, as finished."""
    _train(tmp_path / "a", {1: 0.5})
    hparams.end(_trial("a", "failed"))
    again = HParams(tmp_path, AXES, seeds=(0, 1), goals=GOALS, task=TASKS["topics"])
    again.start(_trial("a"))
    assert _Tab(tmp_path).sessions()["a"].sessions[0].status == api_pb2.STATUS_UNKNOWN
    time.sleep(1)  # event files of one second are read in the order of their numbers as text, 10 before 9
    _train(tmp_path / "a", {2: 0.9})
    again.end(_trial("a"))
    again.end(_trial("a"))
    (group,) = _Tab(tmp_path).sessions().values()
    assert [session.status for session in group.sessions] == [api_pb2.STATUS_SUCCESS]
    assert _numbers(group)[ACCURACY] == pytest.approx(0.9)
    assert len(_Tab(tmp_path).experiment().hparam_infos) == len(POINT) + 1


def test_inactive_setting_stays_blank(hparams: HParams, tmp_path: Path) -> None:
    """A conditional setting has no value where its condition does not hold."""
    _train(tmp_path / "a", {1: 0.5})
    hparams.end(Trial("a", {"student.layers": 1}, 0, "stopped"))
    assert _values(_Tab(tmp_path).sessions()["a"]) == {"student.layers": 1, "seed": 0}


def test_trial_without_a_folder_gets_none(hparams: HParams, tmp_path: Path) -> None:
    """The trial would refuse a folder that somebody else made."""
    assert not hparams.start(_trial("a"))
    assert not hparams.end(_trial("a", "failed"))
    assert [path.name for path in tmp_path.iterdir()] == ["events.out.tfevents.0000000000.hparams"]


def test_metrics_are_those_of_the_task(tmp_path: Path) -> None:
    """Columns of another task's metrics would all be blank."""
    HParams(tmp_path, AXES, seeds=(0,), goals=(), task=TASKS["retrieval"])
    names = [info.name.tag for info in _Tab(tmp_path).experiment().metric_infos]
    assert names == ["validation/student/auc", "validation/teacher/auc"]
