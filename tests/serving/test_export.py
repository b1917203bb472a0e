"""An exported student gives the same numbers in the libraries that load it; its card describes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from newsbert_ray.config import ENCODERS
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.heads import TopicHead
from newsbert_ray.model.saved import load_student
from newsbert_ray.record import RunRecord, read_record
from newsbert_ray.serving.export import ExportError, _write_tokenizer, export, model_card
from newsbert_ray.serving.predictor import Precision, Student, load
from newsbert_ray.training.run import train
from tests.conftest import change_json
from tests.model.test_families import write_family
from tests.model.test_unilm import checkpoint, write

if TYPE_CHECKING:
    from tests.conftest import MakeRecord, MakeSettings

TITLES = ["team wins the final", "market falls again after a long week of losses and more", "rain"]


@pytest.fixture(scope="module")
def ours(run: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, Any]]:
    """Embeddings and logits of the titles by our own code, and what the tokeniser makes of them."""
    from tokenizers import Tokenizer

    encoder, top, described = load_student(run / "student")
    tokenizer = Tokenizer.from_file(str(run / "student" / "tokenizer.json"))
    tokenizer.enable_truncation(described["max_tokens"])
    tokenizer.enable_padding()
    read = tokenizer.encode_batch(TITLES)
    ids, mask = (torch.tensor([getattr(one, name) for one in read]) for name in ("ids", "attention_mask"))
    with torch.inference_mode():
        embedding = top.embed(encoder(ids, mask), mask)
        logits = cast("TopicHead", top.head).dense(embedding)
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    return embedding.numpy(), logits.numpy(), given


@pytest.fixture(autouse=True)
def _own_module_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Code that a folder carries is imported from a cache of this test's own."""
    import sys

    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
def test_transformers(run: Path, ours: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The encoder without our code; embedding, topics, loss and hidden states with the exported code."""
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

    out = tmp_path / "hf"
    written = export(run, to="hf", out=out)
    assert written[0] == out / "README.md"
    assert {path.name for path in written} >= {"config.json", "model.safetensors", "record.json"}
    embedding, logits, given = ours
    read = {name: torch.from_numpy(value) for name, value in given.items()}
    encoder, _, described = load_student(run / "student")
    plain = AutoModel.from_pretrained(out)
    with torch.inference_mode():
        states = plain(**read).last_hidden_state
        mine = encoder(read["input_ids"], read["attention_mask"])[-1]
    assert type(plain).__name__ == "BertModel"
    real = read["attention_mask"].bool()
    torch.testing.assert_close(states[real], mine[real], atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == described["max_tokens"]
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    with torch.inference_mode():
        found = model(**tokenizer(TITLES, return_tensors="pt", padding=True, truncation=True)).pooler_output
    np.testing.assert_allclose(found.numpy(), embedding, atol=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)
    with torch.inference_mode():
        answer = classifier(**read, labels=torch.tensor([0, 1, 0]), output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.tensor([0, 1, 0]))
    assert float(answer.loss) == pytest.approx(float(expected), abs=1e-5)
    assert len(answer.hidden_states) == len(encoder.layers) + 1
    assert classifier.get_input_embeddings().weight.shape[1] == encoder.hidden_size
    classify = pipeline("text-classification", model=str(out), trust_remote_code=True, top_k=None)
    assert "not supported" not in capfd.readouterr().err  # the pipeline would list all classes it knows
    answers: Any = classify(TITLES, truncation=True, function_to_apply="none")
    names = json.loads((run / "student" / "top.json").read_text())["labels"]
    for answer, row in zip(answers, logits, strict=True):
        scores = {one["label"]: one["score"] for one in answer}
        np.testing.assert_allclose([scores[name] for name in names], row, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(run: Path, ours: Any, tmp_path: Path) -> None:
    """encode gives our embeddings, also after the library has saved the model itself."""
    from sentence_transformers import SentenceTransformer

    out = tmp_path / "st"
    export(run, to="sentence-transformers", out=out)
    model = SentenceTransformer(str(out), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(model.encode(TITLES), ours[0], atol=1e-5)
    assert model.max_seq_length == 30
    assert cast("Any", model)[0].auto_model.pooler is None
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(again.encode(TITLES), ours[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_onnxruntime(run: Path, ours: Any, tmp_path: Path) -> None:
    """Any number of titles of any length; 8-bit weights answer nearly the same."""
    import onnxruntime

    out = tmp_path / "onnx"
    export(run, to="onnx", out=out, int8=True)
    embedding, logits, given = ours
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    found = session.run(None, given)
    np.testing.assert_allclose(found[0], embedding, atol=1e-5)
    np.testing.assert_allclose(found[1], logits, atol=1e-5)
    one = {name: value[2:, : int(given["attention_mask"][2].sum())] for name, value in given.items()}
    np.testing.assert_allclose(session.run(None, one)[0], embedding[2:], atol=1e-5)
    small = onnxruntime.InferenceSession(str(out / "model_int8.onnx"))
    answers = small.run(None, given)[1]
    assert not np.array_equal(answers, logits)
    np.testing.assert_allclose(answers, logits, atol=0.1)
    assert (out / "model_int8.onnx").stat().st_size < (out / "model.onnx").stat().st_size


@pytest.mark.filterwarnings("ignore")
def test_a_student_without_layers(static_run: Path, tmp_path: Path) -> None:
    """transformers by the exported code; StaticEmbedding has the student's directions and cuts alike."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = load(static_run, device="cpu")
    texts = [*TITLES, "Storm closes the airports " * 20]
    embedding = model.embed(texts)
    export(static_run, to="hf", out=tmp_path / "hf")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert isinstance(model.top.head, TopicHead)
    with torch.inference_mode():
        read = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
        torch.testing.assert_close(
            classifier(**read).logits, model.top.head.dense(torch.from_numpy(embedding)), atol=1e-5, rtol=0
        )
    export(static_run, to="sentence-transformers", out=tmp_path / "st")
    loaded = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert type(loaded[0]).__name__ == "StaticEmbedding"
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.encode(texts), unit, atol=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "without layers" in card
    assert "AutoModel.from_pretrained(DIR) " not in card


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_onnx_of_a_student_without_layers(static_run: Path, tmp_path: Path) -> None:
    """Any number of titles of any length."""
    import onnxruntime

    export(static_run, to="onnx", out=tmp_path / "onnx")
    model = load(static_run, device="cpu")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    for text in TITLES:
        ids = np.array(list(model.tokenizer.encode([text], max_tokens=30)))
        found = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        np.testing.assert_allclose(found, model.embed([text]), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_family_is_exported(
    make_settings: MakeSettings, shards: Path, tmp_path: Path, kind: str
) -> None:
    """Trained jointly, then read in other precisions and by three libraries: all give the same embeddings."""
    import onnxruntime
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    teacher = tmp_path / "teacher"
    words = read_manifest(shards).tokenizer.vocabulary
    if kind == "unilmv2":
        write(teacher, checkpoint(joined=True, words=words), vocab_size=words)
    else:
        write_family(kind, teacher, words)
    shutil.copytree(shards / "tokenizer", teacher, dirs_exist_ok=True)
    settings = make_settings(teacher=str(teacher), epochs=1, train_rows=64)
    train(settings, quiet=True)
    model = load(settings.out, device="cpu")
    expected = model.embed(TITLES)
    roughly: dict[Precision, float] = {"bf16": 0.05, "int8": 0.1}
    for precision, error in roughly.items():
        rough = load(settings.out, device="cpu", precision=precision).embed(TITLES)
        assert np.abs(rough - expected).max() < error * np.abs(expected).max()
    export(settings.out, to="onnx", out=tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    read = tokenizer(TITLES, return_tensors="pt", padding=True, truncation=True)
    given = {name: read[name].numpy() for name in ("input_ids", "attention_mask")}
    np.testing.assert_allclose(session.run(None, given)[0], expected, atol=1e-5)
    if kind == "unilmv2":  # transformers has no class for it: tests/model/test_unilm.py
        return
    for form in ("hf", "sentence-transformers"):
        export(settings.out, to=form, out=tmp_path / form)
    with torch.inference_mode():
        found = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True)(**read).pooler_output
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    library = SentenceTransformer(
        str(tmp_path / "sentence-transformers"), trust_remote_code=True, device="cpu"
    )
    np.testing.assert_allclose(library.encode(TITLES), expected, atol=1e-5)


def test_other_tasks_and_encoders(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A recommendation student has no topics; transformers has no class for a BiLSTM."""
    settings = make_settings(task="recommendation", epochs=1)
    train(settings, quiet=True)
    export(settings.out, to="hf", out=tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "modeling_newsbert.NewsModel"}
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "rank news for a user" in card
    assert "pipeline" not in card
    own = make_settings(method="bilstm_soft", epochs=1, out=str(tmp_path / "own"), **{"student.layers": 1})
    train(own, quiet=True)
    with pytest.raises(ExportError, match="use --to onnx"):
        export(own.out, to="hf", out=tmp_path / "bilstm")
    assert not (tmp_path / "bilstm").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"tokenizer_class": "BertTokenizer", "do_lower_case": False}, {}])
def test_tokens_are_those_of_training(run: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """AutoTokenizer would follow tokenizer_config.json, training followed tokenizer.json."""
    from transformers import AutoTokenizer

    from newsbert_ray.data.tokenizer import load_tokenizer

    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/student/tokenizer_config.json"
    known = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(known | settings))
    change_json(config.with_name("top.json"))
    export(tmp_path / "run", to="sentence-transformers", out=tmp_path / "st")
    titles = ["Storm Closes Airports", "Team WINS"]
    own = list(load_tokenizer(str(run / "student")).encode(titles, max_tokens=30))
    assert AutoTokenizer.from_pretrained(tmp_path / "st")(titles)["input_ids"] == own


def test_padding_has_a_token(run: Path, tmp_path: Path) -> None:
    """A folder with tokenizer.json alone names none, and the libraries cannot encode two titles without."""
    from transformers import AutoTokenizer

    _write_tokenizer(Student.read(run / "student"), tmp_path / "alone", tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "[PAD]"


def test_existing_folder_is_kept(run: Path, tmp_path: Path) -> None:
    """An export must not replace somebody's folder."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists; add --overwrite"):
        export(run, to="hf", out=out)
    with pytest.raises(ExportError, match="holds no earlier export"):
        export(run, to="hf", out=out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(ExportError, match="works only with --to onnx"):
        export(run, to="hf", out=tmp_path / "x", int8=True)
    export(run, to="hf", out=tmp_path / "x")
    (tmp_path / "x" / "stale").touch()
    export(run, to="hf", out=tmp_path / "x", overwrite=True)
    assert not (tmp_path / "x" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "x"]


def test_model_card(make_record: MakeRecord) -> None:
    """Data, method, metrics beside the teacher's, settings, limits, licences."""
    record = make_record(accuracy=0.71, teacher_accuracy=0.8, teacher="models/tiny")
    card = model_card(record, form="sentence-transformers", labels=["a", "b"], max_tokens=30)
    assert "| student | 71.0 | 50.0 |" in card
    assert "| teacher | 80.0 | 80.0 |" in card
    said = ("from tiny", "*NewsBERT*", "cut at 30 tokens", "1,800 titles", "2 topics", "Licences", "seed 0")
    assert [words for words in said if words not in card] == []
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")


def test_missing_run(tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(Exception, match="no record there"):
        export(tmp_path, to="hf", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_record_is_exported(run: Path, tmp_path: Path) -> None:
    """It tells how the model was made."""
    export(run, to="hf", out=tmp_path / "hf")
    found: RunRecord = read_record(tmp_path / "hf")
    assert found == read_record(run)


def test_url_is_refused(run: Path) -> None:
    """It would become a folder of that name."""
    with pytest.raises(ExportError, match="written on this machine; give a folder"):
        export(run, to="hf", out="s3://bucket/model")
