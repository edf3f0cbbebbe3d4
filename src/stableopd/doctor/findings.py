"""What a check found: how dangerous it is, what was seen, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Danger = Literal["fatal", "problem", "note"]
"""`fatal`: the run would fail or collapse; `problem`: it would be worse than it need be; `note`: good to know."""

ORDER: Mapping[Danger, int] = {"fatal": 0, "problem": 1, "note": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that a check found."""

    check: str
    """Name of the check, such as `end_tokens`; stable, for programs."""
    danger: Danger
    summary: str
    """What is wrong, in one line."""
    evidence: str = ""
    """What was seen: ids, tokens, counts, an example."""
    remedy: str = ""
    """What to do, with the setting or the command."""
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def in_order(findings: list[Finding]) -> list[Finding]:
    """The most dangerous first; as found within a danger."""
    return sorted(findings, key=lambda finding: ORDER[finding.danger])
