"""Check: one line of a report, and how a check that fails in any way becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorasmith.errors import LorasmithError, printable
from lorasmith.testing.law import LawBroken

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    """Empty if there is nothing to do."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", printable(self.found))


Examine: TypeAlias = Callable[[], Check | Iterable[Check]]


def guarded(name: str, examine: Examine) -> Iterator[Check]:
    """The checks that `examine` gives; where it raises, a failed check called `name` in place of the rest."""
    try:
        found = examine()
        yield from [found] if isinstance(found, Check) else found
    except LorasmithError as error:
        yield Check(name, "fail", _one_line(error.what, error.why, error.where), _one_line(error.fix))
    except LawBroken as error:
        yield Check(name, "fail", _one_line(str(error)), "do not train with this; then please report it")
    except Exception as error:  # whatever a broken machine or file makes libraries raise is a finding
        reason = _one_line(f"{type(error).__name__}: {error}")
        yield Check(name, "fail", reason, "the check itself could not run: please report it")


def worst(checks: Sequence[Check]) -> Status:
    """The gravest status there is."""
    order: tuple[Status, ...] = ("fail", "warn", "ok")
    return next((status for status in order if any(c.status == status for c in checks)), "ok")


def _one_line(*parts: str) -> str:
    text = "; ".join(" ".join(part.split()) for part in parts if part)
    return text if len(text) <= 300 else text[:297] + "..."
