"""How the doctor's findings are read in tests."""

from __future__ import annotations

from newsbert_ray.deploy.doctor import Finding


def ill(findings: list[Finding]) -> list[Finding]:
    """What is to mend; each with a cure."""
    found = [finding for finding in findings if finding.state == "mend"]
    assert all(finding.cure for finding in found)
    return found


def the_one_to_mend(findings: list[Finding]) -> Finding:
    """The only finding to mend."""
    (found,) = ill(findings)
    return found


def notes(findings: list[Finding]) -> str:
    """What is worth knowing, as one text."""
    return "\n".join(f"{finding.found} | {finding.cure}" for finding in findings if finding.state == "note")
