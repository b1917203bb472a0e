"""The memory of a sweep: no point lost, none twice, whatever killed the process before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.tune.memory import JOURNAL, Memory
from newsbert_ray.tune.space import SearchSpace, point_label
from newsbert_ray.tune.space_file import read_space

WriteSpace = Callable[..., Path]


@pytest.fixture
def grid(write_space: WriteSpace) -> SearchSpace:
    """Four points: beta 0 and 0.2, layers 1 and 2."""
    return read_space(write_space())


@pytest.fixture
def tpe(write_space: WriteSpace) -> SearchSpace:
    """Six points of Optuna's choice."""
    return read_space(
        write_space(
            "name: s\nspace:\n  distill.beta: {float: [0, 0.3]}\n"
            "  distill.temperature: {float: [0.5, 10], log: true}\n"
            "  student.layers: {choice: [1, 2]}\nsearch: {sampler: tpe, trials: 6}\n"
        )
    )


def drain(memory: Memory) -> list[tuple[int, str]]:
    """Number and name of every point that is still due; each is told a value."""
    found: list[tuple[int, str]] = []
    while (due := memory.next_point()) is not None:
        number, point = due
        memory.tell(number, (float(len(found)),))
        found.append((number, point_label(point)))
    return found


def test_a_grid_hands_out_each_point_once_in_order(grid: SearchSpace, tmp_path: Path) -> None:
    """Points of a grid are drawn twice or left out."""
    names = [name for _, name in drain(Memory(grid, tmp_path))]
    assert names == [point_label(point) for point in grid.grid()]
    assert drain(Memory(grid, tmp_path)) == []
    assert len(Memory(grid, tmp_path).ended) == 4


@pytest.mark.parametrize("kind", ["grid", "tpe"])
@pytest.mark.parametrize("told", range(4))
@pytest.mark.parametrize("under_way", range(3))
def test_a_memory_left_at_any_moment_ends_with_every_point_once(
    kind: str, told: int, under_way: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A resume runs a finished point again, forgets one that was under way, or makes the sweep longer."""
    space: SearchSpace = request.getfixturevalue(kind)
    memory = Memory(space, tmp_path)
    seen = []
    for index in range(min(told + under_way, space.points)):
        due = memory.next_point()
        assert due is not None
        seen.append(point_label(due[1]))
        if index < told:
            memory.tell(due[0], (0.5,))
    del memory
    again = Memory(space, tmp_path)
    rest = [name for _, name in drain(again)]
    assert rest[: len(seen[told:])] == seen[told:], "what was under way comes first"
    assert len(again.ended) == space.points
    assert max(Counter(point_label(end.point) for end in again.ended).values()) == 1


def test_a_failed_point_is_due_again_after_a_resume_only(grid: SearchSpace, tmp_path: Path) -> None:
    """A point that failed for want of disk stays lost; or one that always fails keeps a sweep from ending."""
    memory = Memory(grid, tmp_path)
    number, point = memory.next_point() or pytest.fail("no point")
    memory.tell(number, None)
    assert len(drain(memory)) == 3
    assert [name for _, name in drain(Memory(grid, tmp_path))] == [point_label(point)]
    assert drain(Memory(grid, tmp_path)) == []


def test_half_a_line_and_a_lock_left_by_a_kill_are_mended(grid: SearchSpace, tmp_path: Path) -> None:
    """A sweep killed in the midst of a write can never be resumed, or waits half a minute for a dead lock."""
    memory = Memory(grid, tmp_path)
    number, _ = memory.next_point() or pytest.fail("no point")
    memory.tell(number, (0.5,))
    journal = tmp_path / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "work')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)
    assert len(drain(Memory(grid, tmp_path))) == 3


def test_a_resumed_sampler_does_not_draw_its_first_points_again(tpe: SearchSpace, tmp_path: Path) -> None:
    """A resumed search spends its trials on points that it knows."""
    memory = Memory(tpe, tmp_path)
    number, first = memory.next_point() or pytest.fail("no point")
    memory.tell(number, (0.1,))
    _, second = Memory(tpe, tmp_path).next_point() or pytest.fail("no point")
    assert second["distill.beta"] != first["distill.beta"]


def test_the_same_seed_suggests_the_same_points(tpe: SearchSpace, tmp_path: Path) -> None:
    """A sweep cannot be repeated."""
    names = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        names.append(drain(Memory(tpe, folder)))
    assert names[0] == names[1]


def test_the_better_value_wins_in_both_modes(write_space: WriteSpace, tmp_path: Path) -> None:
    """optuna-dashboard and the sampler take the worst point for the best."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    for mode, best in (("max", 3.0), ("min", 0.0)):
        folder = tmp_path / mode
        folder.mkdir()
        space = read_space(write_space(**{"seeds: [0]": f"mode: {mode}"}))
        drain(Memory(space, folder))
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        assert optuna.load_study(study_name="small", storage=storage).best_value == best
