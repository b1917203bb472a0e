"""How much memory a model takes at work: in a process of its own, which has nothing else to hold."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from newsbert_ray.serving.encode import Precision

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FIRST = "random:1x64"
"""A small model, which brings the libraries in before anything is measured."""


def megabytes_at_work(
    given: str, name: str, texts: Sequence[str], *, precision: Precision = "fp32"
) -> float | None:
    """What loading a model and reading `texts` on one thread add to a process's memory at most.

    Args:
        given, name: word and name of one of `subjects.named_by`'s candidates.
        texts: what it reads, on the processor.
        precision: the encoder's numbers.
    Returns:
        Megabytes (10^6); None where the system does not tell.
    """
    if not _RESET.exists():
        return None
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_weigh, args=(there, given, name, list(texts), precision))
    process.start()
    there.close()
    try:
        return float(here.recv())
    except EOFError:
        return None  # it was ended from outside, as for want of memory
    finally:
        process.join()


def _weigh(connection: Connection, given: str, name: str, texts: Sequence[str], precision: Precision) -> None:
    import torch

    from newsbert_ray.serving.encode import Arithmetic
    from newsbert_ray.serving.subjects import named_by

    torch.set_num_threads(1)
    arithmetic = Arithmetic("cpu", precision)
    first = next(named_by(_FIRST, texts)).load(arithmetic)
    first.encoder.encode(texts[:100])
    candidate = next(one for one in named_by(given, texts) if one.name == name)
    _RESET.write_text("5")  # the peak is counted anew
    before = _kilobytes("VmRSS")
    candidate.load(arithmetic).encoder.encode(texts)
    connection.send((_kilobytes("VmHWM") - before) * 1024 / 1e6)


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
