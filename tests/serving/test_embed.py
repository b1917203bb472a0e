"""Each text gets its own embedding beside its id, from every format, also after an interruption."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from newsbert_ray.config import SettingsError
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.model.saved import load_student
from newsbert_ray.serving import embed as embedding
from newsbert_ray.serving import texts
from newsbert_ray.serving.embed import EMBEDDED, EmbedError, embed, read_embedded, similar
from newsbert_ray.serving.predictor import load
from newsbert_ray.serving.texts import TextsError, predict
from newsbert_ray.storage.bucket import Remote
from newsbert_ray.training.run import train

if TYPE_CHECKING:
    from tests.conftest import S3, MakeSettings

ROWS = [(f"N{n}", f"title number {n} of the news " + "again " * (n % 7)) for n in range(40)]


def mind(folder: Path, rows: list[tuple[str, str]] = ROWS) -> Path:
    """A news.tsv."""
    path = folder / "news.tsv"
    path.write_text("".join(f"{n}\tnews\tx\t{t}\t\thttps://a\t[]\t[]\n" for n, t in rows), encoding="utf-8")
    return path


def quiet(run: Path, files: list[Path], out: Path, **more: Any) -> dict[str, Any]:
    """embed in this process, without a word."""
    return embed(run, input=[str(f) for f in files], out=out, workers=0, say=lambda _: None, **more)


def alone(run: Path, text: str) -> np.ndarray[Any, Any]:
    """The embedding of one text, unpadded."""
    from tokenizers import Tokenizer

    encoder, top, description = load_student(run / "student")
    tokenizer = Tokenizer.from_file(str(run / "student" / "tokenizer.json"))
    tokenizer.enable_truncation(description["max_tokens"])
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.inference_mode():
        vectors = top.embed(encoder(ids, torch.ones_like(ids)), torch.ones_like(ids))
    return np.asarray(vectors[0])


def test_embedding_of_each_text(run: Path, tmp_path: Path) -> None:
    """Sorting and padding change no number; ids and order are the file's."""
    description = quiet(run, [mind(tmp_path)], tmp_path / "out")
    names, titles, vectors, again = read_embedded(tmp_path / "out")
    assert list(zip(names, titles, strict=True)) == [(name, text) for name, text in ROWS]
    assert description == again
    assert (vectors.shape, str(vectors.dtype), description["rows"]) == ((40, 16), "float32", 40)
    for index in (0, 6, 39):
        np.testing.assert_allclose(vectors[index], alone(run, ROWS[index][1]), atol=1e-5)


def test_all_formats_give_the_same(run: Path, tmp_path: Path) -> None:
    """JSON lines and Parquet, under either name of a column; two files are one corpus."""
    quiet(run, [mind(tmp_path)], tmp_path / "tsv")
    expected = read_embedded(tmp_path / "tsv").embeddings
    lines = tmp_path / "news.jsonl"
    lines.write_text("".join(json.dumps({"id": n, "title": t, "more": 1}) + "\n" for n, t in ROWS[:15]))
    table = tmp_path / "news.parquet"
    columns = pa.table({"text": [t for _, t in ROWS[15:]], "news_id": [n for n, _ in ROWS[15:]]})
    pq.write_table(columns, table, row_group_size=10)
    description = quiet(run, [lines, table], tmp_path / "both")
    names, _, vectors, _ = read_embedded(tmp_path / "both")
    assert names == [name for name, _ in ROWS]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert len(description["parts"]) == 2


def test_interrupted_command_continues(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of work are not repeated; a finished command says so."""
    monkeypatch.setattr(texts, "ROWS", 10)
    lines: list[str] = []
    values: dict[str, Any] = {"input": [str(mind(tmp_path))], "out": tmp_path / "out", "workers": 0}
    work, calls = embedding.embed_piece, 0

    def break_off(piece: Any, shared: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return work(piece, shared)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "embed_piece", break_off)
        with pytest.raises(KeyboardInterrupt):
            embed(run, **values, say=lines.append)
    with pytest.raises(EmbedError, match=r"a run, which .*embed .*run --input news.tsv --out VECTORS"):
        read_embedded(run)
    with pytest.raises(EmbedError, match="contains no complete embeddings"):
        read_embedded(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert len(before) == 2
    description = embed(run, **values, say=lines.append)
    assert f"2 of {len(description['parts'])} files were already embedded" in lines
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read_embedded(tmp_path / "out")[0] == [name for name, _ in ROWS]
    embed(run, **values, say=lines.append)
    assert not any("texts/s" in line for line in lines[-2:])


def test_embeddings_of_another_model_are_kept(run: Path, tmp_path: Path, make_settings: MakeSettings) -> None:
    """A mix of two models would be useless and look right."""
    quiet(run, [mind(tmp_path)], tmp_path / "out")
    other = make_settings(epochs=1, seed=5)
    train(other, quiet=True)
    with pytest.raises(EmbedError, match="of another model or in another precision; add --overwrite"):
        quiet(Path(other.out), [mind(tmp_path)], tmp_path / "out")
    quiet(Path(other.out), [mind(tmp_path)], tmp_path / "out", overwrite=True)
    vectors = read_embedded(tmp_path / "out").embeddings
    np.testing.assert_allclose(vectors[3], alone(Path(other.out), ROWS[3][1]), atol=1e-5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    with pytest.raises(EmbedError, match="holds no embeddings"):
        quiet(run, [mind(tmp_path)], tmp_path / "mine", overwrite=True)


def test_bf16_is_close_and_not_mixed_with_fp32(run: Path, tmp_path: Path) -> None:
    """The third digit moves, the shards stay fp32; a restart in other numbers would mix them."""
    rows = [(f"N{n}", f"title number {n} of the news") for n in range(80)]
    exact = quiet(run, [mind(tmp_path, rows)], tmp_path / "exact")
    rough = quiet(run, [mind(tmp_path, rows)], tmp_path / "rough", precision="bf16")
    assert (exact["precision"], rough["precision"]) == ("fp32", "bf16")
    expected, vectors = (read_embedded(tmp_path / name).embeddings for name in ("exact", "rough"))
    assert vectors.dtype == expected.dtype
    assert 0 < np.abs(vectors - expected).max() < 0.03 * np.abs(expected).max()
    with pytest.raises(EmbedError, match="in another precision; add --overwrite"):
        quiet(run, [mind(tmp_path, rows)], tmp_path / "rough")
    description = json.loads((tmp_path / "exact" / EMBEDDED).read_text())
    del description["precision"]  # as embeddings were description before there was a choice
    (tmp_path / "exact" / EMBEDDED).write_text(json.dumps(description))
    assert quiet(run, [mind(tmp_path, rows)], tmp_path / "exact")["rows"] == 80


def test_encoder_without_a_token_cache(tmp_path: Path, make_settings: MakeSettings) -> None:
    """A BiLSTM has no layers that could share anything; many texts are read all the same."""
    settings = make_settings(method="bilstm_soft", epochs=1, **{"student.layers": 1})
    train(settings, quiet=True)
    rows = [(f"N{n}", f"title number {n}") for n in range(80)]
    quiet(Path(settings.out), [mind(tmp_path, rows)], tmp_path / "out")
    names, _, exact, _ = read_embedded(tmp_path / "out")
    assert names == [name for name, _ in rows]
    quiet(Path(settings.out), [mind(tmp_path, rows)], tmp_path / "rough", precision="bf16")
    rough = read_embedded(tmp_path / "rough").embeddings
    np.testing.assert_allclose(rough, exact, atol=0.03 * np.abs(exact).max())


def test_files_with_the_same_name(run: Path, tmp_path: Path) -> None:
    """MIND's are all called news.tsv."""
    for name in ("train", "dev"):
        (tmp_path / name).mkdir()
    files = [mind(tmp_path / "train", ROWS[:20]), mind(tmp_path / "dev", ROWS[20:])]
    assert quiet(run, files, tmp_path / "out")["rows"] == 40
    assert quiet(run, files, tmp_path / "out")["rows"] == 40
    mind(tmp_path / "train", ROWS[:19])
    with pytest.raises(EmbedError, match="holds embeddings of other texts"):
        quiet(run, files, tmp_path / "out")


def test_bad_rows_are_left_out_and_reported(run: Path, tmp_path: Path) -> None:
    """Up to a share; a file of damage is an error that names its kind."""
    file = tmp_path / "news.jsonl"
    good = [json.dumps({"id": n, "title": t}) for n, t in ROWS]
    bad = ['{"id": "x"}', "[1]", "{", '{"id": [1], "title": "a"}']
    file.write_text("\n".join([*good, *bad]), encoding="utf-8")
    with pytest.raises(
        EmbedError,
        match=r"4 of 44 rows are bad, at most 1\.0% may be: title: empty",
    ):
        quiet(run, [file], tmp_path / "out")
    lines: list[str] = []
    values: dict[str, Any] = {"workers": 0, "max_rejected_share": 0.2, "overwrite": True}
    description = embed(run, input=[str(file)], out=tmp_path / "out", say=lines.append, **values)
    assert description["rows"] == 40
    assert lines[0] == "1 of 1 files were already embedded"
    assert lines[1].startswith("left out, 4 bad rows: title: empty")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.tsv", None, "no such file"),
        ("empty.tsv", "", "contains no text"),
        ("x.jsonl", "1\n", "no text column; found none"),
    ],
)
def test_unreadable_file(run: Path, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    """Before a model is loaded, and `--out` stays free."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((TextsError, PrepareError), match=message):
        quiet(run, [tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_everything_in_a_bucket(
    run: Path, tmp_path: Path, bucket: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster whose machines share no disk; what is done is not done again there either."""
    monkeypatch.setattr(texts, "ROWS", 10)
    quiet(run, [mind(tmp_path)], tmp_path / "here")
    remote = Remote(f"{bucket.url}/given")
    names = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    remote.upload(run, names)
    remote.upload(tmp_path, ["news.tsv"])
    values: dict[str, Any] = {
        "input": [f"{bucket.url}/given/news.tsv"],
        "out": f"{bucket.url}/vectors",
        "workers": 0,
    }
    lines: list[str] = []
    description = embed(remote.url, **values, say=lines.append)
    assert lines[-1].startswith(f"40 embeddings of 16 dimensions are in {bucket.url}/vectors")
    names, _, vectors, _ = read_embedded(f"{bucket.url}/vectors")
    assert names == [name for name, _ in ROWS]
    np.testing.assert_allclose(vectors, read_embedded(tmp_path / "here").embeddings, atol=1e-6)
    Remote(f"{bucket.url}/vectors").remove([description["parts"][1]])
    embed(remote.url, **values, say=lines.append)
    assert (
        f"{len(description['parts']) - 1} of {len(description['parts'])} files were already embedded" in lines
    )
    assert similar(f"{bucket.url}/vectors", to="N3", top=1).matches
    values["input"] = [str(mind(tmp_path, ROWS[:9]))]
    with pytest.raises(EmbedError, match="holds embeddings of other texts"):
        embed(run, **values, say=lines.append)
    assert embed(run, **values, overwrite=True, say=lines.append)["rows"] == 9
    assert len(read_embedded(f"{bucket.url}/vectors").names) == 9


def test_output_that_machines_do_not_share(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that another machine wrote to its own disk are missing."""
    monkeypatch.setattr(embedding, "embed_piece", lambda _piece, _task: 40)
    with pytest.raises(
        EmbedError, match=r"written by another machine.*give an --out that all machines share"
    ):
        quiet(run, [mind(tmp_path)], tmp_path / "out")


def test_pieces_of_an_earlier_version_are_not_continued(run: Path, tmp_path: Path) -> None:
    """It cut files elsewhere: texts would be missing or twice. Complete embeddings are kept."""
    quiet(run, [mind(tmp_path)], tmp_path / "out")
    path = tmp_path / "out" / EMBEDDED
    earlier = {name: value for name, value in json.loads(path.read_text()).items() if name != "piece_rows"}
    path.write_text(json.dumps(earlier))
    assert quiet(run, [mind(tmp_path)], tmp_path / "out") == earlier
    path.write_text(json.dumps(earlier | {"state": "under way"}))
    with pytest.raises(EmbedError, match="add --overwrite"):
        quiet(run, [mind(tmp_path)], tmp_path / "out")


def test_without_ray(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that cannot start Ray can embed all the same, and is told how."""
    from newsbert_ray import ray_session

    def refuse(**_: Any) -> None:
        raise ray_session.ConnectError("Ray does not start on this machine")

    monkeypatch.setattr(ray_session, "ray_session", refuse)
    with pytest.raises(EmbedError, match=r"not start on this machine.*--workers 0"):
        embed(run, input=[str(mind(tmp_path))], out=tmp_path / "out")


def test_predictions_in_every_format(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, in the order of the file, as `load(run).predict` gives them."""
    monkeypatch.setattr(texts, "ROWS", 16)
    expected = load(run).predict([text for _, text in ROWS], top=2)
    source = mind(tmp_path)
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        result = predict(run, input=source, out=tmp_path / name, top_k=2)
        assert (result["rows"], result["left_out"]) == (40, 0)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == ROWS
    assert [(row["topic"], row["topic_2"]) for row in rows] == [
        (one.topics[0][0], one.topics[1][0]) for one in expected
    ]
    assert [row["probability_2"] for row in rows] == pytest.approx(
        [one.topics[1][1] for one in expected], abs=1e-6
    )
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in row.items()} for row in rows]


def test_predictions_of_standard_input(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One text a line; its id is the number of its line; standard output has nothing but the rows."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"rain again\n\ncaf\xc3\xa9s open\n\xff\n")))
    lines: list[str] = []
    assert predict(run, say=lines.append) == {"out": "-", "rows": 2, "left_out": 1}
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["text"]) for row in shown] == [("1", "rain again"), ("3", "cafés open")]
    assert 0 < shown[0]["probability"] <= 1
    assert lines[0].startswith("left out, 1 bad rows: encoding")
    (tmp_path / "out.csv").touch()
    for out, message in (("out.csv", "add --overwrite"), ("out.xlsx", "give a .jsonl, .csv, .parquet file")):
        with pytest.raises(SettingsError, match=message):
            predict(run, input=mind(tmp_path), out=tmp_path / out)
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(TextsError, match="contains no text"):
        predict(run, input=tmp_path / "blank.txt", out=tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.ray
def test_over_ray_it_is_the_same(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces on two cores, the same shards."""
    monkeypatch.setattr(texts, "ROWS", 10)
    path = mind(tmp_path)
    quiet(run, [path], tmp_path / "here")
    lines: list[str] = []
    embed(run, input=[str(path)], out=tmp_path / "ray", workers=2, say=lines.append)
    names, _, vectors, description = read_embedded(tmp_path / "ray")
    expected = read_embedded(tmp_path / "here")
    assert (names, description["parts"]) == (expected.names, expected.description["parts"])
    np.testing.assert_allclose(vectors, expected.embeddings, atol=1e-6)
    assert "texts/s with loading and writing" in lines[-2]
    assert (tmp_path / "ray" / EMBEDDED).is_file()
