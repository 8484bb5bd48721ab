"""The rate of matrix products on this machine at the model's own shapes, by every backend that torch has.

For every frozen linear layer of the body: y = x @ W' (forward) and dx = dy @ W (backward), for `rows` rows.
The rate of a dtype is the FLOPs of all layers over the sum of the fastest times of each product.
Options: rows.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from measure import DTYPES, load_model, read_job
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor], Tensor]
REPEATS = 5
SLOW = 4e9
"""FLOP/s below which SLOW_ROWS rows are enough to tell the rate."""
SLOW_ROWS = 16


def torch_mm(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w.t())


def onednn(x: Tensor, w: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return result


BACKENDS: dict[str, Product] = {"torch.mm": torch_mm, "onednn": onednn}


def seconds(product: Product, x: Tensor, w: Tensor) -> float:
    """The fastest of REPEATS, after one to warm up."""
    best = float("inf")
    product(x, w)
    for _ in range(REPEATS):
        start = time.perf_counter()
        product(x, w)
        best = min(best, time.perf_counter() - start)
    return best


def is_slow(dtype: torch.dtype, product: Product) -> bool:
    """Told in well under a second: without hardware for it a bf16 product of full size takes many."""
    cube = torch.ones(128, 128).to(dtype)
    return 2.0 * 128**3 / seconds(product, cube, cube) < SLOW


def body_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """(columns in, columns out) of the linear layers but the head, and how many of each."""
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return Counter((m.in_features, m.out_features) for m in linear)


@torch.no_grad()
def rate(shapes: Counter[tuple[int, int]], rows: int, dtype: torch.dtype, product: Product) -> float | None:
    """FLOP/s over all layers; None where the backend has no such product on this machine."""
    flops = total = 0.0
    try:
        rows = SLOW_ROWS if is_slow(dtype, product) else rows
        for (wide, out), number in shapes.items():
            for columns_in, columns_out in ((wide, out), (out, wide)):
                x = torch.randn(rows, columns_in).to(dtype)
                w = torch.randn(columns_out, columns_in).to(dtype)
                flops += number * 2.0 * rows * columns_in * columns_out
                total += number * seconds(product, x, w)
    except RuntimeError:  # oneDNN has bf16 only for processors with AVX-512
        return None
    return flops / total


def rates(shapes: Counter[tuple[int, int]], rows: int) -> dict[str, dict[str, float | None]]:
    """By dtype and backend."""
    return {
        name: {backend: rate(shapes, rows, dtype, product) for backend, product in BACKENDS.items()}
        for name, dtype in DTYPES.items()
    }


if __name__ == "__main__":
    job = read_job()
    model = load_model(job)
    shapes = body_shapes(model)
    head = model.get_output_embeddings()
    result = {
        "rates": rates(shapes, job.options["rows"]),
        "body_parameters": sum(wide * out * number for (wide, out), number in shapes.items()),
        "head_parameters": head.in_features * head.out_features if isinstance(head, nn.Linear) else 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": job.options["rows"],
    }
    Path(job.result).write_text(json.dumps(result))
