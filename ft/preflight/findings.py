"""What the preflight has found to be wrong: all of it, each with its weight.

Blocking is what would end the run with an error, or keep it from its end, on this data and machine: the exit
code is 2 then. A warning is what the run would go through with, and its results would suffer from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BLOCKING, WARNING = "blocking", "warning"


@dataclass(frozen=True)
class Finding:
    """`topic` is a short word for programs, `message` a sentence for people."""

    level: str
    topic: str
    message: str


class Findings:
    """The list; the same message stands in it once."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def block(self, topic: str, message: str) -> None:
        """Add what the run cannot start or end with."""
        self._add(Finding(BLOCKING, topic, message))

    def warn(self, topic: str, message: str) -> None:
        """Add what the user should know."""
        self._add(Finding(WARNING, topic, message))

    def _add(self, finding: Finding) -> None:
        if finding.message not in (known.message for known in self.all):
            self.all.append(finding)

    def messages(self, level: str) -> list[str]:
        """The messages of one level."""
        return [finding.message for finding in self.all if finding.level == level]

    def blocking_topics(self) -> set[str]:
        """The topics of what blocks."""
        return {finding.topic for finding in self.all if finding.level == BLOCKING}

    def as_json(self) -> list[dict[str, Any]]:
        """For preflight.json."""
        return [asdict(finding) for finding in self.all]
