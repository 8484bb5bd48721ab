"""What a run asks of its data: the training room sees flat rows, never records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lorasmith.types import Batch

Alone = Sequence[tuple[str, Batch]]
"""The conversations of a step: where each came from, and the flat row that it makes for itself."""


class StepSource(Protocol):
    """The data of step n, as a pure function of n."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step(self, n: int, max_tokens: int | None = None) -> Sequence[Batch]:
        """Its flat rows, each of at most `max_tokens` where its conversations allow; None: as configured."""
        ...

    def alone(self, n: int) -> Alone:
        """Its conversations, each in a row of its own, with where it came from."""
        ...
