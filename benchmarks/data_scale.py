"""What a row of training data costs, from ten thousand rows to a million: data_scale.py [--quick]

Rows in a persona's style (short, Chinese and English, some twice, some with another answer) are generated
from a seed, then read, checked and encoded with the embedded model's tokenizer and chat template, cold and
from the cache, and planned: a Loader over them gives 200 steps. Every size runs in two fresh processes, so
that peak memory is its own. CPU time is that of all processes: it says what a row costs also where other
programs run. Writes data_scale.json and data_scale.png beside this file, with --sizes only these sizes anew;
--quick does ten thousand rows and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from lorasmith.batching.fingerprint import fingerprint
from lorasmith.batching.loader import Loader
from lorasmith.config import DataConfig
from lorasmith.data.survey import survey
from lorasmith.families.opening import open_chat

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
STEPS = 200
LIMIT_GB = 2.0
HERE = Path(__file__).resolve().parent
_SUBJECTS = ("你", "皇上", "the dragon", "my sword", "今夜的月色", "our tea", "the old library", "臣妾", "雪")
_VERBS = (
    "喜欢什么",
    "remembers the rain",
    "在哪里",
    "sings softly",
    "是谁",
    "cannot sleep",
    "为何不语",
    "waits",
)
_ENDINGS = ("？", "!", "，说来听听。", " tonight?", "……", " in winter.", "，可好？", "...")
_ANSWERS = (
    "不过是",
    "I would say ",
    "本宫以为",
    "Listen: ",
    "倒也罢了，",
    "Every road ",
    "四郎，那年",
    "Quietly, ",
)


def rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """One row in fifty repeats an earlier one, one in fifty answers an earlier question otherwise."""
    chance = random.Random(seed)
    earlier: list[dict[str, str]] = []
    for number in range(count):
        draw = chance.random()
        if earlier and draw < 0.02:
            row = chance.choice(earlier)
        elif earlier and draw < 0.04:
            row = {**chance.choice(earlier), "output": _text(chance, _ANSWERS, 3)}
        else:
            question = f"{_text(chance, _SUBJECTS, 2)}{number}"
            row = {"instruction": question, "output": _text(chance, _ANSWERS, chance.randint(2, 6))}
        if len(earlier) < 1000:
            earlier.append(row)
        yield row


def _text(chance: random.Random, openings: Sequence[str], parts: int) -> str:
    words = (chance.choice((*_SUBJECTS, *_VERBS)) + chance.choice(_ENDINGS) for _ in range(parts))
    return chance.choice(openings) + "".join(words)


def write_rows(path: Path, count: int) -> None:
    """As one JSON array, the harder kind of file to read piece by piece."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows(count)):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")


def measure(path: Path, workers: int | None) -> dict[str, Any]:
    """One pass over the rows in this process: the cache decides whether it is the cold or the warm one."""
    chat_format = open_chat(Path(str(resources.files("lorasmith") / "assets/tiny")))[1]
    start, cpu_before = time.perf_counter(), sum(os.times()[:4])
    found = survey(str(path), DataConfig(train=str(path)), chat_format, workers=workers)
    encoded, cpu_seconds = time.perf_counter(), sum(os.times()[:4])
    digest = fingerprint(found.examples)
    digested = time.perf_counter()
    loader = Loader(found.examples, batch_size=16, max_tokens=4096, seed=0, shuffle=True)
    planned = sum(len(batch.input_ids) for n in range(STEPS) for batch in loader.step(n))
    end = time.perf_counter()
    tokens = found.report.tokens
    assert tokens is not None
    assert planned > 0
    return {
        "survey_s": encoded - start,
        "survey_cpu_s": cpu_seconds - cpu_before,
        "fingerprint_s": digested - encoded,
        "plan_s": end - digested,
        "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "worker_rss_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
        "tokens": tokens.total,
        "duplicates": len(found.report.findings.duplicates),
        "conflicts": len(found.report.findings.conflicts),
        "fingerprint": digest,
    }


def measure_size(count: int, directory: Path, workers: int | None) -> dict[str, Any]:
    path = directory / f"rows-{count}.json"
    write_rows(path, count)
    environment = os.environ | {"LORASMITH_CACHE": str(directory / "cache")}
    command = [sys.executable, __file__, "--measure", str(path)]
    command += [] if workers is None else ["--workers", str(workers)]
    cold, warm = (
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        for _ in range(2)
    )
    same = ("tokens", "duplicates", "conflicts", "fingerprint")
    assert [cold[name] for name in same] == [warm[name] for name in same], "warm is not cold"
    result = {"rows": count, "file_mb": path.stat().st_size / 1e6, "cold": cold, "warm": warm}
    path.unlink()
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Per row in microseconds: wall time, and CPU time of all processes."""
    columns = ("rows", "cold", "wall/row", "CPU/row", "warm", "CPU/row", "plan", "cold peak", "warm peak")
    lines = ["".join(f"{name:>11}" for name in columns)]
    for result in results:
        count, cold, warm = result["rows"], result["cold"], result["warm"]
        cells = (
            f"{count:,}",
            f"{cold['survey_s']:.1f} s",
            f"{cold['survey_s'] / count * 1e6:.0f} us",
            f"{cold['survey_cpu_s'] / count * 1e6:.0f} us",
            f"{warm['survey_s']:.2f} s",
            f"{warm['survey_cpu_s'] / count * 1e6:.1f} us",
            f"{cold['plan_s']:.2f} s",
            f"{cold['rss_gb']:.2f} GB",
            f"{warm['rss_gb']:.2f} GB",
        )
        lines.append("".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    counts = [result["rows"] for result in results]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label, colour in (
        ("cold", "read, check, encode", "#d1572a"),
        ("warm", "from the cache", "#2a6fd1"),
    ):
        per_row = [result[name]["survey_cpu_s"] / result["rows"] * 1e6 for result in results]
        left.plot(counts, per_row, marker="o", color=colour, label=label)
        memory = [result[name]["rss_gb"] for result in results]
        right.plot(counts, memory, marker="o", color=colour, label=label)
    left.set(title="CPU time per row, all processes", ylabel="microseconds", yscale="log", ylim=(0.1, 1000))
    right.set(title="Peak memory of the process", ylabel="GB", ylim=(0, LIMIT_GB * 1.1))
    right.axhline(LIMIT_GB, color="#888888", linestyle="--", linewidth=1)
    right.annotate(
        "limit", (counts[0], LIMIT_GB), xytext=(0, -12), textcoords="offset points", color="#555555"
    )
    for axes in (left, right):
        axes.set(xscale="log", xlabel="rows")
        axes.set_xticks(counts, [f"{count // 1000:,}k" if count < 10**6 else "1M" for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


def machine() -> dict[str, Any]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(": ")[2] if names else platform.processor()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true")
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options.add_argument("--workers", type=int)
    options.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.workers)))
        return
    with tempfile.TemporaryDirectory() as directory:
        for count in SIZES[:1] if chosen.quick else chosen.sizes:
            result = measure_size(count, Path(directory), chosen.workers)
            print(table([result]), flush=True)
            if not chosen.quick:
                keep(result)


def keep(result: dict[str, Any]) -> None:
    """Into the table of all sizes, in place of what was measured for this one before."""
    path = HERE / "data_scale.json"
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    others = [other for other in known if other["rows"] != result["rows"]]
    stamped = result | {"date": date.today().isoformat(), "machine": machine()}
    results = sorted([*others, stamped], key=lambda other: int(other["rows"]))
    path.write_text(json.dumps({"steps": STEPS, "results": results}, indent=1) + "\n", encoding="utf-8")
    draw(results, HERE / "data_scale.png")


if __name__ == "__main__":
    main()
