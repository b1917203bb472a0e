"""A whole run in this process: its folder, its record, its resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from newsbert_ray.config import PrepareSettings, TrainSettings, build_settings
from newsbert_ray.data.examples import Clicks
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.reading import make_schedule, read_updates, window_parts
from newsbert_ray.data.shards import ShardError, read_manifest
from newsbert_ray.evaluation.evaluate import evaluate
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.saved import CheckpointError, load_student
from newsbert_ray.ray_session import Stopped
from newsbert_ray.record import METRICS, RunRecord, read_entries
from newsbert_ray.training.run import RunFolderError, train
from newsbert_ray.training.step import build_learner, train_step
from tests.conftest import MakeSettings, change_json


def student(run: str | Path) -> dict[str, torch.Tensor]:
    """The exported student's weights and its top's."""
    folder = Path(run) / "student"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "top.safetensors")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train(small(shards, folder), quiet=True)
    return folder


def small(shards: Path, folder: Path, **values: Any) -> TrainSettings:
    """Settings of a run of two seconds."""
    return TrainSettings.model_validate(
        {
            "data": str(shards),
            "teacher": "scratch",
            "out": str(folder),
            "scratch": {"layers": 4, "hidden": 16, "heads": 2, "feed_forward": 32},
            "learning_rate": 2e-3,
            "epochs": 3,
            "threads": 1,
            "log_every": 4,
            "checkpoint": {"every_steps": 2},
            **values,
        }
    )


def test_files_of_a_finished_run(unbroken: Path) -> None:
    """Reports, sweeps and exports read these files and these keys."""
    record = RunRecord.model_validate_json((unbroken / "record.json").read_text())
    for split in ("validation", "test"):
        for model in ("student", "teacher"):
            assert 0.0 <= record.metrics[split][model]["macro_f1"] <= 1.0
            assert 0.0 < record.metrics[split][model]["accuracy"] <= 1.0
    assert record.layer_map == [[1, 2], [3, 4]]
    assert record.seconds["train"] > 0
    assert [entry["epoch"] for entry in record.curve] == [1.0, 2.0, 3.0]
    assert record.data["train_rows"] == read_manifest(record.settings["data"]).rows("train")
    assert (unbroken / "student" / "config.json").exists()
    assert list((unbroken / "tensorboard").glob("events.out.tfevents.*"))
    best = f"best-{record.metrics['best_step']:09d}"  # without it `evaluate` has no teacher
    assert [path.name for path in (unbroken / "checkpoints").iterdir()] == [best]


def test_evaluate_finds_the_records_numbers(unbroken: Path) -> None:
    """The exported files must give the metrics in the record, for student and teacher."""
    record = RunRecord.model_validate_json((unbroken / "record.json").read_text())
    for split in ("test", "validation"):
        found = evaluate(unbroken, split=split)
        for model in ("student", "teacher"):
            assert found[model] == pytest.approx(record.metrics[split][model])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_at_an_evaluation_ends_in_the_same_weights(
    shards: Path, unbroken: Path, tmp_path: Path, stop: int
) -> None:
    """An interruption may cost time only."""
    count = 0

    def interrupt(_: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(shards, tmp_path / "run"), report=interrupt, quiet=True)
    train(small(shards, tmp_path / "run"), quiet=True)
    assert same(student(tmp_path / "run"), student(unbroken))


@pytest.mark.parametrize("step", [1, 5, 8, 20])
def test_interrupted_in_mid_epoch_ends_in_the_same_weights(
    shards: Path, unbroken: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume repeats a few updates with the same batches and the same dropout."""
    from newsbert_ray.training.step import train_step

    def break_off(learner: Any, parts: Any, **options: Any) -> Any:
        if options["step"] == step:
            raise RuntimeError("power cut")
        return train_step(learner, parts, **options)

    monkeypatch.setattr("newsbert_ray.training.loop.train_step", break_off)
    with pytest.raises(RuntimeError, match="power cut"):
        train(small(shards, tmp_path / "run"), quiet=True)
    monkeypatch.undo()
    record = train(small(shards, tmp_path / "run"), quiet=True)
    assert same(student(tmp_path / "run"), student(unbroken))
    whole = RunRecord.model_validate_json((unbroken / "record.json").read_text())
    assert [e["validation"] for e in record.curve] == [e["validation"] for e in whole.curve]
    assert record.curve[0]["train"] == pytest.approx(whole.curve[0]["train"])
    for mine, theirs in zip(record.curve, whole.curve, strict=True):
        assert set(mine["blocks"]) == {f"block_{i}_{name}" for i in (1, 2) for name in ("ratio", "cosine")}
        assert mine["blocks"] == pytest.approx(theirs["blocks"])


@pytest.mark.slow
def test_killed_at_any_moment_ends_in_the_same_weights(shards: Path, unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no time to clean up: the files must always be enough to resume."""
    folder = tmp_path / "run"
    path = tmp_path / "settings.json"
    path.write_text(small(shards, folder).model_dump_json())
    code = (
        "import sys; from newsbert_ray.config import TrainSettings; from newsbert_ray.training.run "
        "import train; "
        "train(TrainSettings.model_validate_json(open(sys.argv[1]).read()), quiet=True)"
    )
    kills = 0
    for steps in (1, 7, 14, 21, 10_000):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)])
        while process.poll() is None:
            entries = read_entries(folder / METRICS)
            if entries and entries[-1]["step"] >= steps:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                break
            time.sleep(0.002)
        if process.returncode == 0:
            break
    assert kills >= 3
    assert process.returncode == 0
    assert same(student(folder), student(unbroken))


def test_a_length_in_steps(shards: Path, tmp_path: Path) -> None:
    """The learning rate ends with the last step; a resume knows the length as well."""
    values = {"steps": 12, "evaluate_every": 5, "optimizer": {"decay": "linear", "warmup_share": 0.0}}

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 10:
            raise RuntimeError("enough")

    whole = train(small(shards, tmp_path / "whole", **values), quiet=True)
    with pytest.raises(RuntimeError, match="enough"):
        train(small(shards, tmp_path / "cut", **values), quiet=True, report=stop)
    train(small(shards, tmp_path / "cut", **values), quiet=True)
    assert [entry["step"] for entry in whole.curve] == [5, 10, 12]
    assert [entry["epoch"] for entry in whole.curve] == pytest.approx([5 / 9, 4 / 3, 2.0])
    assert whole.steps == 12
    (last,) = [e for e in read_entries(tmp_path / "whole" / METRICS) if (e["kind"], e["step"]) == ("log", 12)]
    assert last["learning_rate_factor"] == pytest.approx(1 / 12)
    assert same(student(tmp_path / "cut"), student(tmp_path / "whole"))


UNLABELLED: dict[str, dict[str, Any]] = {
    "frozen": {"method": "twinbert"},
    "joint": {"method": "newsbert", "optimizer.accumulate": 2},
    "clicks": {"method": "disjoint", "task": "recommendation"},
}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_texts_without_labels_are_learned_from(
    make_settings: MakeSettings, tmp_path: Path, kind: str
) -> None:
    """They change the student; an interrupted run ends in the same weights; the record counts them."""
    values = {**UNLABELLED[kind], "train_rows": 20, "evaluate_every": 2, "distill.teacher_epochs": 1}

    def stop(entry: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    def run(name: str, report: Any = None, **more: Any) -> RunRecord:
        return train(make_settings(**values, **more, out=str(tmp_path / name)), quiet=True, report=report)

    whole = run("whole", unlabelled_share=0.5)
    with pytest.raises(KeyboardInterrupt):
        run("cut", report=stop, unlabelled_share=0.5)
    run("cut", unlabelled_share=0.5)
    run("without", batch_size=16)
    assert same(student(tmp_path / "cut"), student(tmp_path / "whole"))
    assert not same(student(tmp_path / "without"), student(tmp_path / "whole"))
    assert whole.data["unlabelled_rows"] > 100
    assert whole.steps == 4


def test_another_tokeniser_of_unlabelled_text_is_refused(make_settings: MakeSettings, tmp_path: Path) -> None:
    """The same ids would mean other words, and nobody would see it in the numbers."""
    settings = make_settings(unlabelled=str(tmp_path), unlabelled_share=0.5)
    text = (Path(settings.data) / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text)
    tokenizer = json.loads(text)["tokenizer"] | {"sha256": "other"}
    change_json(tmp_path / "manifest.json", tokenizer=tokenizer, tokenizer_files={})
    with pytest.raises(ShardError, match=r"unlabelled .*prepare them with the same teacher"):
        train(settings, quiet=True)
    assert not Path(settings.out).exists() or not list(Path(settings.out).iterdir())


def test_a_finished_run_says_so_and_does_nothing(
    shards: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training over a finished run would destroy it."""
    before = (unbroken / "record.json").stat().st_mtime_ns
    train(small(shards, unbroken))
    assert "already finished" in capsys.readouterr().out
    assert (unbroken / "record.json").stat().st_mtime_ns == before


def test_another_runs_folder_is_refused(shards: Path, unbroken: Path) -> None:
    """Two runs in one folder would mix their checkpoints; the message names what differs."""
    with pytest.raises(RunFolderError, match=r"--learning_rate 0.002 instead of 0.001; .*--out"):
        train(small(shards, unbroken, learning_rate=1e-3), quiet=True)


def test_a_folder_of_other_files_is_refused(shards: Path, tmp_path: Path) -> None:
    """A mistyped --out must not fill somebody's folder."""
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(RunFolderError, match="holds other files"):
        train(small(shards, tmp_path), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_shard_is_noticed(shards: Path, tmp_path: Path) -> None:
    """A flipped byte in the data would change results silently."""
    import shutil

    copy = shutil.copytree(shards, tmp_path / "shards")
    path = copy / read_manifest(copy).splits["train"][0].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match="damaged"):
        train(small(copy, tmp_path / "run"), quiet=True)


def test_a_tokeniser_that_does_not_fit_is_refused(shards: Path, tmp_path: Path) -> None:
    """The same ids would mean other words."""
    from transformers import BertConfig, BertModel

    from newsbert_ray.data.tokenizer import learn_tokenizer

    BertModel(
        BertConfig(
            vocab_size=900, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
    ).save_pretrained(tmp_path / "teacher")
    learn_tokenizer(lambda: iter(["other words than theirs"]), vocabulary=60).save(tmp_path / "teacher")
    with pytest.raises(EncoderError, match="another tokeniser"):
        train(small(shards, tmp_path / "run", teacher=str(tmp_path / "teacher")), quiet=True)


def test_depth_that_does_not_divide(shards: Path, tmp_path: Path) -> None:
    """The message must contain the remedy."""
    with pytest.raises(
        ValueError, match="4 teacher layers do not divide into 3 student layers; choose 1, 2 or 4"
    ):
        train(small(shards, tmp_path / "run", student={"layers": 3}), quiet=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3, "fingerprint": 1}'])
def test_a_damaged_settings_file(shards: Path, tmp_path: Path, content: str) -> None:
    """Without knowing whose run it is, nothing may be overwritten."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"damaged|holds another run"):
        train(small(shards, folder), quiet=True)


def test_a_run_of_an_earlier_version_goes_on(
    shards: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings lack those that are new, at any depth; others are compared by their flags."""
    run = shutil.copytree(unbroken, tmp_path / "run")
    stored = json.loads((run / "settings.json").read_text())
    del stored["settings"]["student"]["width"], stored["settings"]["steps"]
    (run / "settings.json").write_text(json.dumps(stored))
    train(small(shards, run))
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(RunFolderError, match=r"--student\.layers 2 instead of 1"):
        train(small(shards, run, student={"layers": 1}))


def test_another_runs_folder_is_kept_unless_it_holds_nothing(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    """A corrected command is refused because of the wrong one; a finished run is lost to a typing error."""
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no such folder"):
        train(make_settings(out=str(out), teacher=str(tmp_path / "none")), quiet=True)
    train(make_settings(out=str(out), epochs=1), quiet=True)
    other = make_settings(out=str(out), epochs=1, **{"distill.beta": 0.3})
    with pytest.raises(
        RunFolderError, match=r"another run, with --distill.beta 0\.\d+ instead of 0\.3; give its"
    ):
        train(other, quiet=True)
    assert train(other, quiet=True, overwrite=True).settings["distill"]["beta"] == 0.3


def test_the_same_shards_by_another_path_are_the_same_run(
    shards: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shards' content decides, not their path."""
    monkeypatch.chdir(shards.parent)
    train(small(Path("shards/"), unbroken))
    assert "already finished" in capsys.readouterr().out


def test_two_processes_on_one_folder(shards: Path, tmp_path: Path) -> None:
    """Two runs that write the same checkpoints would destroy both."""
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="another process"):
            train(small(shards, folder), quiet=True)


def test_a_full_disk_costs_no_checkpoint(
    shards: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the run ends with one message and continues once there is space."""
    import safetensors.torch

    original = safetensors.torch.save_file
    writes = 0

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal writes
        writes += 1
        if writes > 5:
            raise OSError(28, "No space left on device")
        original(*arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(small(shards, tmp_path / "run"), quiet=True)
    monkeypatch.setattr(safetensors.torch, "save_file", original)
    train(small(shards, tmp_path / "run"), quiet=True)
    assert same(student(tmp_path / "run"), student(unbroken))


def test_plain_lines_when_output_is_no_terminal(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log file gets lines without a bar or escape codes, and the commands to run next."""
    train(small(shards, tmp_path / "run", epochs=1))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "student layer <- teacher layers: 1 <- 1-2, 2 <- 3-4" in printed
    assert "titles/s" in printed
    assert f"newsbert-ray evaluate {tmp_path / 'run'}" in printed


def test_train_rows_limits_the_titles(shards: Path, tmp_path: Path) -> None:
    """Fewer titles mean fewer updates, and the record says how many."""
    record = train(small(shards, tmp_path / "run", train_rows=64, epochs=1), quiet=True)
    assert record.steps == 2
    assert record.data["train_rows"] == 64


def test_metrics_have_one_entry_a_step_after_a_resume(shards: Path, tmp_path: Path) -> None:
    """A resume repeats steps; doubled entries would make curves run backwards."""
    folder = tmp_path / "run"

    def interrupt(entry: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(shards, folder), report=interrupt, quiet=True)
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps({"kind": "log", "step": 10, "train": {}}) + '\n{"kind": "lo')
    train(small(shards, folder), quiet=True)
    entries = [(entry["kind"], entry["step"]) for entry in read_entries(folder / METRICS)]
    assert len(entries) == len(set(entries))
    assert [step for kind, step in entries if kind == "evaluation"] == [9, 18, 27]


def test_a_student_alone_computes_no_teacher(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning is the baseline of every table and must not involve a teacher."""
    settings = make_settings(task="recommendation", method="finetune")
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    before = {n: p.clone() for n, p in learner.pair.teacher.state_dict().items()}
    monkeypatch.setattr(learner.pair.teacher, "forward", None)
    for update in islice(read_updates(schedule), 3):
        numbers = train_step(learner, update.parts, step=update.step, statistics=True)
    assert set(numbers) == {"student_task", "total", "learning_rate_factor"}
    assert all(torch.equal(before[n], p) for n, p in learner.pair.teacher.state_dict().items())
    record = train(settings, quiet=True)
    assert set(record.metrics["test"]) == {"student"}
    assert set(record.metrics["parameters"]) == {"student", "top"}


def test_negatives_change_with_the_epoch_and_nothing_else(make_settings: MakeSettings) -> None:
    """Equal seeds give equal negatives; another epoch draws others for the same clicks."""
    settings = make_settings(task="recommendation", **{"recommendation.npratio": 2})
    schedule = make_schedule(settings, read_manifest(settings.data))

    def drawn(epoch: int) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()
        for window in schedule.windows(epoch):
            for _, parts in window_parts(schedule, window, first_step=1, skip=0):
                for part in parts:
                    assert isinstance(part.examples, Clicks)
                    found |= {tuple(row) for row in part.examples.candidates.tolist()}
        return found

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert {row[0] for row in drawn(0)} == {row[0] for row in drawn(1)}


def test_a_retrieval_run_from_end_to_end(make_settings: MakeSettings, pair_shards: Path) -> None:
    """Two towers with shared weights, trained jointly; the record's numbers are computed again."""
    settings = make_settings(task="retrieval", data=str(pair_shards), epochs=1)
    record = train(settings, quiet=True)
    assert set(record.metrics["test"]) == {"teacher", "student"}
    assert record.metrics["test"]["student"]["rows"] == read_manifest(pair_shards).rows("test", "retrieval")
    assert "user_embedding" not in record.curve[0]["train"]
    found = evaluate(settings.out)
    assert found["student"] == pytest.approx(record.metrics["test"]["student"])
    assert record.data["train_rows"] == read_manifest(pair_shards).examples("train", "retrieval")


def test_a_distilled_student_is_fine_tuned(
    make_settings: MakeSettings, pair_shards: Path, tmp_path: Path
) -> None:
    """Encoder and pooling of a student distilled on news must be used when it is fine-tuned for retrieval."""
    first = make_settings(task="recommendation", epochs=1)
    train(first, quiet=True)
    student = Path(first.out) / "student"
    tables = sorted(pair_shards.parent.glob("*.tsv"), reverse=True)
    values = {
        "source": [str(table) for table in tables], "teacher": str(student), "out": str(tmp_path / "shards"),
        "max_tokens": 40,
    }  # fmt: skip
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    settings = make_settings(
        task="retrieval", method="finetune", teacher=str(student), data=str(tmp_path / "shards"), epochs=1,
        out=str(tmp_path / "second"),
    )  # fmt: skip
    pair = assemble_pair(settings, read_manifest(settings.data))
    encoder, top, _ = load_student(student)
    assert "head.threshold" in pair.top.state_dict()
    for name, weight in top.pooling.state_dict().items():
        assert torch.equal(pair.top.pooling.state_dict()[name], weight)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(pair.student.state_dict()[name], weight)
    assert train(settings, quiet=True).metrics["test"].keys() == {"student"}
    again = make_settings(
        task="recommendation", teacher=str(student), out=str(tmp_path / "third"), **{"student.layers": 1}
    )
    same = assemble_pair(again, read_manifest(again.data)).top.state_dict()
    assert all(torch.equal(same[name], weight) for name, weight in top.state_dict().items())


def test_an_interrupted_recommendation_run_resumes(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Negatives and order depend on seed and step only: a resume gives the same bits."""
    whole = make_settings(task="recommendation", out=str(tmp_path / "whole"))
    broken = make_settings(task="recommendation", out=str(tmp_path / "broken"))
    train(whole, quiet=True)

    def stop(entry: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, quiet=True, report=stop)
    train(broken, quiet=True)
    for name in ("model.safetensors", "top.safetensors"):
        assert (tmp_path / "whole" / "student" / name).read_bytes() == (
            tmp_path / "broken" / "student" / name
        ).read_bytes()


def test_a_stop_before_the_first_checkpoint_promises_nothing(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person who is told that the work is kept does not look after it."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("newsbert_ray.training.run._train_in_process", stop)
    with pytest.raises(Stopped, match="run: there is no checkpoint yet; the same command starts again"):
        train(make_settings())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.ray)])
def test_a_signal_loses_no_step(
    make_settings: MakeSettings, tmp_path: Path, number: signal.Signals, code: int, workers: int
) -> None:
    """Slurm, systemd and Kubernetes send SIGTERM, a person Ctrl-C: the hours since the last epoch count."""
    settings = make_settings(epochs=60)
    words = ["--data", settings.data, "--teacher", "scratch", "--out", str(tmp_path / "run")]
    words += ["--student.layers", "1", "--epochs", "60", "--workers", str(workers), "--log_every", "1"]
    command = [sys.executable, "-m", "newsbert_ray.cli", "train", *words]
    step = 0
    for _ in range(2):
        lines: list[str] = []
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith("step "):
                    break
            process.send_signal(number)
            rest = process.stdout.read()
            assert process.wait(60) == code, "".join(lines) + rest
        kept = re.search(r"the checkpoint of step (\d+) is kept; the same command goes on from there", rest)
        assert kept, rest
        assert "Traceback" not in rest
        if step:
            assert f"continuing from step {step} of " in "".join(lines)
        step = int(kept[1])
        assert (tmp_path / "run/checkpoints" / f"step-{step:09d}").is_dir()
