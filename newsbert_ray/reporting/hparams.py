"""TensorBoard's HParams tab of a sweep: what varies, and each trial's settings, metrics and status.

Writes event files beside those of the trials; `tensorboard --logdir OUT/trials` shows them. The names of our
files sort before a trial's own, because TensorBoard reads the files of a run in order and never goes back.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.files import write_bytes
from newsbert_ray.methods import TASKS, TaskName
from newsbert_ray.reporting.figures import short
from newsbert_ray.reporting.sweep_data import Axis

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

_EVENTS = "events.out.tfevents.0000000000"
EXPERIMENT, START, END = f"{_EVENTS}.hparams", f"{_EVENTS}.hparams-start", f"{_EVENTS}.hparams-end"


def logged_metrics(task: TaskName) -> tuple[str, ...]:
    """What every trial logs at each evaluation; a trial without a teacher leaves the teacher's blank."""
    student = (f"validation.student.{metric.name}" for metric in TASKS[task].metrics)
    return (*student, f"validation.teacher.{TASKS[task].primary.name}")


class HParams:
    """Writes a sweep's HParams as its trials start and end.

    An existing file is replaced, so that a resume, or a second end of a trial, makes no second session.
    """

    def __init__(
        self,
        trials: Path,
        axes: Sequence[Axis],
        *,
        seeds: Sequence[int],
        goals: Sequence[str],
        task: TaskName = "topics",
    ) -> None:
        """`trials` is the folder of the sweep's trials; goals that no trial logs are written at its end."""
        self._trials, self._axes, self._seeds = trials, tuple(axes), tuple(seeds)
        self._metrics = tuple(dict.fromkeys((*goals, *logged_metrics(task))))
        self._as_text = {a.name for a in axes if a.values is not None and not _one_type(a.values)}

    def begin(self) -> None:
        """Write which settings vary over which values, and which metrics count."""
        from tensorboard.plugins.hparams import summary_v2 as api

        settings = [api.HParam("seed", api.Discrete([float(seed) for seed in self._seeds]))]
        for axis in self._axes:
            values = [self._plain(axis.name, value) for value in axis.values or ()]
            domain = api.Discrete(values) if values else None
            if axis.low is not None and axis.high is not None:
                domain = api.RealInterval(float(axis.low), float(axis.high))
            settings.append(api.HParam(axis.name, domain))
        metrics = [api.Metric(metric.replace(".", "/"), display_name=metric) for metric in self._metrics]
        _write(self._trials / EXPERIMENT, [api.hparams_config_pb(settings, metrics, time.time())])

    def start(self, trial: str, values: Mapping[str, Any]) -> bool:
        """The trial in folder `trial` runs, with these varied settings and `seed`; False, and nothing is
        written, as long as it has not written its settings."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        settings = self._trials / trial / "settings.json"
        if not settings.exists():
            return False
        plain = {name: self._plain(name, value) for name, value in values.items()}
        events = self._trials / trial / "tensorboard"
        (events / END).unlink(missing_ok=True)
        _write(events / START, [hparams_pb(plain, trial, settings.stat().st_mtime)])
        return True

    def end(
        self, trial: str, values: Mapping[str, Any], *, ok: bool, numbers: Mapping[str, float] | None = None
    ) -> bool:
        """The trial has ended (`ok`: finished or stopped early), whether or not `start` was called; `numbers`
        are its goals by metric. False for a trial that never had a folder; nothing is written."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        if not self.start(trial, values):
            return False
        status = api_pb2.STATUS_SUCCESS if ok else api_pb2.STATUS_FAILURE
        info = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=time.time()))
        tag, of_session = metadata.SESSION_END_INFO_TAG, metadata.create_summary_metadata(info)
        written = [Summary.Value(tag=tag, metadata=of_session, tensor=metadata.NULL_TENSOR)]
        ends = {name: value for name, value in (numbers or {}).items() if not name.startswith("validation.")}
        written += [Summary.Value(tag=n.replace(".", "/"), simple_value=value) for n, value in ends.items()]
        _write(self._trials / trial / "tensorboard" / END, [Summary(value=[value]) for value in written])
        return True

    def _plain(self, name: str, value: Any) -> bool | float | str:
        """`value` as the tab can hold it: null, and every value of a setting of several types, as text."""
        if value is None or name in self._as_text:
            return short(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number else value


def _one_type(values: Sequence[Any]) -> bool:
    """Whether all are bools, all numbers, or all strings."""
    types = {float if type(value) is int else type(value) for value in values}
    return len(types) == 1 and type(None) not in types


def _write(path: Path, summaries: Sequence[Summary]) -> None:
    """Write an event file in one step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer, now = io.BytesIO(), time.time()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for summary in summaries:
        writer.write(Event(wall_time=now, summary=summary).SerializeToString())
    write_bytes(path, buffer.getvalue())
