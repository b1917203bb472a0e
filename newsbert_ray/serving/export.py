"""`newsbert-ray export`: a run's student as a folder that other libraries load without this package."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from newsbert_ray.files import replace_folder, write_json, write_text
from newsbert_ray.methods import task_of
from newsbert_ray.model.encoder import WEIGHTS, Encoder, quiet_transformers, save_tensors
from newsbert_ray.model.heads import TopicHead
from newsbert_ray.model.word_models import StaticEncoder
from newsbert_ray.record import RECORD, RunRecord
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.records import NAMES, data_name, task_name, teacher_name
from newsbert_ray.secrets import mask_url
from newsbert_ray.serving.predictor import Student, read_run
from newsbert_ray.storage.bucket import is_url

Format = Literal["hf", "sentence-transformers", "onnx"]
_OPSET = 20
_SAMPLES = ("Storm closes airports", "TEAM Wins The Final", "naïve café, 3.5 % up", "don't  stop - U.S. news")
"""Texts that show whether two tokenisers agree: case, accents, punctuation, blanks."""


class ExportError(ValueError):
    """A student that cannot be exported in this format, or a folder that must not be replaced."""


def export(
    run: str | Path, *, to: Format, out: str | Path, int8: bool = False, overwrite: bool = False
) -> list[Path]:
    """The verb `export`. Arguments, result and errors are those of `newsbert_ray.export`."""
    if int8 and to != "onnx":
        raise ExportError("--int8 works only with --to onnx")
    if is_url(out):
        raise ExportError(f"--out {mask_url(str(out))}: a model is written on this machine; give a folder")
    record, folder = read_run(run)
    student = Student.read(folder)
    write = {"hf": _write_hf, "sentence-transformers": _write_sentence_transformers, "onnx": _write_onnx}[to]
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise ExportError(f"--out {target}: exists; add --overwrite, or give another --out")
        if not (target / RECORD).is_file():
            raise ExportError(f"--out {target}: holds no earlier export; give another --out")
    with replace_folder(target.absolute()) as partial:
        _write_tokenizer(student, folder, partial)
        write(student, partial)
        if int8:
            _quantise(partial)
        if to != "onnx":
            _check_tokenizer(student, partial)
        shutil.copyfile(folder.parent / RECORD, partial / RECORD)
        card = model_card(record, form=to, labels=student.labels, max_tokens=student.max_tokens)
        write_text(partial / "README.md", card)
    written = sorted(path for path in target.rglob("*") if path.is_file() and path.name != "README.md")
    return [target / "README.md", *written]


def _backbone(student: Student) -> Any:
    """The student's encoder as transformers' own class."""
    backbone = getattr(student.encoder, "backbone", None)
    if type(student.encoder) is not Encoder or backbone is None:
        raise ExportError(
            "transformers has no class for this student's encoder (BiLSTM, NRMS, or UniLMv2); use --to onnx"
        )
    return backbone


def _write_hf(student: Student, folder: Path) -> None:
    classes = {"AutoModel": "NewsModel"}
    if student.labels:
        classes["AutoModelForSequenceClassification"] = "NewsForSequenceClassification"
    config: dict[str, Any] = {"architectures": [list(classes.values())[-1]]}
    if isinstance(student.encoder, StaticEncoder):
        words = student.encoder.words
        classes["AutoConfig"] = "NewsConfig"
        config |= {"model_type": "newsbert_student", "vocab_size": words.num_embeddings}
        config |= {"hidden_size": words.embedding_dim}
        weights = {"words.words.weight": words.weight.data}
    else:
        backbone = _backbone(student)
        config = {**backbone.config.to_dict(), **config}
        weights = {f"{backbone.base_model_prefix}.{name}": v for name, v in backbone.state_dict().items()}
    config["auto_map"] = {auto: f"modeling_newsbert.{name}" for auto, name in classes.items()}
    config["query_size"] = student.top.pooling.key.out_features
    if student.labels:
        weights |= cast("TopicHead", student.top.head).state_dict()
        config["id2label"] = dict(enumerate(student.labels))
        config["label2id"] = {label: number for number, label in enumerate(student.labels)}
    write_json(folder / "config.json", config)
    weights |= {f"pooling.{name}": value for name, value in student.top.pooling.state_dict().items()}
    save_tensors(weights, folder / WEIGHTS)
    _write_code(folder, "modeling_newsbert")


def _write_modules(folder: Path, kinds: Mapping[str, str]) -> None:
    modules = [{"idx": n, "name": str(n), "path": path, "type": kinds[path]} for n, path in enumerate(kinds)]
    write_json(folder / "modules.json", modules)
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def _write_static(student: Student, encoder: StaticEncoder, folder: Path) -> None:
    """As StaticEmbedding, the mean of vectors: those of `weighted_vectors` have the embedding's direction."""
    from tokenizers import Tokenizer

    vectors = encoder.weighted_vectors(student.top.pooling)[:, :-1]
    save_tensors({"embedding.weight": vectors}, folder / WEIGHTS)
    # Read without special tokens, cut as it says.
    tokenizer = Tokenizer.from_str(student.tokenizer.serialised)
    tokenizer.enable_truncation(student.max_tokens - sum(map(len, student.tokenizer.special_ids())))
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = {"": "StaticEmbedding", "1_Normalize": "Normalize"}
    _write_modules(folder, {path: f"sentence_transformers.models.{name}" for path, name in kinds.items()})


def _write_sentence_transformers(student: Student, folder: Path) -> None:
    if isinstance(student.encoder, StaticEncoder):
        _write_static(student, student.encoder, folder)
        return
    backbone = _backbone(student)
    with quiet_transformers():
        backbone.save_pretrained(folder)
    pooling, attention = folder / "1_NewsPooling", student.top.pooling
    sizes = {"hidden_size": student.encoder.hidden_size, "query_size": attention.key.out_features}
    write_json(pooling / "config.json", sizes)
    save_tensors({f"pooling.{name}": v for name, v in attention.state_dict().items()}, pooling / WEIGHTS)
    kinds = {"": "sentence_transformers.models.Transformer", pooling.name: "pooling_newsbert.NewsPooling"}
    _write_modules(folder, kinds)
    settings: dict[str, Any] = {"max_seq_length": student.max_tokens}
    if "add_pooling_layer" in inspect.signature(type(backbone)).parameters:
        settings["model_args"] = {"add_pooling_layer": False}  # else the library warns of missing weights
    write_json(folder / "sentence_bert_config.json", settings)
    _write_code(folder, "pooling_newsbert")


class _OnnxModel(nn.Module):
    """Encoder, pooling and classifier as one graph."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.encoder, self.pooling = student.encoder, student.top.pooling
        self.dense = cast("TopicHead", student.top.head).dense if student.labels else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        embedding = self.pooling(self.encoder(input_ids, attention_mask)[-1], attention_mask)
        return (embedding,) if self.dense is None else (embedding, self.dense(embedding))


def _write_onnx(student: Student, folder: Path) -> None:
    packages = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ExportError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    model = _OnnxModel(student).eval()
    ids = torch.ones(2, 8, dtype=torch.int64)
    outputs = ["news_embedding", *(["logits"] if student.labels else [])]
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _no_warnings():
        program = torch.onnx.export(
            model,
            (ids, ids.clone()),
            input_names=["input_ids", "attention_mask"],
            output_names=outputs,
            dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    cast("Any", program).save(str(folder / "model.onnx"))
    description = {"labels": student.labels, "max_tokens": student.max_tokens, "outputs": outputs}
    write_json(folder / "newsbert.json", description)


def _quantise(folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options: dict[str, Any] = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
    with _no_warnings():
        quantize_dynamic(folder / "model.onnx", folder / "model_int8.onnx", **options)


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _write_code(folder: Path, name: str) -> None:
    """Write a portable module beside the weights, and the pooling that it imports."""
    own = files("newsbert_ray.serving").joinpath(f"portable/{name}.py").read_text(encoding="utf-8")
    pooling = files("newsbert_ray.model").joinpath("pooling.py").read_text(encoding="utf-8")
    portable = own.replace("from newsbert_ray.model.pooling import", "from .attentive_pooling import")
    write_text(folder / f"{name}.py", portable)
    write_text(folder / "attentive_pooling.py", pooling)


def _write_tokenizer(student: Student, source: Path, folder: Path) -> None:
    """Write the tokeniser as tokenizer.json alone, because AutoTokenizer would rebuild it from other files.
    Special tokens stay; texts are cut where the student's were."""
    from tokenizers import Tokenizer

    write_text(folder / "tokenizer.json", student.tokenizer.serialised)
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).is_file():
            settings = json.loads((source / name).read_text(encoding="utf-8"))
            config |= {k: v for k, v in settings.items() if k.endswith("_token") or k == "padding_side"}
    # A folder with tokenizer.json alone names no token for padding, which the libraries need.
    backend = Tokenizer.from_str(student.tokenizer.serialised)
    config.setdefault("pad_token", backend.id_to_token(student.tokenizer.pad_id))
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": student.max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)


def _check_tokenizer(student: Student, folder: Path) -> None:
    """Compare the tokens that the exported folder gives with those of training."""
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(folder)
    own = student.tokenizer.encode(_SAMPLES, max_tokens=student.max_tokens)
    for text, ids in zip(_SAMPLES, own, strict=True):
        if exported(text, truncation=True)["input_ids"] != ids:
            raise ExportError(
                f"transformers reads other tokens than the student was trained on, in {text!r}; use --to "
                "onnx, which reads tokenizer.json"
            )


_TASKS = {
    "topics": "classify news titles by topic",
    "recommendation": "rank news for a user by what the user clicked before",
    "retrieval": "match queries and texts",
}


def model_card(record: RunRecord, *, form: Format, labels: Sequence[str], max_tokens: int) -> str:
    """The model card of a run: Markdown with a YAML head. `labels` are its topics; none for another task."""
    from jinja2 import Environment, FileSystemLoader

    settings, layers = record.settings, record.settings["student"]["layers"]
    method, names = str(settings.get("method")), ("epochs", "batch_size", "learning_rate", "seed")
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=folder, trim_blocks=True, keep_trailing_newline=True)
    return templates.get_template("card.md").render(
        form=form,
        labels=labels,
        max_tokens=max_tokens,
        layers=layers,
        depth=f"{layers} layer{'' if layers == 1 else 's'}" if layers else "word vectors, without layers",
        english=data_name(record).upper().startswith("MIND"),
        teacher=teacher_name(record),
        purpose=_TASKS[task_name(record)],
        method=NAMES.get(method, method),
        examples=f"{record.data.get('train_rows') or 0:,} {task_of(settings).examples}",
        data=data_name(record),
        values=", ".join(f"{name} {settings[name]}" for name in names if name in settings),
        results=_results(record),
    )


def _results(record: RunRecord) -> str:
    task, speed = task_of(record.settings), record.metrics.get("speed") or {}
    split = "test" if record.metrics.get("test") else "validation"
    scores: Mapping[str, Mapping[str, float]] = record.metrics[split]
    head = ("model", *(metric.heading for metric in task.metrics), "titles/s")
    models = []
    for name in (name for name in ("student", "teacher") if name in scores):
        rate = speed.get(f"{name}_titles_per_second")
        cells = [f"{100 * scores[name][metric.name]:.1f}" for metric in task.metrics]
        models.append((name, *cells, f"{rate:,.0f}" if rate else ""))
    rows = f"{scores['student'].get('rows') or record.data.get(f'{split}_rows', 0):,.0f} {task.rows}"
    return (
        f"{Table(head, tuple(models)).markdown()}\n\nPer cent, on the {split} split ({rows}). Titles/s on "
        f"{record.hardware.get('processor', 'unknown hardware')} with {record.hardware.get('threads', '?')} "
        "thread(s), without tokenising."
    )
