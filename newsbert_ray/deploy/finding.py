"""What the doctor says of one thing: that it is fit, that it is worth knowing, or what to mend and how."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["ok", "note", "mend"]


class Finding(NamedTuple):
    """One line: its `topic` (versions, devices, ...), what was `found`, and the `cure`, always for `mend`."""

    topic: str
    state: State
    found: str
    cure: str = ""


class Topic:
    """Collects the findings of one topic, in order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.findings: list[Finding] = []

    def ok(self, found: str) -> None:
        """Fit as it is."""
        self.findings.append(Finding(self._name, "ok", found))

    def note(self, found: str, cure: str = "") -> None:
        """Worth knowing; nothing fails for it."""
        self.findings.append(Finding(self._name, "note", found, cure))

    def mend(self, found: str, cure: str) -> None:
        """Something will fail or is open to others, until `cure`."""
        self.findings.append(Finding(self._name, "mend", found, cure))
