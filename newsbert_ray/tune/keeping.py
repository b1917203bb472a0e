"""What a sweep's trials keep on disk: checkpoints while they run, students only of the best. Knows no Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

from newsbert_ray.tune.jobs import TRIALS, Job, Jobs
from newsbert_ray.tune.space import point_label

CHECKPOINTS, STUDENT = "checkpoints", "student"


class Keeper:
    """Tidies up after each trial, and knows how much disk the sweep can come to need at once."""

    def __init__(self, jobs: Jobs, *, slots: int, keep: int) -> None:
        """`slots` trials at once, each keeping its `keep` newest checkpoints."""
        self._jobs = jobs
        self.slots = slots
        self._keep = keep
        self._largest = 0

    def reported(self, job: Job) -> None:
        """A trial has just written a checkpoint: its size is looked at."""
        kinds: dict[str, int] = {}
        for folder in (job.out / CHECKPOINTS).glob("*-*"):
            kind = folder.name.split("-")[0]
            kinds[kind] = max(kinds.get(kind, 0), folder_bytes(folder))
        self._largest = max(self._largest, sum(kinds.values()))

    def ended(self, job: Job, *, at_rest: bool = True) -> None:
        """Remove what nobody goes on from, and the students that are no longer among the best.

        Args:
            at_rest: nobody writes into the trial's folder any more; otherwise its checkpoints are left alone.
        """
        if at_rest:
            shutil.rmtree(job.out / CHECKPOINTS, ignore_errors=True)
        for folder in students(self._jobs)[self._jobs.space.keep_students :]:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def bound(self) -> int:
        """Bytes of checkpoints that all running trials together can have at most: for each its `keep` newest
        and the one being written, with the best model of each."""
        return self.slots * (self._keep + 1) * self._largest

    def line(self) -> str:
        """What stands on the disk, and the bound."""
        now = sum(folder_bytes(path) for path in self._jobs.folder.glob(f"*/*/{CHECKPOINTS}"))
        kept = [folder for folder in students(self._jobs) if folder.exists()]
        return (
            f"disk: checkpoints {_shown(now)} now, at most {_shown(self.bound)} while it ran ({self.slots} "
            f"trials at once); {len(kept)} students kept, {_shown(sum(map(folder_bytes, kept)))} "
            f"(keep_students: {self._jobs.space.keep_students})"
        )


def students(jobs: Jobs) -> list[Path]:
    """The finished trials' student folders: those of the Pareto front, then by the first goal."""
    ends = [
        (values, jobs.folder / TRIALS / point_label(result.point, seed=seed) / STUDENT)
        for result in jobs.results.values()
        for seed, values in result.values.items()
    ]
    signs = [1.0 if goal.mode == "max" else -1.0 for goal in jobs.space.goals]
    signed = [tuple(s * v for s, v in zip(signs, values, strict=True)) for values, _ in ends]
    front = set(pareto_front(signed)) if len(signs) > 1 else set()
    order = sorted(range(len(ends)), key=lambda i: (i not in front, -signed[i][0]))
    return [ends[i][1] for i in order]


def pareto_front(values: list[tuple[float, ...]]) -> list[int]:
    """Indices of the values that no other is at least as good as everywhere and better somewhere; more is
    better."""
    return [
        i
        for i, one in enumerate(values)
        if not any(other != one and all(o >= v for o, v in zip(other, one, strict=True)) for other in values)
    ]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files at or below `folder`; one that vanishes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _shown(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
