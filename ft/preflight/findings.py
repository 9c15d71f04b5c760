"""Everything that the preflight has found to be wrong, each finding with its level.

Blocking: the run would end with an error, or not reach its end, on this data and machine; the exit code is
then 2. Warning: the run would go through, but its results would suffer."""

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
    """The list; each message is in it only once."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def block(self, topic: str, message: str) -> None:
        """Add what keeps the run from starting or ending."""
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
        """The topics of the blocking findings."""
        return {finding.topic for finding in self.all if finding.level == BLOCKING}

    def as_json(self) -> list[dict[str, Any]]:
        """For preflight.json."""
        return [asdict(finding) for finding in self.all]
