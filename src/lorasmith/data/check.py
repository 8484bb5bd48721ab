"""What a data set holds and what is odd about it, as one report that the screen and --json share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorasmith.batching.columns import Examples
from lorasmith.rows.findings import Findings
from lorasmith.rows.records import BadRow, head
from lorasmith.types import Ints

_BARS = 16
_PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Lengths in input ids, one per conversation. `bars` are (from, up to, conversations), equally wide."""

    total: int
    supervised: int
    shortest: int
    longest: int
    mean: float
    percentiles: Mapping[str, int]
    bars: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything that `lorasmith data check` and `stats` know about one source."""

    source: str
    format: str
    format_reason: str
    rows: int
    conversations: int
    """Rows that can be trained on, before the length limit."""
    bad_rows: tuple[BadRow, ...]
    ignored_columns: Mapping[str, int]
    findings: Findings
    tokens: TokenStats | None
    """None where there is no good row."""
    max_length: int | None
    over_length: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...] = ()

    @property
    def bad_by_rule(self) -> dict[str, int]:
        return dict(Counter(row.rule for row in self.bad_rows).most_common())

    def to_json(self) -> dict[str, Any]:
        findings = asdict(self.findings) | {"conflicting_rows": self.findings.conflicting_rows}
        return asdict(self) | {"findings": findings, "bad_by_rule": self.bad_by_rule}


def token_stats(examples: Examples) -> TokenStats | None:
    if not examples:
        return None
    lengths = examples.lengths
    values = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    return TokenStats(
        total=int(lengths.sum()),
        supervised=int(examples.target_counts.sum()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=round(float(lengths.mean()), 2),
        percentiles={f"p{share}": int(value) for share, value in zip(_PERCENTILES, values, strict=True)},
        bars=_bars(lengths),
    )


def over_length_rows(examples: Examples, max_length: int | None) -> tuple[tuple[str, int], ...]:
    """(origin, tokens) of every longer row."""
    if max_length is None:
        return ()
    longer = np.flatnonzero(examples.lengths > max_length)
    return tuple(zip(examples.origins(longer), examples.lengths[longer].tolist(), strict=True))


def describe(findings: Findings, ignored_columns: Mapping[str, int], renamed_typos: int) -> tuple[str, ...]:
    """The findings as one line each, for people."""
    lines = [f"column {head(name)} is not read ({rows:,} rows)" for name, rows in ignored_columns.items()]
    if renamed_typos:
        lines.append(f"column 'instrution' is read as 'instruction' ({renamed_typos:,} rows)")
    if findings.duplicates:
        row, earlier = findings.duplicates[0]
        lines.append(f"{len(findings.duplicates):,} rows repeat an earlier row, e.g. {row} = {earlier}")
    if findings.conflicts:
        first = findings.conflicts[0]
        count = f"{len(findings.conflicts):,} prompts have different answers"
        where = " and ".join(first.origins[:2])
        lines.append(f"{count} ({findings.conflicting_rows:,} rows), e.g. {where}")
    kinds = [
        (findings.special_tokens, "the text of a special token; it stays plain text"),
        (findings.role_markers, "reads like a turn of this chat format"),
        (findings.invisible, "an invisible character"),
    ]
    for found, meaning in kinds:
        lines += [
            f"{head(sign)} in {len(rows):,} rows, e.g. {rows[0]}: {meaning}" for sign, rows in found.items()
        ]
    return tuple(lines)


def _bars(lengths: Ints) -> tuple[tuple[int, int, int], ...]:
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BARS))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, bins=edges)
    return tuple(
        (int(start), int(start) + width - 1, int(count)) for start, count in zip(edges, counts, strict=False)
    )
