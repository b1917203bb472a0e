"""The model card of an exported student: data, method, settings, metrics, speed, limits, licences. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import data_name, task_name, teacher_name
from newsbert_ray.reporting.names import NAMES
from newsbert_ray.tasks import task_of

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
