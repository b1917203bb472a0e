"""Search spaces as files: every mistake is reported with file and line before anything starts."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.cli import parse
from newsbert_ray.config import SettingsError
from newsbert_ray.methods import TASKS
from newsbert_ray.reporting.sweep_data import goal_metrics
from newsbert_ray.tune.space_file import Changes, build_space, parse_vary, read_space
from newsbert_ray.tune.trial import check_space

WriteSpace = Callable[..., Path]
SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


@pytest.mark.parametrize("path", SPACES, ids=lambda path: str(path.stem))
def test_committed_spaces_load_and_state_question_cost_and_command(path: Path) -> None:
    """A search space that we ship does not start, or nobody knows what it is for."""
    space = read_space(path)
    assert space.name == path.resolve().stem
    assert space.points > 1
    head = path.read_text().split("\nname:")[0]
    for question in (
        "# Question",
        "# Cost: ",
        "# Command",
        f"newsbert-ray sweep search_spaces/{path.resolve().name}",
    ):
        assert question in head


def test_a_space_is_read_as_written(write_space: WriteSpace) -> None:
    """A number such as 1e-3, a string in YAML 1.1, or the order of a grid is changed."""
    space = read_space(
        write_space(
            "name: s\nsettings: {learning_rate: 1e-3}\nspace:\n  optimizer.decay: {choice: [none, linear]}\n"
            "  learning_rate: {float: [1e-5, 1E-3], log: true}\n  student.layers: {int: [1, 4]}\n"
            "search: {sampler: tpe, trials: 7, seed: 3}\nmetric: test.student.macro_f1\n"
            "mode: min\nseeds: [4, 2]\n"
        )
    )
    assert space.settings == {"learning_rate": 0.001}
    decay, rate, layers = space.axes
    assert decay.values == ("none", "linear")
    assert (rate.low, rate.high, rate.log, rate.integer) == (1e-5, 1e-3, True, False)
    assert layers.samples() == (1, 2, 3, 4)
    assert (space.points, space.seeds, space.goals[0].mode, space.search.seed) == (7, (4, 2), "min", 3)


def test_a_grid_changes_the_last_axis_fastest(write_space: WriteSpace) -> None:
    """The table and the journal list points in an order that nobody expects."""
    points = list(read_space(write_space()).grid())
    assert [tuple(point.values()) for point in points] == [(0.0, 1), (0.0, 2), (0.2, 1), (0.2, 2)]


def test_every_part_of_a_space_is_read(write_space: WriteSpace) -> None:
    """A condition, a limit or a starting point in the file does nothing."""
    space = read_space(
        write_space(
            "name: s\nspace:\n  student.layers: {choice: divisors}\n"
            "  distill.temperature: {float: [0.5, 10], log: true, when: {student.layers: [1, 2]}}\n"
            "  optimizer.decay: {choice: [none, linear]}\n"
            "  optimizer.warmup_share: {float: [0, 0.3], when: {optimizer.decay: linear}}\n"
            "start:\n  - {distill: {temperature: 1}, student.layers: 2.0}\n"
            "search: {sampler: nsga2, trials: 7, storage: 'sqlite:///x.db'}\n"
            "goals: [{metric: test.student.accuracy}, {metric: speed.times_teacher, mode: max}]\n"
            "limits: {hours: 2, cost: 3.5}\nprices: {gpu_hour: 1}\ngpus: 0.25\nkeep_students: 3\n"
        )
    )
    layers, temperature, _, warmup = space.axes
    assert (layers.divisors, layers.values) == (True, None)
    assert temperature.when == {"student.layers": (1, 2)}
    assert warmup.when == {"optimizer.decay": ("linear",)}
    (start,) = space.start
    assert list(start.items()) == [("student.layers", 2), ("distill.temperature", 1.0)]
    assert [type(value) for value in start.values()] == [int, float]
    assert (space.limits.hours, space.limits.cost, space.prices.gpu_hour) == (2, 3.5, 1)
    assert (space.gpus, space.keep_students, space.search.storage) == (0.25, 3, "sqlite:///x.db")
    assert [goal.metric for goal in space.goals] == ["test.student.accuracy", "speed.times_teacher"]
    assert (space.points, space.scheduler) == (7, "none")


@pytest.mark.parametrize(
    ("text", "scheduler"),
    [
        ("search: {trials: 3}", "asha"),
        ("seeds: [1]", "none"),
        ("search: {trials: 3}\nmetric: speed.times_teacher", "none"),
        ("search: {trials: 3}\nstopping: {scheduler: median, grace: 2}", "median"),
    ],
)
def test_the_default_scheduler(text: str, scheduler: str, write_space: WriteSpace) -> None:
    """Trials of a grid are stopped unasked; or a search is expensive without ASHA."""
    assert read_space(write_space(**{"seeds: [0]": text})).scheduler == scheduler


@pytest.mark.parametrize("path", SPACES, ids=lambda path: str(path.stem))
def test_every_command_in_a_spaces_header_is_valid(path: Path) -> None:
    """A command copied from a search space ends in `unknown setting`."""
    head = path.read_text(encoding="utf-8").split("\nname:")[0].replace("\n#     --", " --")
    commands = re.findall(r"^#   (newsbert-ray .+)$", head, flags=re.MULTILINE)
    assert commands
    for command in commands:
        _, verb, *rest = shlex.split(command)
        parse(verb, rest)


MISTAKES = {
    "name of a setting": (
        "distill.beta",
        "distill.bta",
        4,
        "unknown setting 'distill.bta', did you mean 'distill.beta'",
    ),
    "last part of a name": ("distill.beta", "beta", 4, "did you mean 'distill.beta'"),
    "a whole group": ("distill.beta", "distill", 4, "unknown setting 'distill'"),
    "value out of range": ("[0.0, 0.2]", "[0.0, 1.2]", 4, "distill.beta = 1.2"),
    "value of another type": ("[1, 2]", "[1, two]", 5, "student.layers = 'two'"),
    "value twice": ("[1, 2]", "[1, 1]", 5, "1 is given twice"),
    "value that is a list": ("[1, 2]", "[[1], 2]", 5, "is not a single value"),
    "empty grid": ("[1, 2]", "[]", 5, "expected a list of values"),
    "no kind": ("{grid: [1, 2]}", "{}", 5, "needs one of"),
    "grid and int": ("{grid: [1, 2]}", "{grid: [1, 2], int: [1, 2]}", 5, "needs one of"),
    "kind misspelt": (
        "{grid: [1, 2]}",
        "{grd: [1, 2]}",
        5,
        "unknown key of student.layers 'grd', did you mean 'grid'",
    ),
    "list without grid": ("{grid: [1, 2]}", "[1, 2]", 5, r"write `student.layers: {grid: \[1, 2\]}` to try"),
    "no mapping": ("{grid: [1, 2]}", "word", 5, "expected names with values"),
    "range upside down": ("{grid: [1, 2]}", "{int: [4, 1]}", 5, r"did you mean \[1, 4\]"),
    "range of words": ("{grid: [1, 2]}", "{int: [a, b]}", 5, "two whole numbers"),
    "log from 0": ("{grid: [0.0, 0.2]}", "{float: [0, 0.2], log: true}", 4, "must be above 0"),
    "log and step": ("{grid: [0.0, 0.2]}", "{float: [0.1, 0.2], log: true, step: 0.1}", 4, "leave one out"),
    "step too wide": ("{grid: [0.0, 0.2]}", "{float: [0.1, 0.2], step: 0.5}", 4, "at most 0.1"),
    "range in a grid": ("{grid: [1, 2]}", "{int: [1, 2]}", 5, "the grid sampler needs values"),
    "fixed setting misspelt": ("epochs: 2", "epoch: 2", 2, "unknown setting 'epoch', did you mean 'epochs'"),
    "fixed setting out of range": ("epochs: 2", "epochs: 0", 2, "epochs = 0"),
    "seed among settings": ("epochs: 2", "seed: 2", 2, r"use `seeds: \[...\]`"),
    "task as an axis": ("student.layers", "task", 5, "metrics of different tasks cannot be compared"),
    "seed as an axis": ("student.layers", "seed", 5, r"use `seeds: \[...\]`"),
    "seeds twice": ("seeds: [0]", "seeds: [0, 0]", 6, "expected different seeds"),
    "no seeds": ("seeds: [0]", "seeds: []", 6, "seeds"),
    "key misspelt": ("seeds: [0]", "seed: [0]", 6, "unknown key 'seed', did you mean 'seeds'"),
    "key twice": ("seeds: [0]", "name: other", 6, "'name' is given twice, first in line 1"),
    "metric misspelt": (
        "seeds: [0]",
        "metric: validation.student.acuracy",
        6,
        "did you mean 'validation.student.accuracy'",
    ),
    "sampler misspelt": ("seeds: [0]", "search: {sampler: tpee}", 6, "sampler = 'tpee'"),
    "trials missing": ("seeds: [0]", "search: {sampler: tpe}", 6, "give `trials: N`"),
    "trials of a grid": (
        "seeds: [0]",
        "search: {sampler: grid, trials: 3}",
        6,
        "a grid tries each of its 4 points once",
    ),
    "two scalars": ("seeds: [0]", "limits: 3", 6, "expected names with values"),
    "key of a section": ("seeds: [0]", "stopping: {gracee: 1}", 6, "did you mean 'stopping.grace'"),
    "value of a section": ("seeds: [0]", "search: {trials: 3}\nstopping: {grace: 0}", 7, "grace = 0"),
    "word of a section": (
        "seeds: [0]",
        "search: {trials: 3}\nstopping:\n  scheduler: ahsa",
        8,
        "scheduler = 'ahsa'.*did you mean 'asha'",
    ),
    "price below nothing": ("seeds: [0]", "prices: {cpu_hour: -1}", 6, "cpu_hour = -1"),
    "cost without prices": ("seeds: [0]", "limits: {cost: 5}", 6, "a limit on the cost needs prices"),
    "share of many GPUs": ("seeds: [0]", "gpus: 1.5", 6, "gpus = 1.5: .*give 0.5 or 2"),
    "no GPU": ("seeds: [0]", "gpus: 0", 6, "gpus = 0"),
    "no students": ("seeds: [0]", "keep_students: 0", 6, "keep_students = 0"),
    "storage that is no URL": (
        "seeds: [0]",
        "search: {sampler: grid, storage: study.db}",
        6,
        "storage = 'study.db': expected a URL such as sqlite:///study.db",
    ),
    "goals and a metric": (
        "seeds: [0]",
        "mode: max\ngoals: [{metric: test.student.accuracy}]",
        6,
        "not both",
    ),
    "goal without a metric": ("seeds: [0]", "goals: [{mode: max}]", 6, "has no `metric:`"),
    "goals that are none": ("seeds: [0]", "goals: []", 6, "the list is empty"),
    "goals as a word": ("seeds: [0]", "goals: accuracy", 6, "expected a list such as `goals:"),
    "goal as a word": ("seeds: [0]", "goals:\n  - accuracy", 7, "'accuracy', expected names with values"),
    "goal misspelt": (
        "seeds: [0]",
        "goals:\n  - metric: test.student.accuracy\n  - metric: test.student.macrof1",
        8,
        "did you mean 'test.student.macro_f1'",
    ),
    "goal with another key": (
        "seeds: [0]",
        "goals: [{metric: test.student.accuracy, mod: max}]",
        6,
        "did you mean 'mode'",
    ),
    "goal twice": (
        "seeds: [0]",
        "goals:\n  - {metric: test.student.accuracy}\n  - {metric: test.student.accuracy, mode: min}",
        8,
        "is given twice",
    ),
    "target of several goals": (
        "seeds: [0]",
        "limits: {target: 0.8}\ngoals: [{metric: test.student.accuracy}, {metric: speed.times_teacher}]",
        6,
        "a target needs one goal",
    ),
    "several goals stopped early": (
        "seeds: [0]",
        "stopping: {scheduler: asha}\n"
        "goals: [{metric: test.student.accuracy}, {metric: speed.times_teacher}]",
        6,
        "early stopping needs one goal",
    ),
    "stopped by what comes last": (
        "seeds: [0]",
        "stopping: {scheduler: median}\nmetric: test.student.accuracy",
        6,
        "is known only at a trial's end.*validation.student.accuracy",
    ),
    "divisors of something else": ("[0.0, 0.2]", "divisors", 4, "only student.layers has divisors"),
    "divisors misspelt": ("[1, 2]", "divisor", 5, "a list of values or the word divisors"),
    "step that ends before": ("{grid: [0.0, 0.2]}", "{float: [0, 0.2], step: 0.15}", 4, r"\[0, 0.15\]"),
    "condition on nothing known": (
        "{grid: [1, 2]}",
        "{grid: [1, 2], when: {distill.bta: 0.2}}",
        5,
        "did you mean 'distill.beta'",
    ),
    "condition on a later axis": (
        "{grid: [0.0, 0.2]}",
        "{grid: [0.0, 0.2], when: {student.layers: 1}}",
        4,
        "it must come before distill.beta",
    ),
    "condition on a value that is none": (
        "{grid: [1, 2]}",
        "\n    grid: [1, 2]\n    when:\n      distill.beta: [0.2, 0.3]",
        8,
        "when distill.beta = 0.3, expected one of 0.0, 0.2",
    ),
    "condition on a misspelt value": (
        "student.layers: {grid: [1, 2]}",
        "optimizer.decay: {grid: [none, linear]}\n"
        "  student.layers: {grid: [1, 2], when: {optimizer.decay: linea}}",
        6,
        "did you mean 'linear'",
    ),
    "condition on no value": (
        "{grid: [1, 2]}",
        "{grid: [1, 2], when: {distill.beta: []}}",
        5,
        "at least one",
    ),
    "condition that is a word": ("{grid: [1, 2]}", "{grid: [1, 2], when: often}", 5, "expected names with"),
    "condition on a range": (
        "{grid: [0.0, 0.2]}\n  student.layers: {grid: [1, 2]}",
        "{float: [0, 0.2]}\n  student.layers: {grid: [1, 2], when: {distill.beta: 0.1}}",
        5,
        "that is a range",
    ),
    "condition that is never met": (
        "student.layers: {grid: [1, 2]}",
        "student.layers: {grid: [1, 2], when: {distill.beta: 0.2}}\n"
        "  batch_size: {grid: [8, 16], when: {student.layers: 1, distill.beta: 0.0}}",
        6,
        "batch_size never varies",
    ),
    "condition of a Gaussian process": (
        "{grid: [1, 2]}\nseeds: [0]",
        "{grid: [1, 2], when: {distill.beta: 0.2}}\nsearch: {sampler: gp, trials: 3}",
        6,
        "gp sampler would draw student.layers at random",
    ),
    "start of a grid": ("seeds: [0]", "start: [{distill.beta: 0.2}]", 6, "a grid tries all its points"),
    "start with another name": (
        "seeds: [0]",
        "search: {trials: 3}\nstart:\n  - distill.beta: 0.2\n  - distill.beta: 0.0\n    student.layer: 2",
        10,
        "'student.layer', did you mean 'student.layers'",
    ),
    "start outside": (
        "seeds: [0]",
        "search: {trials: 3}\nstart: [{distill.beta: 0.3}]",
        7,
        "start: distill.beta = 0.3, expected one of 0.0, 0.2",
    ),
    "start outside a range": (
        "{grid: [1, 2]}\nseeds: [0]",
        "{int: [1, 3]}\nsearch: {trials: 3}\nstart: [{student.layers: 2.5}]",
        7,
        "student.layers = 2.5, expected a whole number",
    ),
    "start between steps": (
        "{grid: [1, 2]}\nseeds: [0]",
        "{int: [1, 5], step: 2}\nsearch: {trials: 3}\nstart: [{student.layers: 2}]",
        7,
        "expected 1 plus a whole number of steps of 2",
    ),
    "start that is ruled out": (
        "{grid: [1, 2]}\nseeds: [0]",
        "{grid: [1, 2], when: {distill.beta: 0.2}}\nsearch: {trials: 3}\n"
        "start: [{distill.beta: 0.0, student.layers: 1}]",
        7,
        "student.layers does not vary where distill.beta is 0.0",
    ),
    "start twice": (
        "seeds: [0]",
        "search: {trials: 3}\nstart:\n- {distill.beta: 0.0}\n- {distill.beta: 0}",
        9,
        "is given twice",
    ),
    "start from nothing": ("seeds: [0]", "search: {trials: 3}\nstart: [{}]", 7, "names no axis"),
    "start as a word": ("seeds: [0]", "search: {trials: 3}\nstart: paper", 7, "expected a list such as"),
    "no YAML": ("seeds: [0]", "seeds: [0", 7, "not YAML"),
    "name with a slash": ("name: small", "name: a/b", 1, "name = 'a/b'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_with_file_line_and_cure(mistake: str, write_space: WriteSpace) -> None:
    """A sweep runs for hours over the wrong settings, or fails with a stack trace."""
    old, new, line, message = MISTAKES[mistake]
    path = write_space(**{old: new})
    with pytest.raises(SettingsError, match=message) as caught:
        read_space(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "just words\n", "name: \x00\n", "!!python/object/apply:os.getcwd []\n"]
)
def test_a_file_that_is_no_search_space_gives_one_message(text: str, write_space: WriteSpace) -> None:
    """A wrong file ends in a stack trace, or is executed."""
    with pytest.raises(SettingsError, match=r"space\.yaml"):
        read_space(write_space(text))


def test_a_missing_or_unreadable_file_gives_one_message(tmp_path: Path) -> None:
    """A misspelt path ends in a stack trace."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SettingsError, match=os.fspath(path)):
            read_space(path)


def test_vary_reads_values_as_yaml_does() -> None:
    """--vary turns numbers into strings, which settings refuse."""
    assert parse_vary("student.layers=1,2,3") == ("student.layers", [1, 2, 3])
    assert parse_vary(" learning_rate = [1e-5, 3e-5]") == ("learning_rate", [1e-5, 3e-5])
    assert parse_vary("optimizer.clip_norm=null,1.0") == ("optimizer.clip_norm", [None, 1.0])
    for text in ("student.layers", "student.layers=", "=1", "student.layers=1,,2"):
        with pytest.raises(SettingsError, match="expected NAME=VALUE,VALUE"):
            parse_vary(text)


@pytest.mark.parametrize(
    ("task", "goal"),
    [
        ("topics", "validation.student.accuracy"),
        ("recommendation", "validation.student.auc"),
        ("retrieval", "validation.student.auc"),
    ],
)
@pytest.mark.parametrize("where", ["file", "command line"])
def test_the_default_goal_is_the_tasks_own(task: str, goal: str, where: str, write_space: WriteSpace) -> None:
    """A recommendation sweep with accuracy as its goal fails at each trial's end."""
    changes = {"epochs: 2": f"epochs: 2, task: {task}"} if where == "file" else {}
    overrides = {"task": task} if where == "command line" else {}
    path = write_space(**changes, **{"seeds: [0]": "mode: max\nsearch: {trials: 3}"})
    space, _ = build_space(path, Changes(overrides, {}, {}))
    assert [one.metric for one in space.goals] == [goal]
    assert space.scheduler == "asha"
    assert check_space(space, out=path.parent / "out", overrides=overrides).task == task


def test_a_goal_of_another_task_is_refused_by_name_and_line(write_space: WriteSpace) -> None:
    """A sweep runs for a day and then has no number to compare."""
    file = write_space(
        **{
            "epochs: 2": "epochs: 2, task: recommendation",
            "seeds: [0]": "metric: validation.teacher.macro_f1",
        }
    )
    with pytest.raises(
        SettingsError, match=r"space\.yaml:6: metric = 'validation\.teacher\.macro_f1'"
    ) as error:
        read_space(file)
    assert "no trial of task recommendation reports it" in str(error.value)
    assert "did you mean 'validation.teacher.auc'?" in str(error.value)
    goals = "goals:\n  - {metric: speed.times_teacher}\n  - {metric: test.student.ndcg5}"
    with pytest.raises(SettingsError, match=r":8: .*did you mean 'test\.student\.accuracy'\?"):
        read_space(write_space(**{"seeds: [0]": goals}))


@pytest.mark.parametrize("metric", ["accuracy", "auc", "student.auc", "validation.student.ndcg"])
def test_a_short_or_foreign_name_of_a_metric_is_completed(write_space: WriteSpace, metric: str) -> None:
    """The hint is a metric that can be copied."""
    with pytest.raises(SettingsError) as error:
        read_space(write_space(**{"seeds: [0]": f"metric: {metric}"}))
    hint = str(error.value).partition("did you mean '")[2].partition("'")[0]
    assert hint in goal_metrics(TASKS["topics"])
    assert hint.startswith("validation.student.")


def test_the_command_lines_task_decides_which_goals_there_are(write_space: WriteSpace) -> None:
    """`--task` over a file with a goal of its own: right where it is that task's goal, else refused."""
    ours = write_space(**{"seeds: [0]": "metric: test.student.mrr"})
    with pytest.raises(SettingsError, match="no trial of task topics reports it"):
        read_space(ours)
    assert read_space(ours, task="recommendation").metric == "test.student.mrr"
    theirs = write_space(**{"seeds: [0]": "metric: test.student.accuracy"})
    with pytest.raises(SettingsError, match=r"did you mean 'test\.student\.auc'"):
        build_space(theirs, Changes({"task": "retrieval"}, {}, {}))
    with pytest.raises(SettingsError, match="did you mean 'retrieval'"):
        build_space(write_space(), Changes({"task": "retrievl"}, {}, {}))


def test_early_stopping_suggests_the_tasks_own_metrics(write_space: WriteSpace) -> None:
    """Suggesting accuracy would only lead to the next error."""
    text = "metric: test.student.auc\nsearch: {trials: 3}\nstopping: {scheduler: asha}"
    file = write_space(**{"epochs: 2": "epochs: 2, task: retrieval", "seeds: [0]": text})
    with pytest.raises(SettingsError, match=r"or one of validation\.student\.auc, validation\.teacher\.auc$"):
        read_space(file)


def test_methods_may_vary_but_not_with_a_goal_of_the_teacher(write_space: WriteSpace) -> None:
    """Fine-tuning has no teacher, so all its trials would fail with a teacher's metric."""
    axes = {"distill.beta: {grid: [0.0, 0.2]}": "method: {grid: [newsbert, finetune]}"}
    space, _ = build_space(write_space(**axes), Changes({}, {}, {}))
    out = Path("out")
    points = [point["method"] for point in space.grid()]
    assert points == ["newsbert", "newsbert", "finetune", "finetune"]
    check_space(space, out=out, overrides={})
    file = write_space(**axes, **{"seeds: [0]": "metric: test.teacher.accuracy"})
    with pytest.raises(SettingsError, match="method finetune trains no teacher"):
        check_space(read_space(file), out=out, overrides={})


def test_a_grid_skips_combinations(write_space: WriteSpace) -> None:
    """A table's rows are not a full grid: only fine-tuning has a row of the full depth."""
    axes = {"distill.beta: {grid: [0.0, 0.2]}": "method: {grid: [finetune, newsbert, pkd]}"}
    skip = "skip:\n  - {method: [newsbert, pkd], student.layers: 2}\n"
    file = write_space(**axes, **{"seeds: [0]": f"seeds: [0]\n{skip}"})
    space = read_space(file)
    points = [(point["method"], point["student.layers"]) for point in space.grid()]
    assert points == [("finetune", 1), ("finetune", 2), ("newsbert", 1), ("pkd", 1)]
    assert space.points == 4
    fixed, _ = build_space(file, Changes({"method": "pkd"}, {}, {}))
    assert [point["student.layers"] for point in fixed.grid()] == [1]
    fixed, _ = build_space(file, Changes({"method": "finetune"}, {}, {}))
    assert [point["student.layers"] for point in fixed.grid()] == [1, 2]


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("[{methods: pkd}]", r"unknown axis in skip 'methods'"),
        ("[{student.layers: 7}]", r"skip: student\.layers = 7, expected one of 1, 2"),
        ("[{}]", "would leave out every point"),
        ("5", r"skip = 5, expected a list"),
    ],
)
def test_a_mistake_in_skip_is_reported(write_space: WriteSpace, skip: str, message: str) -> None:
    """It would skip nothing, or everything."""
    file = write_space(**{"seeds: [0]": f"seeds: [0]\nskip: {skip}"})
    with pytest.raises(SettingsError, match=message):
        read_space(file)


def test_only_a_grid_skips(write_space: WriteSpace) -> None:
    """A sampler would draw the combination anyway."""
    more = "seeds: [0]\nskip: [{student.layers: 1}]\nsearch: {sampler: random, trials: 3}"
    with pytest.raises(SettingsError, match="only a grid can skip combinations"):
        read_space(write_space(**{"seeds: [0]": more}))


def test_table_2_has_the_papers_rows() -> None:
    """Every depth of a method once, and a whole encoder for fine-tuning alone."""
    space = read_space(next(path for path in SPACES if path.stem == "table2"))
    rows = [(point["method"], point["student.layers"]) for point in space.grid()]
    assert len(rows) == len(set(rows)) == 29
    assert [n for method, n in rows if method == "finetune"] == [12, 8, 4, 2, 1]
    assert [n for method, n in rows if method == "newsbert"] == [4, 2, 1]
    check_space(space, out=Path("out"), overrides={"data": "-", "teacher": "-"})
