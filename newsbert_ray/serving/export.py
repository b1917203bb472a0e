"""`newsbert-ray export`: a run's student as a folder that other libraries load without this package."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from newsbert_ray.files import replace_folder, write_json, write_text
from newsbert_ray.methods import task_of
from newsbert_ray.model.encoder import Encoder, EncoderError
from newsbert_ray.model.heads import TopicHead
from newsbert_ray.model.pair import Top
from newsbert_ray.model.saved import load_student
from newsbert_ray.record import RECORD, RunRecord, read_record
from newsbert_ray.reporting.records import NAMES, data_name, task_name, teacher_name
from newsbert_ray.secrets import mask_url
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.workdir import fetch

FORMS = ("hf", "sentence-transformers", "onnx")
_OPSET = 20
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")
"""What a tokeniser's files begin with."""


class ExportError(ValueError):
    """A student that cannot be exported so, or a folder that may not be written; the text says the cure."""


@dataclass(frozen=True)
class Student:
    """A finished run's student, as it is exported."""

    folder: Path
    record: RunRecord
    encoder: Encoder
    top: Top
    described: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        """Its topics; none where it learned another task."""
        return list(self.described["labels"]) if isinstance(self.top.head, TopicHead) else []

    @property
    def longest(self) -> int:
        """Tokens to which texts are cut."""
        return int(self.described.get("max_tokens") or 512)


def export(
    run: str | Path, *, to: str, out: str | Path, int8: bool = False, overwrite: bool = False
) -> list[Path]:
    """Write the student of `run` into `out`, with its tokeniser, a model card (README.md) and its record.

    Arguments, result and errors are those of `newsbert_ray.export`.
    """
    if to not in FORMS:
        raise ExportError(f"--to {to}: one of {', '.join(FORMS)}")
    if int8 and to != "onnx":
        raise ExportError("--int8 true: only of --to onnx")
    if storage.is_url(out):
        raise ExportError(f"--out {mask_url(str(out))}: a model is written on this machine; give a folder")
    student = read_student(run)
    writers: dict[str, Callable[[Student, Path], None]] = {
        "hf": _write_hf,
        "sentence-transformers": _write_sentence_transformers,
        "onnx": _write_onnx,
    }
    target = Path(out)
    with _fresh(target, overwrite=overwrite) as partial:
        writers[to](student, partial)
        if int8:
            _quantise(partial)
        _copy_tokenizer(student, partial)
        shutil.copyfile(student.folder / RECORD, partial / RECORD)
        card = model_card(student.record, form=to, labels=student.labels, longest=student.longest)
        write_text(partial / "README.md", card)
    found = sorted(path for path in target.rglob("*") if path.is_file() and path.name != "README.md")
    return [target / "README.md", *found]


def read_student(run: str | Path) -> Student:
    """The student that a finished run left.

    Raises:
        RecordError: no finished run there.
        EncoderError: its student is not whole, or not kept.
    """
    folder = fetch(run, without=("checkpoints/*",))
    record = read_record(folder)
    if not (folder / "student").is_dir():
        raise EncoderError(
            f"{run}: its student was not kept (a sweep keeps those of its best trials); train it again"
        )
    return Student(folder, record, *load_student(folder / "student"))


@contextmanager
def _fresh(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `target` that takes its place when all is written."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise ExportError(f"--out {target}: there already; add --overwrite, or give another --out")
        if not (target / RECORD).is_file():
            raise ExportError(f"--out {target}: holds no earlier export; give another --out")
    with replace_folder(target.absolute()) as partial:
        yield partial


def _hugging_face(student: Student) -> Any:
    """The student's encoder in its library."""
    backbone = getattr(student.encoder, "backbone", None)
    if type(student.encoder) is not Encoder or backbone is None:
        raise ExportError(
            "this student's encoder is none of transformers' (a BiLSTM, NRMS, or UniLMv2); give --to onnx"
        )
    return backbone


def _write_hf(student: Student, folder: Path) -> None:
    from safetensors.torch import save_file

    backbone = _hugging_face(student)
    classes = {"AutoModel": "NewsModel"} | (
        {"AutoModelForSequenceClassification": "NewsForSequenceClassification"} if student.labels else {}
    )
    config = {
        **backbone.config.to_dict(),
        "architectures": [list(classes.values())[-1]],
        "auto_map": {auto: f"modeling_newsbert.{name}" for auto, name in classes.items()},
        "query_size": student.described["query_size"],
    }
    if student.labels:
        config["id2label"] = dict(enumerate(student.labels))
        config["label2id"] = {label: number for number, label in enumerate(student.labels)}
    write_json(folder / "config.json", config)
    prefix = backbone.base_model_prefix
    weights = {f"{prefix}.{name}": value for name, value in backbone.state_dict().items()}
    weights |= {f"pooling.{name}": value for name, value in student.top.pooling.state_dict().items()}
    if student.labels:
        weights |= cast("TopicHead", student.top.head).state_dict()
    save_file({n: v.contiguous() for n, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    _carry_code(folder, "modeling_newsbert")


def _write_sentence_transformers(student: Student, folder: Path) -> None:
    from safetensors.torch import save_file

    backbone = _hugging_face(student)
    backbone.save_pretrained(folder)
    pooling = folder / "1_NewsPooling"
    pooling.mkdir()
    sizes = {"hidden_size": student.encoder.hidden_size, "query_size": student.described["query_size"]}
    write_json(pooling / "config.json", sizes)
    weights = {f"pooling.{n}": v.contiguous() for n, v in student.top.pooling.state_dict().items()}
    save_file(weights, pooling / "model.safetensors", {"format": "pt"})
    modules = (
        ("", "sentence_transformers.models.Transformer"),
        (pooling.name, "pooling_newsbert.NewsPooling"),
    )
    write_json(
        folder / "modules.json",
        [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(modules)],
    )
    described: dict[str, Any] = {"max_seq_length": student.longest}
    if "add_pooling_layer" in inspect.signature(type(backbone)).parameters:
        described["model_args"] = {"add_pooling_layer": False}  # else the library warns of weights for it
    write_json(folder / "sentence_bert_config.json", described)
    similarity: dict[str, Any] = {"similarity_fn_name": "cosine", "prompts": {}, "default_prompt_name": None}
    write_json(folder / "config_sentence_transformers.json", similarity)
    _carry_code(folder, "pooling_newsbert")


class _Whole(nn.Module):
    """Encoder, pooling and head as one graph."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.encoder, self.pooling = student.encoder, student.top.pooling
        self.dense = cast("TopicHead", student.top.head).dense if student.labels else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        embedding = self.pooling(self.encoder(input_ids, attention_mask)[-1], attention_mask)
        return (embedding,) if self.dense is None else (embedding, self.dense(embedding))


def _write_onnx(student: Student, folder: Path) -> None:
    _require("onnx", "onnxscript", "onnxruntime")
    model = _Whole(student).eval()
    ids = torch.ones(2, 8, dtype=torch.int64)
    names = ["news_embedding", *(["logits"] if student.labels else [])]
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model,
            (ids, ids.clone()),
            input_names=["input_ids", "attention_mask"],
            output_names=names,
            dynamic_shapes={"input_ids": free, "attention_mask": free},
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(folder / "model.onnx"))
    described = {"labels": student.labels, "max_tokens": student.longest, "outputs": names}
    write_json(folder / "newsbert.json", described)


def _quantise(folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            folder / "model.onnx",
            folder / "model_int8.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' advice to whoever calls them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise ExportError(
            f"--to onnx needs {', '.join(missing)}; install them with: pip install {' '.join(missing)}"
        )


def _carry_code(folder: Path, name: str) -> None:
    """Put a portable module beside the weights, and the pooling that it stands on."""
    own = files("newsbert_ray.serving.portable").joinpath(f"{name}.py").read_text(encoding="utf-8")
    shared = files("newsbert_ray.model").joinpath("pooling.py").read_text(encoding="utf-8")
    there = own.replace("from newsbert_ray.model.pooling import", "from .attentive_pooling import")
    write_text(folder / f"{name}.py", there)
    write_text(folder / "attentive_pooling.py", shared)


def _copy_tokenizer(student: Student, folder: Path) -> None:
    """The tokeniser's files; texts are cut where the student's were."""
    for path in sorted((student.folder / "student").iterdir()):
        if path.name.startswith(_TOKENIZER) or path.suffix == ".model":
            shutil.copyfile(path, folder / path.name)
    place = folder / "tokenizer_config.json"
    known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    write_json(place, {**known, "model_max_length": student.longest})


_CODE = {
    "hf": """from transformers import AutoModel, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(DIR)
encoder = AutoModel.from_pretrained(DIR)                              # the encoder's states alone
model = AutoModel.from_pretrained(DIR, trust_remote_code=True)        # pooler_output: the text's embedding
embedding = model(**tokenizer(["A title"], return_tensors="pt", truncation=True)).pooler_output""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer(DIR, trust_remote_code=True)
embeddings = model.encode(["A title", "another"])""",
    "onnx": """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("DIR/tokenizer.json")
tokenizer.enable_truncation(MAX)
tokenizer.enable_padding()
read = tokenizer.encode_batch(["A title", "another"])
ids, mask = (np.array([getattr(one, name) for one in read]) for name in ("ids", "attention_mask"))
session = onnxruntime.InferenceSession("DIR/model.onnx")              # or model_int8.onnx
embedding, *logits = session.run(None, {"input_ids": ids, "attention_mask": mask})""",
}
_TOPICS = """
topics = pipeline("text-classification", model=DIR, trust_remote_code=True)
topics("A title", truncation=True)                # the pipeline warns that the class is none of its own"""
_TASKS = {
    "topics": "classify news titles by topic",
    "recommendation": "rank news for a user by what the user clicked before",
    "retrieval": "match queries and texts",
}


def model_card(record: RunRecord, *, form: str, labels: Sequence[str], longest: int) -> str:
    """The card as Markdown with a model card's YAML head.

    Args:
        form: hf, sentence-transformers or onnx.
        labels: topics that it tells apart; none for another task.
        longest: tokens to which texts are cut.
    """
    settings = record.settings
    method = NAMES.get(str(settings.get("method")), str(settings.get("method")))
    layers = settings["student"]["layers"]
    library = {"hf": "transformers", "sentence-transformers": form, "onnx": "onnx"}[form]
    code = _CODE[form] + (_TOPICS if form == "hf" and labels else "")
    if form == "hf" and not labels:
        code = code.replace(", pipeline", "")
    parts = [
        f"---\nlibrary_name: {library}\nlanguage: en\ntags: [news, distillation, newsbert]\n---",
        f"# A news encoder of {layers} layer{'s' if layers > 1 else ''}, from {teacher_name(record)}",
        f"It learned to {_TASKS[task_name(record)]} by the method *{method}* (newsbert_ray; NewsBERT, Wu et "
        f"al. 2021). Texts are cut at {longest} tokens; a text's embedding is the attentive pooling of its "
        "tokens' states.",
        f"## Use\n\n```python\n{code.replace('MAX', str(longest))}\n```",
        "## How good it is\n\n" + _metrics(record),
        "## How it was made\n\n" + _made(record),
        "## Limits\n\n" + _limits(record, labels),
        "## Licences\n\nThe weights derive from the teacher's and from the data: the licences of both apply "
        "(MIND: Microsoft Research Licence Terms, non-commercial research). The code in this folder, where "
        "there is any, is newsbert_ray's, Apache-2.0.",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(record: RunRecord) -> str:
    task = task_of(record.settings)
    split = "test" if record.metrics.get("test") else "validation"
    scores: Mapping[str, Mapping[str, float]] = record.metrics[split]
    head = ["model", *(metric.heading for metric in task.metrics), "titles/s"]
    speed = record.metrics.get("speed") or {}
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in ("student", "teacher"):
        if name in scores:
            pace = speed.get(f"{name}_titles_per_second")
            cells = [f"{100 * scores[name][metric.name]:.1f}" for metric in task.metrics]
            lines.append([name, *cells, f"{pace:,.0f}" if pace else ""])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    rows = f"{scores['student'].get('rows') or record.data.get(f'{split}_rows', 0):,.0f}"
    return (
        f"{table}\n\nPer cent, on the {split} split of {data_name(record)} ({rows} {task.rows}), seed "
        f"{record.seed}, one run. Titles/s on {record.hardware.get('processor', 'unknown hardware')}, "
        f"{record.hardware.get('threads', '?')} threads, without tokenising."
    )


def _made(record: RunRecord) -> str:
    task = task_of(record.settings)
    wanted = ("method", "student", "distill", "model", "optimizer", "epochs", "batch_size", "learning_rate")
    told = [f"- {name}: {_shown(record.settings[name])}" for name in wanted if name in record.settings]
    rows = record.data.get("train_rows")
    return "\n".join(
        [
            f"- data: {data_name(record)}, {rows:,} {task.examples}"
            if rows
            else f"- data: {data_name(record)}",
            f"- teacher: {teacher_name(record)}",
            *told,
            "- versions: " + ", ".join(f"{name} {value}" for name, value in record.versions.items()),
            "- all of it: record.json",
        ]
    )


def _shown(value: Any) -> str:
    """A setting, or what of a group of settings is not empty, in one line."""
    if not isinstance(value, Mapping):
        return str(value)
    kept = {name: inner for name, inner in value.items() if inner not in (None, 0.0, False)}
    return ", ".join(
        f"{name} {_shown(inner)}" for name, inner in kept.items() if not isinstance(inner, Mapping)
    )


def _limits(record: RunRecord, labels: Sequence[str]) -> str:
    found = [
        "- It has read the texts of one corpus, of one time and language; elsewhere its numbers are unknown.",
        "- The numbers above are of one run: another seed moves them.",
    ]
    if labels:
        found.append(f"- It knows {len(labels)} topics and no 'none of them': {', '.join(labels)}.")
    if str(record.settings.get("task")) == "recommendation":
        found.append(
            "- What people click is no judgement of news; a ranking by it repeats what was shown before."
        )
    return "\n".join(found)
