"""TensorBoard's HParams tab over a sweep's trials: what varied, and each trial's settings and end, beside the
scalars that the trial logs itself. Writes event files; loads TensorBoard's protocol only to write.

`tensorboard --logdir OUT/trials` shows it. Our files sort before a trial's own, because TensorBoard's slower
reader goes through the files of a run in order and never back.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from newsbert_ray.files import write_bytes
from newsbert_ray.methods import TASKS, TaskName
from newsbert_ray.reporting.figures import short

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.api_pb2 import Experiment, HParamInfo
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

_EVENTS = "events.out.tfevents.0000000000"
EXPERIMENT, START, END = f"{_EVENTS}.hparams", f"{_EVENTS}.hparams-start", f"{_EVENTS}.hparams-end"


def logged(task: TaskName) -> tuple[str, ...]:
    """What every trial logs at each evaluation, and the tab shows; one without a teacher leaves its blank."""
    student = (f"validation.student.{metric.name}" for metric in TASKS[task].metrics)
    return (*student, f"validation.teacher.{TASKS[task].primary.name}")


class Axis(Protocol):
    """A varied setting: either `values`, or a range."""

    @property
    def name(self) -> str: ...
    @property
    def values(self) -> tuple[Any, ...] | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


class HParams:
    """Writes a sweep's HParams as its trials start and end. A file that is there already is replaced, so that
    a resume, or a second end of a trial, makes no second session."""

    def __init__(
        self,
        trials: Path,
        axes: Sequence[Axis],
        *,
        seeds: Sequence[int],
        goals: Sequence[str],
        task: TaskName = "topics",
    ) -> None:
        """
        Args:
            trials: folder of the sweep's trials.
            axes: what varies.
            seeds: of each point.
            goals: metrics that the sweep judges by; those that no trial logs are written at its end.
            task: of all trials.
        """
        self._trials = trials
        self._axes = tuple(axes)
        self._seeds = tuple(seeds)
        self._metrics = tuple(dict.fromkeys((*goals, *logged(task))))
        self._worded = {axis.name for axis in axes if axis.values is not None and not _alike(axis.values)}

    def begin(self) -> None:
        """Say what varies over which values, and which numbers count."""
        from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        data = HParamsPluginData(experiment=self._experiment())
        _write(self._trials / EXPERIMENT, [_summary(EXPERIMENT_TAG, data)])

    def start(self, trial: str, values: Mapping[str, Any]) -> bool:
        """The trial `trial` (its folder's name) runs, with these varied settings and `seed`.

        Call it once the trial's own process has begun its folder, at its first report say; until then
        nothing is written, and False is returned.
        """
        from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        settings = self._trials / trial / "settings.json"
        if not settings.exists():
            return False
        info = SessionStartInfo(group_name=trial, start_time_secs=settings.stat().st_mtime)
        for name, value in values.items():
            self._set(info.hparams[name], name, value)
        events = self._trials / trial / "tensorboard"
        (events / END).unlink(missing_ok=True)
        _write(events / START, [_summary(SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))])
        return True

    def end(
        self, trial: str, values: Mapping[str, Any], *, ok: bool, numbers: Mapping[str, float] | None = None
    ) -> bool:
        """The trial has ended; `start` is not needed before.

        Args:
            values: as for `start`.
            ok: it finished, or was stopped early; otherwise it failed.
            numbers: its goals by metric, of a trial that finished.
        Returns:
            False for a trial that never had a folder; nothing is written.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        if not self.start(trial, values):
            return False
        info = SessionEndInfo(status=STATUS_SUCCESS if ok else STATUS_FAILURE, end_time_secs=time.time())
        summaries = [_summary(SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))]
        summaries += [
            Summary(value=[Summary.Value(tag=_tag(metric), simple_value=value)])
            for metric, value in (numbers or {}).items()
            if not metric.startswith("validation.")
        ]
        _write(self._trials / trial / "tensorboard" / END, summaries)
        return True

    def _experiment(self) -> Experiment:
        from tensorboard.plugins.hparams.api_pb2 import (
            DATA_TYPE_FLOAT64,
            Experiment,
            HParamInfo,
            MetricInfo,
            MetricName,
        )

        infos = [self._info(axis) for axis in self._axes]
        seed = HParamInfo(name="seed", type=DATA_TYPE_FLOAT64, differs=len(self._seeds) > 1)
        seed.domain_discrete.extend(self._seeds)
        metrics = [
            MetricInfo(name=MetricName(tag=_tag(metric)), display_name=metric) for metric in self._metrics
        ]
        return Experiment(hparam_infos=[*infos, seed], metric_infos=metrics, time_created_secs=time.time())

    def _info(self, axis: Axis) -> HParamInfo:
        from tensorboard.plugins.hparams.api_pb2 import (
            DATA_TYPE_BOOL,
            DATA_TYPE_FLOAT64,
            DATA_TYPE_STRING,
            HParamInfo,
        )

        info = HParamInfo(name=axis.name, type=DATA_TYPE_FLOAT64, differs=True)
        if axis.values is not None:
            known = [self._plain(axis.name, value) for value in axis.values]
            kinds = {bool: DATA_TYPE_BOOL, str: DATA_TYPE_STRING}
            info.type = kinds.get(type(known[0]), DATA_TYPE_FLOAT64)
            info.domain_discrete.extend(known)
        elif axis.low is not None and axis.high is not None:
            info.domain_interval.min_value = axis.low
            info.domain_interval.max_value = axis.high
        return info

    def _plain(self, name: str, value: Any) -> Any:
        """`value` as the tab can hold it: a setting with `null` or of several kinds becomes words."""
        return short(value) if name in self._worded or value is None else value

    def _set(self, slot: Any, name: str, value: Any) -> None:
        plain = self._plain(name, value)
        if isinstance(plain, bool):
            slot.bool_value = plain
        elif isinstance(plain, int | float):
            slot.number_value = plain
        else:
            slot.string_value = str(plain)


def _alike(values: Sequence[Any]) -> bool:
    """Whether all are truths, all numbers, or all words."""
    kinds = {
        "truth" if isinstance(v, bool) else "number" if isinstance(v, int | float) else type(v)
        for v in values
    }
    return len(kinds) == 1 and type(None) not in kinds


def _tag(metric: str) -> str:
    """A metric as trials log it."""
    return metric.replace(".", "/")


def _summary(tag: str, data: HParamsPluginData) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.metadata import NULL_TENSOR, create_summary_metadata

    value = Summary.Value(tag=tag, metadata=create_summary_metadata(data), tensor=NULL_TENSOR)
    return Summary(value=[value])


def _write(path: Path, summaries: Sequence[Summary]) -> None:
    """An event file, whole or not at all."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    now = time.time()
    for event in (
        Event(wall_time=now, file_version="brain.Event:2"),
        *(Event(wall_time=now, summary=summary) for summary in summaries),
    ):
        writer.write(event.SerializeToString())
    write_bytes(path, buffer.getvalue())
