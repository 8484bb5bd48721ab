"""What a law says when it is broken."""

from __future__ import annotations


class LawBroken(AssertionError):
    """A family breaks `law`; the message shows the case that it breaks on."""

    def __init__(self, law: str, case: str) -> None:
        super().__init__(f"{law}: {case}")
        self.law = law


def require(held: bool, law: str, case: str) -> None:
    """Raises: LawBroken unless `held`."""
    if not held:
        raise LawBroken(law, case)
