"""Rounds of throughput.py -> medians, ratios, what is required, a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Result = Mapping[str, Any]

REQUIRED_RATIOS = {"tutorial": 10.0, "expert": 4.0, "trl": 5.0, "llamafactory": 2.5}
REQUIRED_UTILISATION, ALLOWED_MEMORY = 0.65, 0.60
"""On the Llama 160M: ours over each contestant; of the GEMM rate; of the tutorial's peak memory."""
LOSS_TOLERANCE = 0.15
"""How far a contestant's fall of the loss may lie from the tutorial's, as a share of it: dropout, the order
of rows and the adapter's random start differ."""
INK, MUTED, OURS, THEIRS = "#22262b", "#6b7280", "#1f7a5c", "#b8bec7"


def medians(rounds: Sequence[Result]) -> dict[str, Any]:
    """The median of every number over a contestant's rounds, and the span of its throughput."""
    middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    speeds = [one["tokens_per_second"] for one in rounds]
    return {**middle, "lowest_tokens_per_second": min(speeds), "highest_tokens_per_second": max(speeds)}


def needed_flops(result: Result, gemm: Result) -> float:
    """FLOPs that a LoRA step on frozen weights cannot do without, over the timed steps of `result`.

    4 * body parameters * computed tokens + 4 * head parameters * supervised rows: forward and the gradient
    of the input are 2 each; frozen weights need no gradient of their own. The body is its matrix products
    without embeddings; computed tokens are those left after prefix sharing. Attention, LoRA, norms and the
    optimizer count for nothing.
    """
    body = 4.0 * gemm["body_parameters"] * result["computed_tokens"]
    return float(body + 4.0 * gemm["head_parameters"] * result["supervised_tokens"])


def utilisation(result: Result, gemm: Result, dtype: str) -> float:
    """Needed FLOPs / seconds / the best GEMM rate of the dtype that was trained in."""
    return needed_flops(result, gemm) / float(result["seconds"]) / best_rate(gemm, dtype)


def best_rate(gemm: Result, dtype: str) -> float:
    """FLOP/s of the fastest backend that has this dtype."""
    return max(rate for rate in gemm["rates"][dtype].values() if rate is not None)


def summary(results: Mapping[str, Result], gemm: Result, dtype: str, loss_before: float) -> dict[str, Any]:
    """What the README quotes; null where a contestant of the comparison did not run."""
    speed = {name: result["tokens_per_second"] for name, result in results.items()}
    ours = results.get("ours")
    tutorial = results.get("tutorial")
    told: dict[str, Any] = {"loss_before": loss_before, "ours_over": {}, "over_tutorial": {}}
    if tutorial:
        told["over_tutorial"] = {name: value / speed["tutorial"] for name, value in speed.items()}
        told["loss_is_off"] = [name for name, r in results.items() if _is_off(r, tutorial, loss_before)]
    if ours:
        told["ours_over"] = {name: speed["ours"] / value for name, value in speed.items() if name != "ours"}
        told["utilisation"] = utilisation(ours, gemm, dtype)
        if tutorial:
            told["memory_of_tutorial"] = ours["peak_bytes"] / tutorial["peak_bytes"]
    return told


def _is_off(result: Result, tutorial: Result, loss_before: float) -> bool:
    fall, usual = loss_before - result["loss"], loss_before - tutorial["loss"]
    return not math.isfinite(fall) or abs(fall - usual) > LOSS_TOLERANCE * abs(usual)


def misses(told: Mapping[str, Any]) -> list[str]:
    """What is required on the Llama 160M and was measured short of it; silent on what did not run."""
    short = [
        f"{told['ours_over'][name]:.2f} times {name}, required {least:g}"
        for name, least in REQUIRED_RATIOS.items()
        if told["ours_over"].get(name, least) < least
    ]
    if told.get("utilisation", REQUIRED_UTILISATION) < REQUIRED_UTILISATION:
        short.append(f"{told['utilisation']:.0%} of the GEMM rate, required {REQUIRED_UTILISATION:.0%}")
    if told.get("memory_of_tutorial", 0.0) > ALLOWED_MEMORY:
        short.append(
            f"{told['memory_of_tutorial']:.0%} of the tutorial's memory, allowed {ALLOWED_MEMORY:.0%}"
        )
    return short + [f"the loss of {name} is off" for name in told.get("loss_is_off", [])]


def table(results: Mapping[str, Result], titles: Mapping[str, str], told: Mapping[str, Any]) -> str:
    lines = ["| | tokens/s | times (i) | peak memory | start-up | final loss |", "|---|--:|--:|--:|--:|--:|"]
    for name, r in results.items():
        ratio = told["over_tutorial"].get(name)
        lines.append(
            f"| {titles[name]} | {r['tokens_per_second']:,.0f} | {f'{ratio:.1f}' if ratio else '-'} "
            f"| {r['peak_bytes'] / 2**30:.2f} GiB | {r['startup_seconds']:.1f} s | {r['loss']:.4f} |"
        )
    return "\n".join(lines)


def draw(report: Mapping[str, Any], titles: Mapping[str, str], path: Path) -> None:
    """Bars of tokens per second and of peak memory, contestants from the first at the top."""
    results = report["results"]
    names = list(results)[::-1]
    figure = Figure(figsize=(10.5, 1.5 + 0.52 * len(names)), dpi=160, facecolor="white", layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    places = range(len(names))
    speeds = [results[name]["tokens_per_second"] for name in names]
    gibibytes = [results[name]["peak_bytes"] / 2**30 for name in names]
    spans = [
        [s - results[n]["lowest_tokens_per_second"] for n, s in zip(names, speeds, strict=True)],
        [results[n]["highest_tokens_per_second"] - s for n, s in zip(names, speeds, strict=True)],
    ]
    speed.barh(places, speeds, color=colours, height=0.62, xerr=spans, error_kw={"ecolor": MUTED, "lw": 1})
    memory.barh(places, gibibytes, color=colours, height=0.62)
    over = report["summary"]["over_tutorial"]
    for place, name in enumerate(names):
        end = results[name]["highest_tokens_per_second"]
        _say(speed, end, place, f"{speeds[place]:,.0f}" + (f"   {over[name]:.1f}×" if name in over else ""))
        _say(memory, gibibytes[place], place, f"{gibibytes[place]:.2f}")
    speed.set_yticks(list(places), [titles[name] for name in names], color=INK)
    _dress(speed, "real tokens per second (× the tutorial's script)", max(map(float, speeds)) * 1.3)
    _dress(memory, "peak memory of the process, GiB", max(gibibytes) * 1.2)
    machine = report["machine"]
    figure.suptitle(
        f"LoRA fine-tuning of a {report['shape_title']} in {report['dtype']}, "
        f"{machine['threads']} threads of {machine['processor']}, {report['date']}",
        color=INK,
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)


def _say(axes: Any, x: float, y: int, text: str) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=9)


def _dress(axes: Any, title: str, limit: float) -> None:
    axes.set_title(title, color=MUTED, fontsize=9, loc="left")
    axes.set_xlim(0, limit)
    axes.tick_params(axis="x", colors=MUTED, labelsize=8, length=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
