"""The public functions: one for each verb, and the same arguments and messages as the command line."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import newsbert_ray
from newsbert_ray import SettingsError, TrainSettings, cli
from newsbert_ray.config import build_settings
from newsbert_ray.tune.space_file import Changes

NEEDED: dict[str, Any] = {"data": "shards", "teacher": "scratch", "out": "run"}
WORDS = "--data shards --teacher scratch --out run"


def test_dir_lists_the_public_names_only() -> None:
    """Completion in a notebook must offer what a user may call, and all of it."""
    assert dir(newsbert_ray) == sorted(newsbert_ray.__all__)
    verbs = {verb.replace("-", "_") for verb in cli.VERBS}
    functions = {name for name in dir(newsbert_ray) if inspect.isfunction(getattr(newsbert_ray, name))}
    assert functions == verbs | {"load", "preview", "read_record"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        newsbert_ray.trian  # noqa: B018


@pytest.mark.parametrize("name", [name for name in newsbert_ray.__all__ if not name.startswith("__")])
def test_public_names_are_documented(name: str) -> None:
    """Every parameter of a public function is explained, since the text is also its flag's help."""
    public = getattr(newsbert_ray, name)
    assert public.__doc__
    if inspect.isfunction(public) and name != "read_record":
        for parameter in inspect.signature(public).parameters:
            assert f"        {parameter}: " in public.__doc__, parameter


def test_documented_errors_exist() -> None:
    """An error that was renamed would be caught by nobody who read its old name."""
    package = Path(newsbert_ray.__file__).parent
    source = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    classes = set(re.findall(r"^class (\w+Error)\b", source, flags=re.MULTILINE))
    for name in set(dir(newsbert_ray)) - {"__version__"}:
        text = (getattr(newsbert_ray, name).__doc__ or "").partition("Raises:")[2]
        assert set(re.findall(r"\b\w+Error\b", text)) <= classes, name


def test_the_called_function_takes_the_same_arguments() -> None:
    """A public function without a body fails only when it is called, if its target lacks an argument."""
    source = Path(newsbert_ray.__file__).read_text(encoding="utf-8")
    for target, name in re.findall(r'@_calls\("([\w.]+)"\)\ndef (\w+)', source):
        module, _, function = f"newsbert_ray.{target}".rpartition(".")
        public = inspect.signature(getattr(newsbert_ray, name)).parameters
        own = inspect.signature(getattr(import_module(module), function)).parameters
        assert {name: p.kind for name, p in public.items()} == {name: p.kind for name, p in own.items()}, name


def _calls(monkeypatch: pytest.MonkeyPatch, target: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*positional: Any, **keywords: Any) -> Any:
        calls.append((positional, keywords))
        return SimpleNamespace(best="some point", failures={})

    monkeypatch.setattr(target, record)
    return calls


def test_train_takes_settings_nested_dotted_or_as_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """All forms of the same settings train the same run."""
    calls = _calls(monkeypatch, "newsbert_ray.training.run.train")
    whole = build_settings(TrainSettings, {**NEEDED, "student": {"layers": 4}, "epochs": 3})
    newsbert_ray.train(**NEEDED, student={"layers": 4}, epochs=3)
    newsbert_ray.train(**{**NEEDED, "student.layers": 4, "epochs": 3})
    newsbert_ray.train(whole)
    newsbert_ray.train(
        build_settings(TrainSettings, {**NEEDED, "epochs": 9}), student={"layers": 4}, epochs=3
    )
    assert [positional[0] for positional, _ in calls] == [whole] * 4


def test_values_over_a_settings_object_keep_the_methods_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that is changed afterwards must bring its own weights, not keep the other method's."""
    calls = _calls(monkeypatch, "newsbert_ray.training.run.train")
    newsbert_ray.train(build_settings(TrainSettings, NEEDED), method="finetune")
    assert calls[0][0][0] == build_settings(TrainSettings, {**NEEDED, "method": "finetune"})


def test_sweep_takes_settings_and_parts_of_the_search_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and the command line start the same sweep; the older keywords still work."""
    calls = _calls(monkeypatch, "newsbert_ray.tune.sweep.sweep")
    trials: dict[str, Any] = {"search.trials": 7}
    newsbert_ray.sweep("s.yaml", out="o", vary=["seeds=1,2"], epochs=3, **trials)
    newsbert_ray.sweep(
        "s.yaml", out="o", vary={"seeds": [1, 2]}, overrides={"epochs": 3}, control={"search": {"trials": 7}}
    )
    assert (
        cli.main(
            ["sweep", "s.yaml", "--out", "o", "--vary", "seeds=1,2", "--epochs", "3", "--search.trials", "7"]
        )
        == 0
    )
    assert calls[0] == calls[1] == calls[2]
    assert calls[0][0][1] == Changes({"epochs": 3}, {"seeds": [1, 2]}, {"search": {"trials": 7}})


@pytest.mark.parametrize(
    ("verb", "words", "values"),
    [
        (
            "train",
            "--data d --teacher t --out o --epochs 0",
            {"data": "d", "teacher": "t", "out": "o", "epochs": 0},
        ),
        ("train", "--data d --epochs 0", {"data": "d", "epochs": 0}),
        ("train", f"{WORDS} --lr 1", {**NEEDED, "lr": 1}),
        ("train", f"{WORDS} --batch_size 1 --workers 2", {**NEEDED, "batch_size": 1, "workers": 2}),
        ("prepare", "--teacher t --out o", {"teacher": "t", "out": "o"}),
        ("similar", "v --top 0", {"vectors": "v", "top": 0}),
        ("similar", "v --topp 3", {"vectors": "v", "topp": 3}),
        ("evaluate", "r --split tets", {"run": "r", "split": "tets"}),
        ("export", "r --to hff --out o", {"run": "r", "to": "hff", "out": "o"}),
        ("embed", "r --out o --input x --gpus -1", {"run": "r", "out": "o", "input": ["x"], "gpus": -1}),
        ("synthesize", "--out o --news 1", {"out": "o", "news": 1}),
        ("sweep", "s.yaml --out o --epochs 0", {"space": "s.yaml", "out": "o", "epochs": 0}),
        (
            "sweep",
            "s.yaml --out o --search.trails 1",
            {"space": "s.yaml", "out": "o", "search": {"trails": 1}},
        ),
        ("submit", "--list --logs j", {"list": True, "logs": "j"}),
    ],
)
def test_a_wrong_argument_has_the_command_lines_message(
    verb: str, words: str, values: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whoever moves from the shell to Python finds the same rules and the same words."""
    with pytest.raises(SettingsError) as caught:
        getattr(newsbert_ray, verb)(**values)
    assert cli.main([verb, *words.split()]) == 2
    hint = f" (all settings: newsbert-ray {verb} --help-all)"
    assert capsys.readouterr().err == f"newsbert-ray {verb}: {caught.value}{hint}\n"


def test_python_m_runs_the_command_line() -> None:
    """`python -m newsbert_ray` works where the script is not on the path."""
    done = subprocess.run(
        [sys.executable, "-m", "newsbert_ray", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"newsbert-ray {newsbert_ray.__version__}\n"


def test_earlier_files_are_replaced_unless_told_otherwise(tmp_path: Path) -> None:
    """Every verb that writes has the same switch."""
    small: Any = {"news": 8, "users": 1, "topics": 2}
    newsbert_ray.synthesize(tmp_path, **small)
    newsbert_ray.synthesize(tmp_path, **small)
    with pytest.raises(
        newsbert_ray.SettingsError, match=r"synthetic_\w+: exists; give another out, or overwrite"
    ):
        newsbert_ray.synthesize(tmp_path, overwrite=False, **small)
