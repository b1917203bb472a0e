"""How a group's first worker speaks to whoever follows the group: entries in the cluster's own table of keys.

The follower and the worker may stand on machines that share no disk. An entry goes as soon as it is read.
"""

from __future__ import annotations

import json
import time
from typing import Any

_SPACE = b"newsbert-entries"


def send_entry(group: str, entry: dict[str, Any]) -> None:
    """Leave `entry` (JSON values) for the follower of `group`."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{group}/{time.time_ns():020d}", json.dumps(entry), namespace=_SPACE)


def take_entries(group: str) -> list[dict[str, Any]]:
    """The entries that `group` has left since the last call, in the order of their sending.

    None while the cluster's head does not answer: they stay there for the next call.
    """
    from ray.exceptions import RpcError
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

    found = []
    try:
        for key in sorted(_internal_kv_list(f"{group}/", namespace=_SPACE)):
            value = _internal_kv_get(key, namespace=_SPACE)
            _internal_kv_del(key, namespace=_SPACE)
            if value:
                found.append(json.loads(value))
    except (RpcError, ConnectionError):
        return found
    return found


def forget_entries(group: str) -> None:
    """Remove whatever `group` has left."""
    from ray.exceptions import RpcError
    from ray.experimental.internal_kv import _internal_kv_del

    try:
        _internal_kv_del(f"{group}/", del_by_prefix=True, namespace=_SPACE)
    except (RpcError, ConnectionError):
        return
