"""What a sweep's trials keep, on disk or in a bucket: checkpoints while they run, students only of the best.
Knows no Ray."""

from __future__ import annotations

from pathlib import Path

from newsbert_ray import storage
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
        self._looked: set[str] = set()
        self._removed: set[str] = set()
        self._left: list[Job] = []

    def reported(self, job: Job) -> None:
        """A trial has just written a checkpoint: its size is looked at, in a bucket once a trial."""
        if storage.is_url(self._jobs.place) and job.name in self._looked:
            return
        self._looked.add(job.name)
        kinds: dict[str, int] = {}
        for name, size in folder_sizes(self._place(job, CHECKPOINTS)).items():
            kind = name.split("-")[0]
            kinds[kind] = max(kinds.get(kind, 0), size)
        self._largest = max(self._largest, sum(kinds.values()))

    def ended(self, job: Job, *, at_rest: bool = True) -> None:
        """Remove what nobody goes on from, and the students that are no longer among the best.

        Args:
            at_rest: nobody writes into the trial's folder any more; otherwise its checkpoints are left alone.
        """
        if storage.is_url(self._jobs.place) and not at_rest:
            self._left.append(job)
        if at_rest:
            storage.remove(self._jobs.place, f"{TRIALS}/{job.name}/{CHECKPOINTS}")
        for name in students(self._jobs)[self._jobs.space.keep_students :]:
            if name not in self._removed:
                storage.remove(self._jobs.place, f"{TRIALS}/{name}/{STUDENT}")
                self._removed.add(name)
        storage.publish(self._jobs.place)

    def settle(self) -> None:
        """All trials are at rest now: checkpoints in the bucket go that were left alone."""
        for job in self._left:
            storage.remove(self._jobs.place, f"{TRIALS}/{job.name}/{CHECKPOINTS}")
        self._left = []

    @property
    def bound(self) -> int:
        """Bytes of checkpoints that all running trials together can have at most: for each its `keep` newest
        and the one being written, with the best model of each."""
        return self.slots * (self._keep + 1) * self._largest

    def line(self) -> str:
        """What stands there, and the bound."""
        files = storage.sizes(storage.join(self._jobs.place, TRIALS))
        now = sum(size for name, size in files.items() if name.split("/")[1:2] == [CHECKPOINTS])
        sizes = [
            sum(size for name, size in files.items() if name.startswith(f"{trial}/{STUDENT}/"))
            for trial in students(self._jobs)
        ]
        kept = [size for size in sizes if size]
        return (
            f"disk: checkpoints {_shown(now)} now, at most {_shown(self.bound)} while it ran ({self.slots} "
            f"trials at once); {len(kept)} students kept, {_shown(sum(kept))} "
            f"(keep_students: {self._jobs.space.keep_students})"
        )

    def _place(self, job: Job, part: str) -> str | Path:
        return storage.join(self._jobs.place, TRIALS, job.name, part)


def students(jobs: Jobs) -> list[str]:
    """The finished trials by name: those of the Pareto front, then by the first goal."""
    ends = [
        (values, point_label(result.point, seed=seed))
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


def folder_sizes(place: str | Path) -> dict[str, int]:
    """Bytes of each folder in `place`, by name."""
    sizes: dict[str, int] = {}
    for name, size in storage.sizes(place).items():
        folder = name.split("/")[0]
        sizes[folder] = sizes.get(folder, 0) + size
    return sizes


def _shown(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
