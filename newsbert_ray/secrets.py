"""Masks passwords, keys and tokens in everything that is printed, logged or written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MASK = "***"

_SECRET_WORD = re.compile(
    r"(api|access|secret)?key|.*token|.*(password|passwd|passphrase|pwd)|.*secrets?|.*credentials?"
    r"|authorization|sig(nature)?"
)
_LOCATION_WORDS = ("path", "file", "mode")
"""Last words of a name that says where a secret is stored or how it is used; its value is no secret."""
_SHELL_FOLDERS = ("PWD", "OLDPWD")
_SHORTEST_SECRET = 8
"""Characters of a secret in the environment; masking a shorter one would mask ordinary words."""
_FIELD = re.compile(r"([\w.-]+)=([^&\s]+)")
_QUERY_FIELD = re.compile(r"([\w.-]+)=([^&]+)")
# Passwords up to the last @, because one that was not percent-encoded may contain an @.
_PASSWORD_IN_URL = re.compile(r"(://[^:@/?#\s]*):(\S*)@")
_USER_IN_URL = re.compile(r"(?<!abfs)(?<!abfss)://[^:@/?#\s]+@")
"""A user without a password may be a token. In an Azure URL it is the container's name."""
_AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]{8,}")


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret: `api_key`, `hfToken`; not `max_tokens`."""
    words = re.split(r"[_.-]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    return any(map(_SECRET_WORD.fullmatch, words)) and words[-1] not in _LOCATION_WORDS


def find_secrets(url: str) -> list[str]:
    """The secrets in a URL: its password, and the values of query fields such as `secret_key`."""
    passwords = re.findall(r"://[^:@/?#]*:(.*)@", url, flags=re.DOTALL)
    fields = _QUERY_FIELD.findall(url.partition("?")[2])
    return [*passwords, *(value for name, value in fields if is_secret_name(name))]


def mask_url(url: str) -> str:
    """A URL with its secrets masked; the user name stays."""
    url = re.sub(r"(://[^:@/?#]*):.*@", rf"\1:{MASK}@", url, flags=re.DOTALL)
    head, mark, query = url.partition("?")
    return head + mark + _QUERY_FIELD.sub(_mask_field, query)


def mask_text(text: str) -> str:
    """A text without passwords, tokens, secret fields, and secrets of this process's environment."""
    text = _PASSWORD_IN_URL.sub(rf"\1:{MASK}@", text)
    text = _USER_IN_URL.sub(f"://{MASK}@", text)
    text = _AUTHORIZATION.sub(rf"\1 {MASK}", text)
    text = _FIELD.sub(_mask_field, text)
    for name, value in os.environ.items():
        is_present = len(value) >= _SHORTEST_SECRET and value in text
        if is_present and name not in _SHELL_FOLDERS and is_secret_name(name):
            text = text.replace(value, MASK)
    return text


def mask_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with every secret masked: by the name of a field, or by the form of a text in it."""
    return {str(name): _mask_value(value, str(name)) for name, value in fields.items()}


def _mask_value(value: Any, name: str = "") -> Any:
    if value is not None and not isinstance(value, bool) and is_secret_name(name):
        return MASK
    if isinstance(value, Mapping):
        return mask_fields(value)
    if isinstance(value, str | Path | BaseException):
        return mask_text(str(value))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_mask_value(item) for item in value]
    return value


def _mask_field(field: re.Match[str]) -> str:
    return f"{field[1]}={MASK}" if is_secret_name(field[1]) else field[0]
