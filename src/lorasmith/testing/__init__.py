"""The laws of the house, for families of any package: no test framework is needed to run them."""

from __future__ import annotations

from lorasmith.testing.family import check_family
from lorasmith.testing.law import LawBroken

__all__ = ["LawBroken", "check_family"]
