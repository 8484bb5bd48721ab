"""loss.png: the loss of every logged step, its smoothed course, and the held-out loss."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.storage import Storage

LOSS_PICTURE = "loss.png"
_ENOUGH_TO_SMOOTH = 100


def draw_losses(storage: Storage, run_dir: Path, metrics: Sequence[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of import, once, at the end
    from matplotlib.figure import Figure

    losses = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    held_out = [(m["step"], m["eval_loss"]) for m in metrics if m.get("eval_loss") is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if losses:
        steps, values = zip(*losses, strict=True)
        if len(values) < _ENOUGH_TO_SMOOTH:
            axes.plot(steps, values, color="#1f4e8c", linewidth=2, label="training loss")
        else:
            axes.plot(steps, values, color="#9db8d9", linewidth=1, label="training loss")
            axes.plot(steps, smoothed(values), color="#1f4e8c", linewidth=2, label="smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#d1572a", marker="o", label="held-out loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    storage.replace(run_dir / LOSS_PICTURE, data.getvalue())


def smoothed(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential moving average, without the pull of its start (Adam's bias correction)."""
    average, course = 0.0, []
    for count, value in enumerate(values, start=1):
        average = keep * average + (1 - keep) * value
        course.append(average / (1 - keep**count))
    return course
