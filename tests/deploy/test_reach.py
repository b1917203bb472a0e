from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import SettingsError
from newsbert_ray.deploy.package import check_reach, check_words, find_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a search space that is sent, and shards and a run that are not."""
    for name in ("spaces/a.yaml", "shards/manifest.json", "runs/a/record.json", "corpus/news.tsv"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True)
        path.write_text("x")
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "shards"}, r"--data shards: the cluster cannot see it.*--include /shards/$"),
        ({"data": "./shards/"}, r"--data \./shards/: .*--include /shards/$"),
        ({"run": "runs/a"}, r"the run runs/a: the cluster cannot see it"),
        ({"data": "nowhere"}, r"--data nowhere: not in .*project, which is sent"),
        ({"source": ["corpus", "shards"]}, r"--source shards: "),
        ({"folders": ["s3://b/x", "runs"]}, r"the folder runs: "),
        ({"input": ["corpus/news.tsv", "runs/a/news.tsv"]}, r"--input runs/a/news\.tsv: not in"),
        ({"vectors": "runs/a"}, r"the vectors runs/a: the cluster cannot see it"),
        ({"teacher": "shards"}, r"--teacher shards: the cluster cannot see it"),
        ({"config": "run.yaml"}, r"--config run\.yaml: not in"),
        ({"data": "../other"}, r"--data \.\./other: not in"),
        ({"out": "runs/b"}, r"--out runs/b: would lie in the job's own folder .*s3://BUCKET"),
        ({"submission": "p.zip"}, r"--submission p\.zip: would lie in the job's own folder"),
    ],
)
def test_what_the_cluster_cannot_see_is_refused(values: dict[str, Any], message: str, root: Path) -> None:
    """Found out on the cluster, it is a failed job some minutes later; for --out, results that are gone."""
    with pytest.raises(SettingsError, match=message):
        check_reach(values, find_files(root))


def test_what_the_cluster_can_see_passes(root: Path) -> None:
    """What is sent, what has a URL, and a name of Hugging Face's need no shared disk."""
    values = {
        "space": "spaces/a.yaml",
        "data": "s3://bucket/shards",
        "source": ["corpus"],
        "teacher": "bert-base-uncased",
        "out": "gs://bucket/out",
        "config": None,
    }
    assert check_reach(values, find_files(root)) == []
    assert check_reach({"data": "shards"}, find_files(root, include=["/shards/"])) == []


def test_absolute_paths_are_pointed_out(root: Path) -> None:
    """They may lie on a disk that all nodes share: the person knows, not we."""
    lines = check_reach({"data": "/mnt/shards", "out": "~/runs/b"}, find_files(root))
    assert lines == ["note: every node must see --data /mnt/shards, --out ~/runs/b at that path"]


@pytest.mark.parametrize(
    "word",
    [
        "s3://AKIA123:wJalr@bucket/out",
        "--search.storage=mysql://me:hunter2@host/db",
        "s3://bucket/out?secret_key=hunter2&region=x",
        "https://host/file?X-Amz-Security-Token=hunter2",
    ],
)
def test_secret_in_a_word_is_refused_and_not_repeated(word: str) -> None:
    """Ray shows a job's command to everybody who may list jobs, and writes it into its log."""
    with pytest.raises(SettingsError, match="shown to everybody") as caught:
        check_words(["sweep", word], {})
    assert "hunter2" not in str(caught.value)
    assert "wJalr" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "PGPASSWORD", "OPENAI_API_KEY", "key"]
)
def test_secret_in_the_environment_is_refused(name: str) -> None:
    """A job's environment stands in its description."""
    with pytest.raises(SettingsError, match=rf"--env {name}: .*shown to everybody") as caught:
        check_words([], {name: "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_what_is_no_secret_passes() -> None:
    """An endpoint, a region and ordinary settings must not be refused for their looks."""
    variables = {"AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu", "HF_HOME": "/shared/keys"}
    words = ["sweep", "--out", "s3://bucket/a?endpoint_override=http://store:9000", "--vary", "seeds=0,1"]
    check_words([*words, "--token_budget", "4096", "--search.storage", "sqlite:////shared/a.db"], variables)
