"""Patterns of an adapter from elsewhere, tried on a model's names in a process that can be killed.

`(a+)+$` takes Python's `re` longer than the universe has, and nothing in the same process can stop it. So
peft only matches patterns that have ended here, on the same names.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorasmith.errors import SetupError

_CPU_SECONDS = 2
_WALL_SECONDS = 20
"""A machine that is busy gives a process a part of its time; where CPU time cannot be limited, this holds."""
_PLAIN = re.compile(r"[\w.]*")
_PROGRAM = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({_CPU_SECONDS}, {_CPU_SECONDS}))
except (ImportError, OSError, ValueError):
    pass
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        matches = re.compile(pattern).match
        for name in names:
            matches(name)
    except (re.error, OverflowError, RecursionError) as error:
        print(json.dumps([pattern, str(error)]))
        break
"""


def try_patterns(config: Mapping[str, Any], names: Iterable[str], *, where: str) -> None:
    """Match every pattern of a LoRA config as peft does it.

    Raises: SetupError for a pattern that is no regex or takes too long.
    """
    patterns = list(_as_peft_matches(config))
    if not patterns:
        return
    request = json.dumps([patterns, list(names)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=request,
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(where, f"they take longer than {_WALL_SECONDS} seconds to match") from None
    if done.stdout:
        pattern, problem = json.loads(done.stdout)
        raise _refused(where, f"{pattern[:80]!r} is no regex: {problem}")
    if done.returncode != 0:
        raise _refused(where, f"they take longer than {_CPU_SECONDS} seconds to match")


def _as_peft_matches(config: Mapping[str, Any]) -> Iterator[str]:
    """Source: check_target_module_exists and get_pattern_key of peft 0.21."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield from _not_plain([config[key]], "(?:{})$")
    yield from _not_plain(config.get("modules_to_save") or (), r"(^|.*\.){}($|\..*)")
    layers = config.get("layers_pattern") or ()
    yield from _not_plain([layers] if isinstance(layers, str) else layers, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
    tables = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    yield from _not_plain(tables, r"(.*\.)?({})$")


def _not_plain(patterns: Iterable[str], form: str) -> Iterator[str]:
    before, after = form.split("{}")
    yield from (before + pattern + after for pattern in patterns if not _PLAIN.fullmatch(pattern))


def _refused(where: str, why: str) -> SetupError:
    return SetupError(
        "the adapter's name patterns are refused",
        where=where,
        why=why,
        fix="write target_modules as a list of names",
    )
