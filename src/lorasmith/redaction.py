"""Tokens, keys and passwords, masked in every text that leaves: errors, logs, metrics, settings, --json."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

MASK = "***"
_SHORTEST = 8
"""Shorter values of the environment are words that stand elsewhere too."""
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|ACCESS_KEY)$", re.IGNORECASE)
_SHAPES = re.compile(
    r"""
    \b(?:hf_|hf_oauth_|api_org_)[A-Za-z0-9]{16,}              # Hugging Face
    | \bms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}        # ModelScope
    | \b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}                       # OpenAI and those who write like it
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,}     # GitHub
    | \bAKIA[0-9A-Z]{16}\b                                    # AWS
    | (?<=://)[^\s/@?\#]+(?=@)                                # user:password@ of an address
    | (?i:(?<=bearer\s)|(?<=basic\s))[A-Za-z0-9+/._~=-]{8,}   # Authorization: Bearer ...
    | (?i:(?<=[?&]token=)|(?<=[?&]access_token=)|(?<=[?&]api_key=)|(?<=[?&]key=)|(?<=[?&]password=)
         |(?<=[?&]signature=)|(?<=[?&]x-amz-signature=)|(?<=[?&]x-amz-security-token=))[^\s&\#"']+
    """,
    re.VERBOSE,
)


def without_secrets(text: str) -> str:
    """`text`, with *** for what has the shape of a secret or is the value of a secret in the environment."""
    for value in _of_environment():
        text = text.replace(value, MASK)
    return _SHAPES.sub(MASK, text)


def tree_without_secrets(tree: Any) -> Any:
    """The same of every text in a tree of dicts and lists, keys included."""
    if isinstance(tree, str):
        return without_secrets(tree)
    if isinstance(tree, dict):
        return {tree_without_secrets(key): tree_without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [tree_without_secrets(value) for value in tree]
    return tree


def _of_environment() -> Iterator[str]:
    """The longest first: one may be the beginning of another."""
    values = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    yield from sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
