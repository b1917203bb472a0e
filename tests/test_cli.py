from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from newsbert_ray import cli
from newsbert_ray.cli import VERBS, parse
from newsbert_ray.config import SettingsError, TrainSettings, build_settings
from newsbert_ray.data.reading import SplitData
from newsbert_ray.data.shards import ShardError, read_manifest
from newsbert_ray.ray_session import Stopped
from newsbert_ray.training.run import train
from newsbert_ray.tune.space_file import Changes
from tests.conftest import MakeSettings

NEEDED = ["--data", "shards", "--teacher", "scratch", "--out", "run"]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo the environment variables that the command line sets."""
    names = set(os.environ)
    yield
    for name in os.environ.keys() - names:
        del os.environ[name]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Returns a function that makes `report` raise an error."""

    def arrange(error: BaseException) -> None:
        def report(*positional: Any, **keywords: Any) -> None:
            raise error

        monkeypatch.setattr("newsbert_ray.reporting.report.report", report)

    return arrange


def test_help_is_fast() -> None:
    """Help that first imports torch would take five seconds at every typing error."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "newsbert_ray.cli", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - began)
    assert median(seconds) < 1.0
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Help is a sentence, an example that works, and short descriptions without Python types."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([verb, "--help"]) == 0
    short = capsys.readouterr().out
    assert cli.main([verb, "--help-all"]) == 0
    full = capsys.readouterr().out
    opening, _, flags = short.partition("Settings:")
    sentence, example = opening.strip().split("\n\n")
    assert " ".join(sentence.split()) == cli._sentence(verb)
    assert parse(verb, " ".join(example.split()).replace("\\ ", "").split()[2:])
    assert not re.search(r"type:|Union|Optional|Literal|Annotated|None", full)
    assert max(map(len, full.splitlines())) <= 80
    shown, every = (re.findall(r"^  (?:--(?:\[no-\])?([\w.]+)|[A-Z])", text, re.M) for text in (flags, full))
    assert len(shown) <= 17
    assert len(every) - 3 == len(cli._flags(verb))
    assert (f"--help-all shows all {len(cli._flags(verb))} settings" in short) == (len(every) > len(shown))
    for setting in cli._flags(verb).values():
        assert setting.text, setting.name


def test_nested_settings_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that is no flag can be reached only from the source."""
    cli.main(["train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--distill.beta BETA Share of the teacher's gradients" in text
    assert "--distill.weights.soft_labels SOFT_LABELS Weight of the" in text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tab completes what exists: verbs, the flags of a verb, the values of a flag."""
    assert cli.main(["--print_completion", shell]) == 0
    script = capsys.readouterr().out
    if shell == "zsh":
        assert script.startswith("autoload -U +X bashcompinit")
        return
    reply = 'COMP_WORDS=({}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _newsbert_ray; echo "${{COMPREPLY[@]}}"'
    words = ("newsbert-ray ev", "newsbert-ray train --distill.be", "newsbert-ray export --to on")
    program = "\n".join([script, *map(reply.format, words)])
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["evaluate", "--distill.beta", "onnx"]
    assert cli.main(["--print_completion", "tcsh"]) == 2
    assert "bash or zsh" in capsys.readouterr().err


def test_misspelt_verb_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong verb gets one line, not a page of usage."""
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "newsbert-ray: unknown verb 'trian', did you mean 'train'?\n"


def test_no_verb_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    """The bare command fails, so that a script notices, and shows a person the verbs."""
    assert cli.main([]) == 2
    assert "Usage: newsbert-ray VERB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("distill.betta", "distill.beta"),
        ("beta", "distill.beta"),
        ("batch-size", "batch_size"),
        ("lerning_rate", "learning_rate"),
        ("distill.weights.hiden", "distill.weights.hidden"),
        ("epo", "epochs"),
        ("lr", "learning_rate"),
        ("layers", "student.layers"),
        ("num_epochs", "epochs"),
        ("num-epochs", "epochs"),
        ("model", "teacher"),
        ("no-bogus", None),
    ],
)
@pytest.mark.parametrize("form", ["--{} 1", "--{}=1"])
def test_unknown_flag_names_the_nearest(
    name: str, near: str | None, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag that is taken for another, or silently dropped, runs another experiment."""
    assert cli.main(["train", *NEEDED, *form.format(name).split()]) == 2
    message = capsys.readouterr().err
    assert f"unknown setting '{name}'" + (f", did you mean '{near}'?" if near else "") in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--distill.shared_top"], True),
        (["--distill.shared_top", "false"], False),
        (["--distill.shared_top=no"], False),
        (["--no-distill.shared_top"], False),
        (["--no_distill.shared_top"], False),
        (["--no-distill.shared_top", "--seed", "1"], False),
    ],
)
def test_boolean_flags_have_the_same_forms_everywhere(words: list[str], value: bool) -> None:
    """A switch whose form depends on the verb has to be looked up every time."""
    assert parse("submit", ["--no_wait", "--list"]) == {"wait": False, "list": True}
    assert parse("evaluate", ["--json", "run"]) == {"run": "run", "json": True}
    with pytest.raises(SettingsError, match="json = 'perhaps': expected true or false"):
        parse("evaluate", ["--json=perhaps", "run"])
    assert parse("train", [*NEEDED, *words])["distill"]["shared_top"] is value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distill.beta", "1.5"),
        ("distill.beta", "-0.1"),
        ("distill.beta", "nan"),
        ("distill.beta", "much"),
        ("distill.temperature", "inf"),
        ("distill.soft_label_t2", "perhaps"),
        ("student.layers", "1.5"),
        ("optimizer.decay", "linaer"),
        ("epochs", ""),
        ("batch_size", "1e3x"),
        ("learning_rate", "0"),
        ("seed", "2147483648"),
        ("workers", "64"),
        ("threads", "0"),
    ],
)
def test_wrong_value_gives_one_line(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong value is refused before anything is loaded or written, in one line with flag and value."""
    assert cli.main(["train", *NEEDED, f"--{name}={value}"]) == 2
    message = capsys.readouterr().err
    assert name in message
    assert value in message
    assert message.count("\n") == 1
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["train"], "data, teacher, out"),
        (["train", "--data", "d", "--out", "o"], "teacher"),
        (["prepare", "--teacher", "scratch"], "source, out"),
        (["sweep", "--out", "o"], "space"),
        (["evaluate"], "run"),
        (["report", "--out", "o"], "folders"),
        (["synthesize"], "out"),
    ],
)
def test_missing_settings_are_listed(
    words: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All missing settings are named at once."""
    assert cli.main(words) == 2
    assert f"required and not given: {missing} (" in capsys.readouterr().err


def test_flag_without_its_value_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """`--distill.beta --epochs 3` must not train for three betas."""
    assert cli.main(["train", *NEEDED, "--distill.beta", "--epochs", "3"]) == 2
    assert "--distill.beta needs a value" in capsys.readouterr().err


def test_printed_config_gives_the_same_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A printed configuration that is read again must be the same experiment."""
    words = [*NEEDED, "--distill.beta", "0.25", "--optimizer.clip_norm", "1.0", "--learning_rate", "3e-4"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *words, "--print_config"])
    assert ended.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    again = build_settings(TrainSettings, parse("train", ["--config", str(tmp_path / "run.yaml")]))
    assert again == build_settings(TrainSettings, parse("train", words))


def test_flags_override_the_file(tmp_path: Path) -> None:
    """A flag that is ignored would silently run the file's experiment."""
    path = tmp_path / "run.yaml"
    path.write_text("data: d\nteacher: t\nout: o\ndistill:\n  beta: 0.3\n  temperature: 2.0\n")
    settings = build_settings(TrainSettings, parse("train", ["--config", str(path), "--distill.beta=0.2"]))
    assert (settings.distill.beta, settings.distill.temperature) == (0.2, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "distill:\n  beta: 7\n",
            r"run\.yaml: distill\.beta = 7: .*less than or equal to 1",
        ),
        (
            "distill:\n  betta: 0.1\n",
            r"run\.yaml: unknown setting 'distill\.betta', did you mean 'distill\.beta'\?",
        ),
        ("epoch: 3\n", r"unknown setting 'epoch', did you mean 'epochs'\?"),
        ("distill: [\n", r"config"),
        ("- 1\n", r"config"),
    ],
)
def test_wrong_config_file_gives_one_line(tmp_path: Path, text: str, message: str) -> None:
    """An error in the file is reported like one on the command line."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        parse("train", [*NEEDED, "--config", str(path)])
    assert "\n" not in str(caught.value)


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    """A mistyped file name must not mean the defaults."""
    with pytest.raises(SettingsError, match=r"nowhere\.yaml"):
        parse("train", [*NEEDED, "--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    "words",
    [
        ["--source", "train", "--source", "dev"],
        ["--source=train", "--source=dev"],
        ["--source", "train", "--source=dev"],
    ],
)
def test_sources_may_be_repeated(words: list[str]) -> None:
    """If only the last --source counted, the training news would silently be the test news."""
    values = parse("prepare", [*words, "--teacher", "scratch", "--out", "shards"])
    assert values["source"] == ["train", "dev"]


def test_source_may_hold_blanks_and_brackets() -> None:
    """A folder's name is a name, whatever YAML would make of it."""
    odd = ["[my] data, 1", "true"]
    values = parse("prepare", ["--source", odd[0], "--source", odd[1], "--teacher", "x", "--out", "o"])
    assert values["source"] == odd


def test_sweep_passes_only_explicit_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that is passed as an override would replace the search space's value."""
    seen: dict[str, Any] = {}

    def sweep(space: str, changes: Changes, **keywords: Any) -> SimpleNamespace:
        seen.update(keywords, space=space, changes=changes)
        return SimpleNamespace(best="some point", failures={})

    monkeypatch.setattr("newsbert_ray.tune.sweep.sweep", sweep)
    words = ["space.yaml", "--out", "o", "--distill.temperature", "2", "--data", "d", "--vary", "seeds=1,2"]
    words += ["--vary", "distill.beta=0.1", "--concurrency", "2", "--search.trials", "7", "--gpus", "0.25"]
    control = {"search": {"trials": 7}, "gpus": 0.25}
    changes = Changes(
        {"distill": {"temperature": 2.0}, "data": "d"}, {"seeds": [1, 2], "distill.beta": [0.1]}, control
    )
    expected: dict[str, Any] = {"space": "space.yaml", "out": "o", "changes": changes, "concurrency": 2}
    assert cli.main(["sweep", *words, "--limits.hours", "0.5", "--resume"]) == 0
    wider = replace(changes, control={**control, "limits": {"hours": 0.5}})
    assert seen == {**expected, "changes": wider, "resume": True, "overwrite": False, "train": None}
    seen.clear()
    monkeypatch.setattr("newsbert_ray.tune.estimate.plan_sweep", sweep)
    assert cli.main(["sweep", *words, "--plan", "--curves", "earlier"]) == 0
    assert seen == {**expected, "curves": "earlier"}


def test_sweep_without_a_finished_trial_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script must not continue with the report of a sweep in which every trial failed."""
    monkeypatch.setattr("newsbert_ray.tune.sweep.sweep", lambda *_, **keywords: SimpleNamespace(best=None))
    assert cli.main(["sweep", "space.yaml", "--out", "o"]) == 1
    assert "o: no trial finished" in capsys.readouterr().err


def test_evaluate_prints_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script reads JSON, a person a table; both have every number."""
    metrics = {"student": {"accuracy": 0.7, "macro_f1": 0.5}, "teacher": {"accuracy": 0.8}, "rows": 400}
    monkeypatch.setattr("newsbert_ray.evaluation.evaluate.evaluate", lambda run, **keywords: metrics)
    assert cli.main(["evaluate", "run", "--json"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == metrics
    assert cli.main(["evaluate", "run"]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("student", "teacher", "0.7000", "0.5000", "0.8000", "rows 400"))


def test_recommendation_from_the_command_line(
    make_settings: MakeSettings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Metrics with standard errors, a checked submission, and one user's ranking."""
    monkeypatch.setenv("COLUMNS", "80")
    run = make_settings(task="recommendation", epochs=1)
    train(run, quiet=True)
    target = tmp_path / "prediction.zip"
    assert cli.main(["evaluate", run.out, "--submission", str(target)]) == 0
    printed = capsys.readouterr().out
    for word in ("teacher", "student", "popularity", "tfidf", "random", "nDCG@10", "±", "left out"):
        assert word in printed
    checked = "as the student ranks them. The file was read back and has a line for every impression."
    assert checked in " ".join(printed.split())
    rows, _ = next(SplitData(Path(run.data), read_manifest(run.data), "test").impressions())
    user = next(row["user_id"] for row in rows.to_pylist() if row["history"])
    assert cli.main(["evaluate", run.out, "--show", user, "--model", "teacher"]) == 0
    printed = capsys.readouterr().out
    assert "newest last" in printed
    assert "ranked by the teacher" in " ".join(printed.split())
    assert cli.main(["evaluate", run.out, "--show", user, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"history", "offers", "impression_id"} <= shown[0].keys()
    assert cli.main(["evaluate", run.out, "--show", user, "--submission", str(target)]) == 2
    assert "give only one of submission, by_topic and show" in capsys.readouterr().err
    assert cli.main(["evaluate", run.out, "--submission", str(tmp_path / "p.csv")]) == 1
    assert ".zip" in capsys.readouterr().err


def test_synthetic_tables_can_be_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Retrieval can be tried without own data."""
    assert cli.main(["synthesize-pairs", "--pairs", "200", "--words", "15", "--out", str(tmp_path)]) == 0
    train_table, dev_table = capsys.readouterr().out.split()
    words = ["prepare", "--source", train_table, "--source", dev_table, "--teacher", "scratch"]
    assert cli.main([*words, "--out", str(tmp_path / "shards")]) == 0
    assert "--task retrieval" in capsys.readouterr().out
    assert cli.main(["synthesize-pairs", "--pairs", "1", "--out", str(tmp_path)]) == 2
    assert "pairs 1" in capsys.readouterr().err


class WrappedByRay(Exception):
    """Like Ray's wrapper of a worker's exception: its own text is a whole traceback."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("ray::worker()\n  File ...\n  File ...")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ShardError("shards/manifest.json: damaged"), 1, "shards/manifest.json: damaged"),
        (WrappedByRay(ShardError("shards/a.parquet: damaged")), 1, "shards/a.parquet: damaged"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/record.json"),
            1,
            "run/record.json: No space left on device; free some space and run the same command again",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "run"), 1, "run: Permission denied"),
        (OSError("no such model\nanywhere"), 1, "no such model anywhere"),
        (KeyError("x"), 1, "internal error: KeyError: 'x'; run it again with --debug for the traceback"),
    ],
)
def test_failure_gives_one_line(
    error: BaseException,
    code: int,
    message: str,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback hides the one line that a person needs."""
    failing(error)
    assert cli.main(["report", "x", "--out", "y"]) == code
    assert capsys.readouterr().err == f"newsbert-ray report: {message}\n"


def test_debug_shows_the_traceback(failing: Callable[[BaseException], None]) -> None:
    """An internal error cannot be fixed without its traceback."""
    failing(KeyError("x"))
    with pytest.raises(KeyError):
        cli.main(["report", "x", "--debug", "--out", "y"])


def test_ctrl_c_has_its_own_exit_code(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that loops over runs must notice that somebody wants to stop."""
    failing(KeyboardInterrupt())
    assert cli.main(["report", "x", "--out", "y"]) == 130
    assert capsys.readouterr().err == "\nnewsbert-ray report: stopped\n"
    failing(Stopped(signal.SIGTERM, "run: step 3 is kept"))
    assert cli.main(["report", "x", "--out", "y"]) == 143
    assert capsys.readouterr().err == "\nnewsbert-ray report: stopped; run: step 3 is kept\n"


def test_report_without_records_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty report would look like a sweep without results."""
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "no record.json at or below it; has a run finished?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
