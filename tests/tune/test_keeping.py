"""What a sweep leaves on the disk: bounded, and the best are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import Memory
from newsbert_ray.tune.trials import Jobs, Keeper, pareto_front

WriteSpace = Callable[..., Path]


def test_checkpoints_go_with_their_trial_and_students_of_the_best_stay(
    write_space: WriteSpace, tmp_path: Path
) -> None:
    """A sweep of hundreds of trials fills the disk; or the best model is the one that was removed."""
    space = read_space(write_space(**{"seeds: [0]": "seeds: [0]\nkeep_students: 2"}))
    jobs = Jobs(space, Memory(space, tmp_path), tmp_path)
    keeper = Keeper(jobs, slots=2, keep=1)
    folders = []
    for value in (0.2, 0.4, 0.1, 0.3):
        job = jobs.next_job()
        assert job is not None
        for name, size in (("checkpoints/step-1", 3000), ("checkpoints/best-1", 1000), ("student", 500)):
            (job.out / name).mkdir(parents=True)
            (job.out / name / "weights").write_bytes(bytes(size))
        keeper.reported(job)
        jobs.finish(job, values=(value,))
        keeper.ended(job)
        folders.append(job.out)
    assert [(folder / "student").exists() for folder in folders] == [False, True, False, True]
    assert not any((folder / "checkpoints").exists() for folder in folders)
    assert keeper.bound == 2 * 2 * 4000
    assert keeper.line() == (
        "disk: checkpoints 0 B now, at most 16 kB while it ran (2 trials at once); 2 students kept, 1 kB "
        "(keep_students: 2)"
    )


def test_the_pareto_front_is_what_nothing_beats() -> None:
    """A slower and worse student is offered as a choice, or one of two equals vanishes."""
    assert pareto_front([(1.0, 5.0), (2.0, 4.0), (0.5, 4.5), (2.0, 3.0), (1.0, 5.0)]) == [0, 1, 4]
