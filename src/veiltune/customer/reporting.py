"""What a run tells about its progress; the command line draws bars from it, everyone else may stay silent."""

from __future__ import annotations

from veiltune.customer.training import Progress


class Reporter:
    """Hears what happens and says nothing; override what you want to show."""

    def phase(self, name: str, total: int) -> None:
        """A phase of so many units begins: privatize, upload, train, evaluate or predict."""

    def advance(self, done: int) -> None:
        """So many units of the phase are done."""

    def step(self, progress: Progress, *, bytes_sent: int, releases: int) -> None:
        """A training step is done."""
