"""The tables of docs/performance.md, row by row, from the JSON files of this directory: tables.py

A test holds the page to these rows, so a figure that is measured anew has to be pasted there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Told = Mapping[str, Any]
ALL_ON = "all levers on"


def throughput(told: Told) -> Iterator[str]:
    """The figures alone: tokens/s, times the tutorial's, peak memory, final loss."""
    for name, result in told["results"].items():
        times = told["summary"]["over_tutorial"][name]
        speed, peak, loss = result["tokens_per_second"], result["peak_bytes"] / 2**30, result["loss"]
        yield f"| {speed:.0f} | {times:.1f} | {peak:.2f} GiB | {loss:.3f} |"


def generation(told: Told) -> Iterator[str]:
    for row in told["results"]:
        theirs, ours = row["seconds_transformers"], row["seconds_ours"]
        yield f"| {row['case']} | {theirs:.2f} s | {ours:.2f} s | {row['ratio']:.2f} |"


def data_scale(told: Told) -> Iterator[str]:
    """Peak memory is that of the process, and of the largest tokeniser process."""
    for row in told["results"]:
        cold, warm = row["cold"], row["warm"]
        per_row = cold["survey_cpu_s"] / row["rows"] * 1e6
        yield (
            f"| {row['rows']:,} | {cold['survey_s']:.1f} s | {per_row:.0f} µs | {warm['survey_s']:.2f} s "
            f"| {cold['plan_s']:.2f} s | {cold['rss_gb']:.2f} GB | {cold['worker_rss_gb']:.2f} GB |"
        )


def levers(told: Told) -> Iterator[str]:
    """What a step takes without the lever, and over one with all of them."""
    whole = next(row for row in told["results"] if row["lever"] == ALL_ON)
    for row in told["results"]:
        peak, larger = row["peak_bytes"] / 1e6, row["peak_bytes"] / whole["peak_bytes"]
        took = f"{row['seconds']:.2f} s | {row['times']:.2f}"
        yield f"| {row['lever']} | {took} | {peak:,.0f} MB | {larger:.2f} |"


def ops(told: Told) -> Iterator[str]:
    """Median milliseconds, forward + backward, and the library's over ours."""
    for row in told["results"]:
        contestants = [row[name] for name in ("ours", "reference", "library")]
        cells = " | ".join(f"{one['forward_ms']:.2f} + {one['backward_ms']:.2f}" for one in contestants)
        yield f"| {row['case']} | {cells} | {row['library']['both_ms'] / row['ours']['both_ms']:.2f} |"


def workers(told: Told) -> Iterator[str]:
    for result in told["results"]:
        for name, took in result["ways"].items():
            cells = " | ".join(f"{took[key]:.1f} s" for key in ("cpu_s", "serial_s", "wall_s"))
            yield f"| {result['family']}, {name} | {cells} |"


def startup(told: Told) -> Iterator[str]:
    for row in told["results"]:
        yield f"| {row['phase']} | {row['wall_s']:.1f} s | {row['cpu_s']:.1f} s |"


TABLES: dict[str, Callable[[Told], Iterator[str]]] = {
    "throughput": throughput,
    "throughput-chatglm3-160m": throughput,
    "throughput-transnormer-160m": throughput,
    "throughput-qwen2.5-0.5b": throughput,
    "generation": generation,
    "data_scale": data_scale,
    "levers": levers,
    "ops": ops,
    "workers": workers,
    "startup": startup,
}


def rows_of(name: str) -> list[str]:
    """Empty where nothing was measured yet."""
    path = HERE / f"{name}.json"
    return list(TABLES[name](json.loads(path.read_text(encoding="utf-8")))) if path.exists() else []


def main() -> None:
    for name in TABLES:
        print(f"{name}:", *rows_of(name), sep="\n")


if __name__ == "__main__":
    main()
