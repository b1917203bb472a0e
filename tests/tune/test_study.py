"""The study of a sweep: no point lost, none twice, whatever killed the process before."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna_dashboard import wsgi
from optuna_dashboard._storage_url import get_storage
from werkzeug.test import Client

from newsbert_ray.files import write_text
from newsbert_ray.record import METRICS
from newsbert_ray.reporting.sweep_data import Axis, Goal, point_label, read_curves
from newsbert_ray.tune.space import PointValues, Search, SearchSpace, Stopping
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import (
    JOURNAL,
    EarlyStopping,
    StudyError,
    StudyPoint,
    SweepStudy,
    absolute_storage,
    estimate_saving,
    open_storage,
    shown_storage,
)

if TYPE_CHECKING:
    from optuna import Study


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


CONDITIONAL = """\
name: s
space:
  optimizer.decay: {choice: [none, linear]}
  optimizer.warmup_share: {float: [0, 0.3], when: {optimizer.decay: linear}}
  distill.beta: {float: [0, 0.3]}
  student.layers: {choice: [1, 2, 4]}
start:
  - {optimizer.decay: linear, optimizer.warmup_share: 0.1, distill.beta: 0.1}
  - {optimizer.decay: none, distill.beta: 0.15}
search: {sampler: tpe, trials: 6}
"""


@pytest.fixture
def conditional(write_space: WriteSpace) -> SearchSpace:
    """Six points of Optuna's choice, two of them starting points; a warm-up only where the rate decays."""
    return read_space(write_space(CONDITIONAL))


def drain(study: SweepStudy) -> list[tuple[int, str]]:
    """Number and name of every remaining point; each gets a value."""
    points: list[tuple[int, str]] = []
    while (due := study.next_point()) is not None:
        number, point = due
        study.tell(number, (float(len(points)),))
        points.append((number, point_label(point)))
    return points


def test_a_grid_hands_out_each_point_once_in_order(grid: SearchSpace, tmp_path: Path) -> None:
    """Points of a grid are drawn twice or left out."""
    names = [name for _, name in drain(SweepStudy(grid, tmp_path))]
    assert names == [point_label(point) for point in grid.grid()]
    assert drain(SweepStudy(grid, tmp_path)) == []
    assert len(SweepStudy(grid, tmp_path).ended) == 4


@pytest.mark.parametrize("kind", ["grid", "tpe"])
@pytest.mark.parametrize("told", range(4))
@pytest.mark.parametrize("running", range(3))
def test_an_interrupted_study_runs_every_point_once(
    kind: str, told: int, running: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A resume repeats a finished point, forgets a running one, or makes the sweep longer."""
    space: SearchSpace = request.getfixturevalue(kind)
    study = SweepStudy(space, tmp_path)
    seen = []
    for index in range(min(told + running, space.points)):
        due = study.next_point()
        assert due is not None
        seen.append(point_label(due[1]))
        if index < told:
            study.tell(due[0], (0.5,))
    del study
    again = SweepStudy(space, tmp_path)
    rest = [name for _, name in drain(again)]
    assert rest[: len(seen[told:])] == seen[told:], "what was running comes first"
    assert len(again.ended) == space.points
    assert max(Counter(point_label(end.values) for end in again.ended).values()) == 1


def test_a_failed_point_is_tried_again_only_after_a_resume(grid: SearchSpace, tmp_path: Path) -> None:
    """A point that failed for lack of disk space stays lost; or one that always fails keeps a sweep from
    ending."""
    study = SweepStudy(grid, tmp_path)
    number, point = study.next_point() or pytest.fail("no point")
    study.tell(number, ())
    assert len(drain(study)) == 3
    assert [name for _, name in drain(SweepStudy(grid, tmp_path))] == [point_label(point)]
    assert drain(SweepStudy(grid, tmp_path)) == []


def test_an_incomplete_line_and_a_lock_left_by_a_kill_are_removed(grid: SearchSpace, tmp_path: Path) -> None:
    """A sweep killed during a write can never be resumed, or waits half a minute for a stale lock."""
    study = SweepStudy(grid, tmp_path)
    number, _ = study.next_point() or pytest.fail("no point")
    study.tell(number, (0.5,))
    journal = tmp_path / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "work')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)
    assert len(drain(SweepStudy(grid, tmp_path))) == 3


def test_a_resumed_sampler_does_not_draw_its_first_points_again(tpe: SearchSpace, tmp_path: Path) -> None:
    """A resumed search spends its trials on points it has already tried."""
    study = SweepStudy(tpe, tmp_path)
    number, first = study.next_point() or pytest.fail("no point")
    study.tell(number, (0.1,))
    _, second = SweepStudy(tpe, tmp_path).next_point() or pytest.fail("no point")
    assert second["distill.beta"] != first["distill.beta"]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_suggests_the_same_points(
    sampler: str, write_space: WriteSpace, tmp_path: Path
) -> None:
    """A sweep cannot be repeated; or another seed changes nothing."""
    names = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        space = read_space(
            write_space(CONDITIONAL.replace("tpe, trials: 6", f"{sampler}, trials: 14, seed: {seed}"))
        )
        names.append(drain(SweepStudy(space, tmp_path / folder)))
    assert names[0] == names[1]
    assert names[0] != names[2]


def test_the_better_value_wins_in_both_modes(write_space: WriteSpace, tmp_path: Path) -> None:
    """optuna-dashboard and the sampler take the worst point for the best."""
    for mode, best in (("max", 3.0), ("min", 0.0)):
        folder = tmp_path / mode
        folder.mkdir()
        space = read_space(write_space(**{"seeds: [0]": f"mode: {mode}"}))
        drain(SweepStudy(space, folder))
        assert load(folder, "small").best_value == best


def test_a_point_holds_only_what_varies_there(conditional: SearchSpace, tmp_path: Path) -> None:
    """A trial's name and Optuna contain a warm-up that its schedule does not have."""
    drain(SweepStudy(conditional, tmp_path))
    for end in SweepStudy(conditional, tmp_path).ended:
        assert ("optimizer.warmup_share" in end.values) == (end.values["optimizer.decay"] == "linear")


def test_starting_points_come_first_and_once(conditional: SearchSpace, tmp_path: Path) -> None:
    """The paper's values are tried late, never, or again after each resume."""
    study = SweepStudy(conditional, tmp_path)
    first = study.next_point() or pytest.fail("no point")
    assert first[1].items() >= conditional.start[0].items()
    assert first[1].keys() == {axis.name for axis in conditional.axes}
    again = SweepStudy(conditional, tmp_path)
    assert again.next_point() == first
    _, second = again.next_point() or pytest.fail("no point")
    assert second.items() >= conditional.start[1].items()
    for number in (0, 1):
        again.tell(number, (0.5,))
    betas = [point["distill.beta"] for point in points_left(SweepStudy(conditional, tmp_path))]
    assert len(betas) == 4
    assert not {0.1, 0.15} & set(betas)


def points_left(study: SweepStudy) -> list[PointValues]:
    """Every remaining point."""
    points = []
    while (due := study.next_point()) is not None:
        points.append(due[1])
    return points


def test_a_study_cut_off_after_any_write_runs_every_point_once(
    conditional: SearchSpace, tmp_path: Path
) -> None:
    """A kill while a point or the study is being created loses or duplicates it."""
    whole = tmp_path / "whole"
    whole.mkdir()
    study = SweepStudy(conditional, whole, "mine")
    running = [study.next_point(), study.next_point()]
    while running:
        number, _ = running.pop(0) or pytest.fail("no point")
        study.tell(number, (0.5,) if number != 3 else (), curve=[(1.0, 0.4), (2.0, 0.5)], stopped=number == 4)
        running += [due] if (due := study.next_point()) else []
    lines = (whole / JOURNAL).read_bytes().splitlines(keepends=True)
    for count in range(0, len(lines), 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / JOURNAL).write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        resumed = SweepStudy(conditional, folder, "mine")
        before = [point_label(end.values) for end in resumed.ended]
        after = [name for _, name in drain(resumed)]
        assert len({*before, *after}) == len(before) + len(after) == conditional.points
        betas = [end.values["distill.beta"] for end in resumed.ended]
        assert betas.count(0.1) == betas.count(0.15) == 1


def test_a_stopped_point_counts_and_keeps_its_curve(tpe: SearchSpace, tmp_path: Path) -> None:
    """A stopped point is tried again; or the sampler and optuna-dashboard do not know its last epoch."""
    study = SweepStudy(tpe, tmp_path)
    number, point = study.next_point() or pytest.fail("no point")
    study.tell(number, (0.6,), curve=[(0.6, 0.4), (1.4, 0.5), (2.0, 0.6)], stopped=True)
    number, other = study.next_point() or pytest.fail("no point")
    study.tell(number, (0.7,), curve=[(1.0, 0.5), (2.0, 0.7)])
    number, third = study.next_point() or pytest.fail("no point")
    study.tell(number, (0.3,), stopped=True)
    again = SweepStudy(tpe, tmp_path)
    assert again.ended == [
        StudyPoint(0, point, (0.6,), stopped=True),
        StudyPoint(1, other, (0.7,), stopped=False),
        StudyPoint(2, third, (0.3,), stopped=True),
    ]
    assert len(drain(again)) == 3
    trials = load(tmp_path).trials
    assert trials[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert trials[1].intermediate_values == {1: 0.5, 2: 0.7}


def load(folder: Path, name: str = "s") -> Study:
    """The study as optuna-dashboard reads it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.load_study(study_name=name, storage=storage)


GOALS = """goals:
  - {metric: validation.student.accuracy}
  - {metric: speed.student_titles_per_second, mode: max}
  - {metric: speed.times_teacher, mode: min}
"""


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_several_goals_make_a_front(sampler: str, write_space: WriteSpace, tmp_path: Path) -> None:
    """Only the first goal reaches the sampler, a direction is reversed, or optuna-dashboard shows no
    names."""
    space = read_space(write_space(CONDITIONAL.replace("tpe", sampler) + GOALS))
    study = SweepStudy(space, tmp_path)
    for value in range(6):
        number, _ = study.next_point() or pytest.fail("no point")
        study.tell(number, (float(value), float(-value), 1.0 if value else 2.0), curve=[(1.0, 0.5)])
    assert [end.results for end in study.ended][1] == (1.0, -1.0, 1.0)
    loaded = load(tmp_path)
    assert loaded.metric_names == [goal.metric for goal in space.goals]
    assert {trial.number for trial in loaded.best_trials} == {0, 1, 2, 3, 4, 5}
    assert loaded.trials[0].user_attrs["point"] == point_label(loaded.trials[0].params)


def test_the_gaussian_process_searches_where_it_can(write_space: WriteSpace, tmp_path: Path) -> None:
    """A sampler that we offer fails at its eleventh point, when it first computes."""
    text = CONDITIONAL.replace(", when: {optimizer.decay: linear}", "").replace(
        "tpe, trials: 6", "gp, trials: 12"
    )
    space = read_space(write_space(text))
    assert len(drain(SweepStudy(space, tmp_path))) == 12


@pytest.mark.parametrize(("now", "rest"), [(9, 7), (3, 1), (1, 0)])
def test_a_resume_may_ask_for_more_points_or_fewer(
    now: int, rest: int, tpe: SearchSpace, tmp_path: Path
) -> None:
    """A resume with more trials runs none; or one with fewer runs the old number."""
    study = SweepStudy(tpe, tmp_path)
    for index in range(4):
        number, _ = study.next_point() or pytest.fail("no point")
        if index < 2:
            study.tell(number, (0.5,))
    changed = tpe.model_copy(update={"search": tpe.search.model_copy(update={"trials": now})})
    assert len(drain(SweepStudy(changed, tmp_path))) == rest


@pytest.fixture
def sqlite(tpe: SearchSpace, tmp_path: Path) -> SearchSpace:
    """Six points in an SQLite file."""
    search = tpe.search.model_copy(update={"storage": f"sqlite:///{tmp_path / 'study.db'}"})
    return tpe.model_copy(update={"search": search})


def test_a_database_keeps_the_same_as_the_journal(sqlite: SearchSpace, tmp_path: Path) -> None:
    """A sweep in a database forgets running points, or results."""
    study = SweepStudy(sqlite, tmp_path, "mine")
    first = study.next_point() or pytest.fail("no point")
    second = study.next_point() or pytest.fail("no point")
    study.tell(first[0], (0.5,), curve=[(1.0, 0.4)], stopped=True)
    again = SweepStudy(sqlite, tmp_path, "mine")
    assert again.ended == [StudyPoint(first[0], first[1], (0.4,), stopped=True)]
    assert again.next_point() == second
    assert list(again.ended[0].values) == [axis.name for axis in sqlite.axes], (
        "its folder is named by this order"
    )
    assert len(drain(again)) == 4
    assert not (tmp_path / JOURNAL).exists()


def test_a_study_of_another_sweep_is_refused(sqlite: SearchSpace, tpe: SearchSpace, tmp_path: Path) -> None:
    """Two sweeps of one name mix their points in one database."""
    SweepStudy(sqlite, tmp_path, "first").next_point()
    with pytest.raises(
        StudyError, match=r"the study 's' of another sweep \(1 points\); give .* another `name:`"
    ):
        SweepStudy(sqlite, tmp_path, "second")
    SweepStudy(sqlite.model_copy(update={"name": "t"}), tmp_path, "second")
    SweepStudy(tpe, tmp_path, "first").next_point()
    with pytest.raises(StudyError, match="another --out"):
        SweepStudy(tpe, tmp_path, "second")
    goal = Goal(metric="speed.times_teacher")
    with pytest.raises(StudyError, match="of another sweep"):
        SweepStudy(sqlite.model_copy(update={"goals": (*sqlite.goals, goal)}), tmp_path, "first")


def test_a_lost_storage_gives_one_message(sqlite: SearchSpace, tpe: SearchSpace, tmp_path: Path) -> None:
    """A full disk or a database that is gone ends a sweep with a page of SQL."""
    study = SweepStudy(sqlite, tmp_path)
    number, _ = study.next_point() or pytest.fail("no point")
    (tmp_path / "study.db").unlink()
    with pytest.raises(StudyError, match=r"storage sqlite:.*cannot be opened or written.*--resume") as caught:
        study.tell(number, (0.5,))
    assert len(str(caught.value).splitlines()) == 1
    study = SweepStudy(tpe, tmp_path)
    (tmp_path / JOURNAL).unlink()
    with pytest.raises(StudyError, match=r"optuna.journal: cannot be read or written.*--resume"):
        study.next_point()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg://me:se:cr@et@host/db", "postgresql+psycopg://me:***@host/db"),
        ("mysql://me@host/db?password=secret&ssl=1", "mysql://me@host/db?password=***&ssl=1"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql:/me:secret@host", "***"),
        ("me:secret@host", "***"),
    ],
)
def test_a_password_is_masked(url: str, shown: str) -> None:
    """A password appears in a terminal, a log or sweep.json."""
    assert shown_storage(url) == shown


@given(secret=st.text(st.characters(codec="utf-8", exclude_characters="*"), min_size=4, max_size=12))
def test_no_password_is_ever_shown(secret: str) -> None:
    """A password with an unusual character is shown."""
    assert secret not in shown_storage(f"a://b:{secret}@c/d").removeprefix("a://b:").removesuffix("@c/d")


def test_a_relative_file_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume from another folder starts an empty study."""
    monkeypatch.chdir(tmp_path)
    assert absolute_storage("sqlite:///study.db") == f"sqlite:///{tmp_path / 'study.db'}"
    for same in ("sqlite:////tmp/study.db", "sqlite:///:study:", "postgresql://host/db", "sqlite://"):
        assert absolute_storage(same) == same


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////nowhere/study.db", "unable to open database file"),
        ("nonsense://me:secret@host/db", "storage nonsense://me:[*]{3}@host/db: cannot be opened"),
        ("postgresql+psycopg9://me:secret@host/db", "psycopg9"),
        ("sqlite://me:secret@host/db", "Invalid SQLite URL"),
        ("postgresql://me:secret@host:port/db", "port"),
    ],
)
def test_a_storage_that_cannot_be_opened_gives_one_message(url: str, message: str, tmp_path: Path) -> None:
    """A missing database ends in a long stack trace, with its password."""
    with pytest.raises(StudyError, match=message) as caught:
        open_storage(url, tmp_path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows what to install."""
    import optuna

    def refuse(url: str) -> None:
        raise ImportError("Failed to import DB access module") from ModuleNotFoundError(
            "No module named 'pymysql'"
        )

    monkeypatch.setattr(optuna.storages, "RDBStorage", refuse)
    with pytest.raises(StudyError, match=r"driver is not installed \(No module .*'pymysql'\); install it"):
        open_storage("mysql+pymysql://me:secret@host/db", tmp_path)


def test_a_damaged_or_unwritable_journal_gives_one_message(tmp_path: Path) -> None:
    """A damaged journal ends in a stack trace at each resume."""
    (tmp_path / JOURNAL).write_text('{"op_code": "x"}\n{}\n')
    with pytest.raises(StudyError, match=r"optuna\.journal: damaged .*move it away"):
        open_storage(None, tmp_path)
    with pytest.raises(StudyError, match=r"optuna\.journal: cannot be read or written"):
        open_storage(None, tmp_path / "missing")


SPACE = """\
name: shown
settings: {data: nowhere, teacher: scratch}
space:
  distill.beta: {float: [0.0, 0.3]}
search: {trials: 3}
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the dashboard leaves its own page's file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["journal", "database"])
def test_the_dashboard_shows_every_trial(where: str, write_space: WriteSpace, tmp_path: Path) -> None:
    """The link that a sweep prints leads to an error page, or to a study without its early ends."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = f", storage: '{url}'" if where == "database" else ""
    space = read_space(write_space(SPACE.replace("trials: 3", f"trials: 3{storage}")))
    study = SweepStudy(space, tmp_path, "this one")
    for values, curve, stopped in (
        ((0.5,), [(1.0, 0.3), (2.0, 0.5)], False),
        ((), [(1.0, 0.2)], True),
        ((), [], False),
    ):
        found = study.next_point()
        assert found is not None
        study.tell(found[0], values, curve=curve, stopped=stopped)
    opened = get_storage(str(tmp_path / JOURNAL) if where == "journal" else url)
    client = Client(wsgi(opened))
    page = client.get("/dashboard", follow_redirects=True)
    assert (page.status_code, b"<html" in page.data) == (200, True)
    (study,) = json.loads(client.get("/api/studies").data)["study_summaries"]
    assert study["study_name"] == "shown"
    detail = json.loads(client.get(f"/api/studies/{study['study_id']}?after=0").data)
    assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Pruned", "Fail"]
    first = detail["trials"][0]
    assert first["values"] == [0.5]
    assert [value["value"] for value in first["intermediate_values"]] == [0.3, 0.5]
    assert detail["objective_names"] == ["validation.student.accuracy"]


@pytest.fixture
def postgres() -> Iterator[str]:
    """URL of a study's database in a real PostgreSQL server on the loopback."""
    pytest.importorskip("psycopg2", reason="`pip install psycopg2-binary` to test a study in PostgreSQL")
    if not (shutil.which("initdb") and shutil.which("pg_ctl")):
        pytest.skip("install PostgreSQL's server (initdb, pg_ctl) to test a study in it")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has at most 107 letters
    as_user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses root
        if not shutil.which("runuser"):
            pytest.skip("PostgreSQL does not run as root")
        as_user = ["runuser", "-u", "nobody", "--"]
        shutil.chown(folder, "nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, options = folder / "data", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -F"

    def call(*command: str) -> None:
        quiet = subprocess.DEVNULL  # the server would keep a pipe open
        subprocess.run([*as_user, *command], check=True, cwd=folder, stdout=quiet, stderr=quiet, timeout=60)

    call("initdb", "-D", str(data), "-U", "study", "--auth=trust", "--no-sync")
    call("pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg2://study:hush@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_study_in_postgresql_is_continued(postgres: str, tpe: SearchSpace, tmp_path: Path) -> None:
    """Another database answers another way: a resume draws points twice, or loses one that was running."""
    space = tpe.model_copy(update={"search": tpe.search.model_copy(update={"storage": postgres})})
    study = SweepStudy(space, tmp_path, "ours")
    first, _ = study.next_point() or pytest.fail("no point")
    second, running = study.next_point() or pytest.fail("no point")
    study.tell(first, (0.75,), curve=[(1.0, 0.5), (2.0, 0.75)])
    again = SweepStudy(space, tmp_path, "ours")
    assert [(point.number, point.results) for point in again.ended] == [(first, (0.75,))]
    assert again.next_point() == (second, running)
    with pytest.raises(StudyError, match="of another sweep") as refused:
        SweepStudy(space, tmp_path, "theirs")
    assert "hush" not in str(refused.value)


METRIC = "validation.student.accuracy"


@pytest.fixture
def make_space(write_space: WriteSpace) -> Callable[[str], SearchSpace]:
    """A space of twelve points over beta with the given `stopping:`."""

    def make(stopping: str) -> SearchSpace:
        text = (
            "name: early\nsettings: {data: nowhere, teacher: scratch, epochs: 9}\n"
            "space:\n  distill.beta: {float: [0.0, 0.3]}\n"
            f"search: {{trials: 12}}\nstopping: {stopping}\n"
        )
        return read_space(write_space(text))

    return make


def ends(early: EarlyStopping, values: list[float], *, epochs: int = 9) -> list[int]:
    """At which epoch each of several trials ends, one after the other; each has its value at every epoch."""
    return [
        next(
            (
                epoch
                for epoch in range(1, epochs + 1)
                if early.should_stop(str(number), {"epoch": float(epoch), METRIC: value}, epochs=epochs)
            ),
            epochs,
        )
        for number, value in enumerate(values)
    ]


def test_asha_continues_one_trial_in_three(make_space: Callable[[str], SearchSpace]) -> None:
    """Every trial is trained to its end, or a good one is stopped.

    By hand, rungs at 1, 3 and 9: a trial continues where it is not below the upper third (numpy's linear
    percentile 66.7) of those that have reached the rung before it.
    """
    early = EarlyStopping(make_space("{scheduler: asha, grace: 1, factor: 3}"), epochs=9)
    assert ends(early, [0.5, 0.4, 0.6, 0.55, 0.7, 0.1]) == [9, 1, 9, 3, 9, 1]


def test_the_last_epoch_is_never_an_early_end(make_space: Callable[[str], SearchSpace]) -> None:
    """A trial that is paid for ends without a record because its last rung is not its best."""
    early = EarlyStopping(make_space("{scheduler: asha, grace: 1, factor: 3}"), epochs=1)
    assert not any(
        early.should_stop(str(n), {"epoch": 1.0, METRIC: value}, epochs=1)
        for n, value in enumerate([0.9, 0.1])
    )


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_resume_decides_like_an_uninterrupted_sweep(
    kind: str, make_space: Callable[[str], SearchSpace]
) -> None:
    """After a kill all start with empty rungs: bad trials continue, and a stopped one's rung is lost."""
    space = make_space(f"{{scheduler: {kind}, grace: 1}}")
    values = [0.5, 0.4, 0.6, 0.55, 0.7, 0.1, 0.65, 0.3]
    whole = ends(EarlyStopping(space, epochs=9), values)
    early, again = EarlyStopping(space, epochs=9), EarlyStopping(space, epochs=9)
    before = ends(early, values[:5])
    for number, (value, last) in enumerate(zip(values[:5], before, strict=True)):
        for epoch in range(1, last + 1):
            again.should_stop(str(number), {"epoch": float(epoch), METRIC: value}, epochs=0)
    after = [
        next(
            (e for e in range(1, 10) if again.should_stop(str(n), {"epoch": float(e), METRIC: v}, epochs=9)),
            9,
        )
        for n, v in list(enumerate(values))[5:]
    ]
    assert before + after == whole
    assert 1 in whole
    assert 9 in whole


def test_the_median_rule_compares_with_earlier_trials(make_space: Callable[[str], SearchSpace]) -> None:
    """The worst trial runs to its end, or the rule pauses a trial, which Tune could not resume."""
    early = EarlyStopping(make_space("{scheduler: median, grace: 2}"), epochs=9)
    assert ends(early, [0.5, 0.6, 0.7, 0.4, 0.65]) == [9, 9, 9, 2, 9]


def test_reports_without_the_metric_end_nothing(make_space: Callable[[str], SearchSpace]) -> None:
    """A trial's last report, which holds its value alone, ends the sweep with a KeyError."""
    for kind in ("asha", "median"):
        early = EarlyStopping(make_space(f"{{scheduler: {kind}}}"), epochs=9)
        assert not early.should_stop("a", {"value": 0.1}, epochs=9)


def test_without_a_scheduler_nothing_is_stopped(make_space: Callable[[str], SearchSpace]) -> None:
    """A grid for a figure misses points."""
    early = EarlyStopping(make_space("{scheduler: none}"), epochs=9)
    assert ends(early, [0.9, 0.1]) == [9, 9]


def space(scheduler: str, **stopping: int) -> SearchSpace:
    """A search of 30 points with this early stopping."""
    return SearchSpace(
        file="space.yaml",
        name="saving",
        axes=(Axis(name="distill.beta", low=0.0, high=0.3),),
        search=Search(sampler="random", trials=30),
        stopping=Stopping.model_validate({"scheduler": scheduler, **stopping}),
    )


def test_without_early_stopping_nothing_is_saved() -> None:
    """A plan must not promise a saving that does not exist."""
    saving = estimate_saving(space("none"), [4] * 30, slots=2)
    assert (saving.epochs, saving.finished) == (1.0, 1.0)


def test_asha_saves_what_its_rungs_stop() -> None:
    """With ranks that never change, about one in three continues from each rung (1 and 3 of 9
    epochs), more while the rungs are still empty."""
    saving = estimate_saving(space("asha"), [9] * 300, slots=1)
    ideal = (1 + (1 / 3) * 2 + (1 / 9) * 6) / 9
    assert ideal < saving.epochs < 1.25 * ideal
    assert 1 / 9 < saving.finished < 0.2
    assert "assuming" in saving.source


def test_recorded_curves_decide_the_saving() -> None:
    """Curves that cross cost more than those that do not: the saving must be based on what was recorded."""
    calm = [[(float(e), 0.01 * i) for e in range(1, 10)] for i in range(30)]
    assert estimate_saving(space("asha"), [9] * 30, slots=1, curves=calm).epochs < 0.5
    rising = [[(float(e), e + 0.01 * i) for e in range(1, 10)] for i in range(30)]
    saving = estimate_saving(space("median", grace=1), [9] * 30, slots=30, curves=rising)
    assert 0.5 < saving.epochs < 1.0
    assert "30 recorded curves" in saving.source


def test_curves_of_an_earlier_sweep_are_read(tmp_path: Path) -> None:
    """Without the curves of stopped trials, only winners would be simulated."""
    line = '{"kind": "evaluation", "epoch": 1.0, "validation": {"student": {"accuracy": 0.5}}}\n'
    write_text(tmp_path / "trials" / "a" / METRICS, line)
    write_text(tmp_path / "trials" / "b" / METRICS, line + '{"kind": "log", "epoch": 2}\n')
    write_text(tmp_path / "trials" / "c" / METRICS, "")
    curves = list(read_curves(tmp_path, "validation.student.accuracy").values())
    assert curves == [[(1.0, 0.5)], [(1.0, 0.5)]]
    saving = estimate_saving(space("asha"), [4] * 6, slots=2, curves=curves)
    assert saving.epochs == pytest.approx(1.0)  # equal curves: no trial is worse than the rung
