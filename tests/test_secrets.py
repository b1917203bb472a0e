"""Secrets are masked by name and by form; ordinary settings and URLs stay readable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.secrets import find_secrets, is_secret_name, mask_fields, mask_text, mask_url


@pytest.mark.parametrize(
    "name",
    ["token", "api_key", "AWS_SECRET_ACCESS_KEY", "hfToken", "db.password", "X-Api-Key", "credentials"],
)
def test_fields_named_like_a_secret_are_masked(name: str) -> None:
    """A log is the first thing that people send to others."""
    assert mask_fields({"settings": {name: "hunter2"}}) == {"settings": {name: "***"}}


@pytest.mark.parametrize(
    "name", ["max_tokens", "tokenizer", "keep", "monkey", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"]
)
def test_similar_names_are_not_masked(name: str) -> None:
    """A log with `max_tokens` masked does not show how long the titles were."""
    assert mask_fields({name: "30"}) == {name: "30"}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mysql://me:p@ss/w@host/db failed", "mysql://me:***@host/db failed"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("s3://a:b@bucket/x?access_key_id=c&region=d e", "s3://a:***@bucket/x?access_key_id=***&region=d e"),
        ("GET s3://b/x?X-Amz-Signature=ab12&y=1", "GET s3://b/x?X-Amz-Signature=***&y=1"),
        ("header Authorization: Bearer ab12cd34ef", "header Authorization: Bearer ***"),
        ("postgresql://h/db?user=me&password=hunter2", "postgresql://h/db?user=me&password=***"),
        (
            "s3://bucket/runs/beta=0.1,seed=0 at 10.0.0.5:6379",
            "s3://bucket/runs/beta=0.1,seed=0 at 10.0.0.5:6379",
        ),
    ],
)
def test_secrets_in_texts_are_masked(text: str, masked: str) -> None:
    """An error's message quotes the URL that it failed at, with the password in it."""
    assert mask_text(text) == masked


def test_environment_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries put a refused token into their messages, without a name in front of it."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee" * 8)
    assert mask_text("refused " + "c0ffee" * 8) == "refused ***"


def test_the_working_directory_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells call it PWD: each path under it would be hidden from the log and from a list of jobs."""
    monkeypatch.setenv("PWD", "/home/anna/news")
    monkeypatch.setenv("DB_PWD", "/unlikely/but/a/password")
    assert mask_text("/home/anna/news/shards") == "/home/anna/news/shards"
    assert mask_text("/unlikely/but/a/password") == "***"


@pytest.mark.parametrize(
    "name", ["sslpassword", "X-Amz-Signature", "X-Amz-Credential", "sig", "access_key", "session_token"]
)
def test_fields_of_urls_are_secret_names(name: str) -> None:
    """A signed URL is as good as a password."""
    assert is_secret_name(name)
    assert mask_url(f"s3://b/x?region=eu&{name}=hunter2") == f"s3://b/x?region=eu&{name}=***"
    assert find_secrets(f"s3://b/x?region=eu&{name}=hunter2") == ["hunter2"]


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/key=3/x?region=eu&endpoint_override=http://store:9000",
        "abfs://container@account.dfs.core.windows.net/runs",
        "postgresql://me@host/db",
        "sqlite:///study.db",
    ],
)
def test_urls_without_a_secret_stay(url: str) -> None:
    """A URL that is masked by mistake is refused, or cannot be used again."""
    assert mask_url(url) == url
    assert find_secrets(url) == []


def test_an_azure_container_is_no_token() -> None:
    """Its name is at the position of a user in other URLs."""
    assert mask_text("abfs://container@account/x") == "abfs://container@account/x"


@given(secret=st.text(st.characters(codec="utf-8", exclude_characters="*"), min_size=4, max_size=12))
def test_no_password_is_ever_shown(secret: str) -> None:
    """A password with a character that nobody thought of would be shown."""
    url = f"a://b:{secret}@c/d"
    assert mask_url(url) == "a://b:***@c/d"
    assert find_secrets(url) == [secret]
