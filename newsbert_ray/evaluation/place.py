"""Where scoring happens, on which worker of how many, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Top

Scores = dict[str, dict[str, float]]
Models = Mapping[str, tuple[Encoder, Top]]


@dataclass(frozen=True)
class Place:
    """Where this worker computes: its device, and its rank among `size` workers."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def mine(self, number: int) -> bool:
        """Whether the piece of work with this number is this worker's."""
        return number % self.size == self.rank

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all workers; exact where each entry is one worker's and 0 elsewhere."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values


@dataclass
class Pace:
    """What one worker's scoring of a split costs: titles, and each model's seconds from token ids at hand to
    news embedding (and topic logits). Reading, copying to the device and counting are left out.

    The models take turns on the same batches, in fp32 and with the run's threads. It is one pass on a machine
    that may be busy with other trials: the ratio of the two speeds holds, each of them may not.
    """

    titles: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def speed(self) -> dict[str, float]:
        """`student_titles_per_second`, and where a teacher was scored `teacher_titles_per_second` and
        `times_teacher`: theirs divided."""
        rates = {name: self.titles / max(1e-9, seconds) for name, seconds in self.seconds.items()}
        named = {f"{name}_titles_per_second": rate for name, rate in rates.items()}
        return (
            {**named, "times_teacher": rates["student"] / rates["teacher"]} if "teacher" in rates else named
        )

    def charge(self, name: str, began: float, device: torch.device) -> None:
        """Add the time since `began` to a model's."""
        self.seconds[name] = self.seconds.get(name, 0.0) + device_seconds(device) - began


def device_seconds(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """What a record calls it: cpu, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
