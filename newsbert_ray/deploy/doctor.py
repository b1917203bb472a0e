"""`newsbert-ray doctor`: is all here for a run, a sweep, a submission; what is not, and what mends it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from newsbert_ray.deploy.access import check_cluster, check_token
from newsbert_ray.deploy.contact import ADDRESS_VARIABLE
from newsbert_ray.deploy.finding import Finding
from newsbert_ray.deploy.inputs import check_shards, check_teacher
from newsbert_ray.deploy.machine import check_devices, check_storage, check_versions
from newsbert_ray.deploy.ports import check_ports


class DoctorError(RuntimeError):
    """There is something to mend; the text says how much."""


def doctor(
    *,
    data: str | None = None,
    out: str | None = None,
    address: str | None = None,
    teacher: str | None = None,
    deep: bool = False,
) -> Iterator[Finding]:
    """Look at everything that a run needs, one finding after another; changes nothing.

    Args:
        data: folder of shards to look at.
        out: where results are to go, a folder or a URL; the folder at hand by default.
        address: the cluster, http(s)://HOST:PORT of its dashboard or HOST:PORT of its head; RAY_ADDRESS or
            RAY_API_SERVER_ADDRESS by default.
        teacher: the encoder that is to teach, a folder, a Hugging Face name or `scratch`.
        deep: compare each shard's hash too; reads them all.
    """
    named = (os.environ.get(name, "").strip() for name in ("RAY_ADDRESS", ADDRESS_VARIABLE))
    address = address or next((found for found in named if found), None)
    home, environment = Path.home(), dict(os.environ)
    yield from check_versions(Path(__file__).parents[2])
    yield from check_devices()
    yield from check_storage(out)
    yield from check_ports()
    yield from check_token(address, environment, home=home)
    yield from check_cluster(address, environment, home=home)
    if data is not None:
        yield from check_shards(data, deep=deep)
    if teacher is not None:
        yield from check_teacher(teacher, data)
