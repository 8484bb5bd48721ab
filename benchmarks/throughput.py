"""Who trains how fast: the tutorial's script, an expert's, TRL, LLaMA-Factory and Lorasmith, alternating.

    python benchmarks/throughput.py --shape llama-160m --rounds 3 --out benchmarks/throughput.json

One random model, 128 rows, 16 rows per optimizer step, every contestant in a fresh process, every round all
of them in turn; medians over the rounds. README.md beside this file says how the environments are made.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from throughput_cases import NEEDS, SHAPES, pad_id, write_model, write_rows
from throughput_jobs import (
    BY_NAME,
    CONTESTANTS,
    PACKING_SETTINGS,
    SHARES_PREFIXES,
    Contestant,
    Setting,
    run,
)
from throughput_report import best_rate, draw, medians, misses, summary, table

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
TITLES = {contestant.name: contestant.title for contestant in CONTESTANTS}
GEMM = Contestant("gemm", "GEMM rate", "gemm_rate.py", {"rows": 850})
LOSS_BEFORE = Contestant("loss-before", "untrained", "loss_before.py")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "lorasmith")


def main() -> int:
    asked = _arguments()
    for path in (asked.data, asked.tokenizer):
        if not path.exists():
            print(f"{path} is not there.\n{NEEDS}", file=sys.stderr)
            return 4
    chosen = _chosen(asked)
    with tempfile.TemporaryDirectory() as scratch:
        setting = _prepare(asked, Path(scratch))
        dtype = asked.dtype if asked.dtype != "auto" else faster_dtype(setting)
        searched: dict[str, list[dict[str, Any]]] = {}
        if asked.search:
            chosen = [_at_its_best(c, setting, dtype, searched) for c in chosen]
        rounds, gemms = _rounds(setting, chosen, dtype, asked.rounds)
        loss_before = run(LOSS_BEFORE, setting, dtype)["loss"]
    results = {c.name: medians(rounds[c.name]) for c in chosen}
    gemm = _usual(gemms)
    told = summary(results, gemm, dtype, loss_before)
    report = {
        **_circumstances(asked, dtype),
        "shape_title": SHAPES[asked.shape].title,
        "options": {c.name: dict(c.options) for c in chosen},
        "searched": searched,
        "summary": told,
        "gemm": gemm,
        "results": results,
        "rounds": rounds,
    }
    asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    draw(report, TITLES, asked.out.with_suffix(".png"))
    print(table(results, TITLES, told))
    if "utilisation" in told:
        print(f"Lorasmith runs at {told['utilisation']:.0%} of the GEMM rate measured in this run.")
    short = misses(told) if asked.shape == "llama-160m" else []
    print("\n".join(f"SHORT: {line}" for line in short))
    return 1 if short and asked.require else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-160m")
    parser.add_argument(
        "--vocab", type=int, help="another vocabulary size, e.g. 102400 (no id is folded then)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=16, help="timed optimizer steps; 8 are one pass of 128 rows"
    )
    parser.add_argument("--warm-up", type=int, default=1, help="optimizer steps before those")
    parser.add_argument("--num-rows", type=int, default=128)
    parser.add_argument("--contestants", default="all", help="comma-separated: " + ", ".join(BY_NAME))
    parser.add_argument(
        "--search",
        action="store_true",
        help="try settings of the trainers that pack first; the fastest it is",
    )
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, help="for every contestant; torch's own choice without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=SHARED / "datasets/huanhuan.json")
    tokenizer = SHARED / "tokenizers/deepseek-llm/tokenizer.rebuilt.json"
    parser.add_argument("--tokenizer", type=Path, default=tokenizer)
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment with TRL")
    parser.add_argument("--llamafactory-python", help="the same with LLaMA-Factory; left out without it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/throughput.json")
    parser.add_argument("--require", action="store_true", help="exit 1 if the Llama 160M misses its marks")
    return parser.parse_args()


def _chosen(asked: argparse.Namespace) -> list[Contestant]:
    if asked.contestants == "all":
        absent = set() if asked.llamafactory_python else {"llamafactory"}
        absent |= set() if SHARES_PREFIXES else {"ours-unshared"}
        own_classes = asked.shape.startswith(("chatglm3", "transnormer"))
        # its transformers has none of these classes; and TRL's packed rows would leak in linear attention
        absent |= {"llamafactory"} if own_classes else set()
        absent |= {"trl"} if asked.shape.startswith("transnormer") else set()
        return [c for c in CONTESTANTS if c.name not in absent]
    return [BY_NAME[name] for name in asked.contestants.split(",")]


def _prepare(asked: argparse.Namespace, scratch: Path) -> Setting:
    shape = SHAPES[asked.shape]
    vocab_size = write_model(shape, asked.vocab, asked.seed, scratch / "model")
    write_rows(asked.data, asked.tokenizer, asked.num_rows, vocab_size, asked.seed, scratch / "rows.json")
    pythons = {
        "own": sys.executable,
        "trl": asked.trl_python,
        "llamafactory": asked.llamafactory_python or "",
    }
    return Setting(
        model=scratch / "model",
        rows=scratch / "rows.json",
        pad_id=pad_id(vocab_size),
        targets=shape.targets,
        own_classes=asked.shape.startswith(("chatglm3", "transnormer")),
        steps=asked.steps + asked.warm_up,
        warm_up=asked.warm_up,
        seed=asked.seed,
        threads=asked.threads,
        pythons=pythons,
    )


def faster_dtype(setting: Setting) -> str:
    """The dtype in which the tutorial's script runs faster, by one timed step of it in each.

    Without hardware for it bf16 is up to 500 times slower, so it is tried only where products are not.
    """
    gemm = run(GEMM, setting, "fp32")
    if best_rate(gemm, "bf16") < 0.5 * best_rate(gemm, "fp32"):
        return "fp32"
    tutorial = BY_NAME["tutorial"]
    speed = {
        dtype: run(tutorial, setting, dtype, steps=setting.warm_up + 1)["tokens_per_second"]
        for dtype in ("fp32", "bf16")
    }
    return max(speed, key=lambda dtype: speed[dtype])


def _at_its_best(
    contestant: Contestant, setting: Setting, dtype: str, searched: dict[str, list[dict[str, Any]]]
) -> Contestant:
    """A trainer that packs, with the settings that were the fastest over two timed steps."""
    if contestant.environment == "own":
        return contestant
    tried = searched[contestant.name] = []
    for options in PACKING_SETTINGS:
        result = run(replace(contestant, options=options), setting, dtype, steps=setting.warm_up + 2)
        tried.append({**options, "tokens_per_second": result["tokens_per_second"]})
        print(
            f"search  {contestant.title:35} {result['tokens_per_second']:9,.1f} tokens/s  {options}",
            flush=True,
        )
    fastest = max(range(len(tried)), key=lambda n: tried[n]["tokens_per_second"])
    return replace(contestant, options=PACKING_SETTINGS[fastest])


def _rounds(
    setting: Setting, chosen: Sequence[Contestant], dtype: str, number: int
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """The results of every contestant, round by round, and the GEMM rate of every round."""
    rounds: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in chosen}
    gemms = []
    for turn in range(number):
        gemms.append(run(GEMM, setting, "fp32"))
        for contestant in chosen:
            result = run(contestant, setting, dtype)
            rounds[contestant.name].append(result)
            line = f"{result['tokens_per_second']:9,.1f} tokens/s {result['peak_bytes'] / 2**30:6.2f} GiB"
            print(f"round {turn + 1}/{number}  {contestant.title:35} {line}", flush=True)
    return rounds, gemms


def _usual(gemms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rate of each backend and dtype: the median of the rounds, as the contestants' speeds are."""
    usual = {
        dtype: {
            backend: rate and statistics.median(one["rates"][dtype][backend] for one in gemms)
            for backend, rate in backends.items()
        }
        for dtype, backends in gemms[0]["rates"].items()
    }
    return {**gemms[0], "rates": usual, "rounds": [one["rates"] for one in gemms]}


def _circumstances(asked: argparse.Namespace, dtype: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "shape": asked.shape,
        "vocab": asked.vocab,
        "dtype": dtype,
        "dtype_was": "asked for" if asked.dtype != "auto" else "measured to be the faster",
        "rounds_run": asked.rounds,
        "timed_steps": asked.steps,
        "rows": asked.num_rows,
        "prefix_sharing": True if SHARES_PREFIXES else None,
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": asked.threads or torch.get_num_threads(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": versions,
    }


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
