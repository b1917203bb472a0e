"""Finds the places of a training step where the process would wait for a GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the operations for which a GPU would make the process wait; needs no GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        options = kwargs or {}
        is_copy = name == "_to_copy" and options.get("device", args[0].device) != args[0].device
        # A copy that does not block is waited for elsewhere, once for all; from a GPU it is pinned.
        is_copy &= not (args and getattr(args[0], "is_cuda", False) and options.get("non_blocking"))
        if name in self.NAMES or is_mask or is_copy:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_on_gpu() -> Iterator[Counter[str]]:
    """Counts the real waits on a GPU by the line of Python that caused them, as torch reports them."""
    count: Counter[str] = Counter()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                if "synchroniz" in str(warning.message):
                    count[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
