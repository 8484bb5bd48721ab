"""One matrix product for linear layers, by the library that is fastest at it on this machine.

torch multiplies fp32 matrices on a CPU with MKL, whose threading does badly on AMD: oneDNN, which torch has
too, is about 1.4 times as fast there on several threads, and 2 to 4 times on products of rank 8. On one
thread, or for a small x, MKL is ahead.

The choice is a rule over what is known before the call (the processor's maker, the number of threads, dtype
and shape), not a stopwatch: two processes of one machine always choose alike, so a resumed run stays bitwise
the uninterrupted one. Only where oneDNN finds no memory for a product's code does MKL stand in for it.

Shapes: N = rows, D = input features, O = output features.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.fp8 import Fp8Weight

_FEW = 1 << 17  # elements of x: below, what oneDNN's call costs (some 25 us) is more than it gains
_SKINNY = 64  # a side as short as a LoRA rank: oneDNN is ahead on one thread too
_STORES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's store of compiled products, and that of ideep, torch's layer above it: each reads its own."""
NO_PRIMITIVE = "could not create a primitive"
"""What oneDNN says where it finds no memory for the code of a product of a new shape."""
_KEPT = 24
"""Products in each store: those of a few rows of a model, at 0.65 MB each."""


def bound_product_stores() -> None:
    """Let oneDNN keep 24 compiled products instead of 1,024; what the environment says wins.

    It compiles one for every new shape, and every step's row has another length: 1,024 would take some 660 MB
    and save a millisecond now and then. Both stores read their size once, at the first
    product of the process: afterwards this changes nothing. There is no call for it in torch.
    """
    for name in _STORES:
        os.environ.setdefault(name, str(_KEPT))


def linear(x: Tensor, w_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x (..., D) @ w^T + bias -> (..., O). Not differentiable: for the inside of autograd functions.

    `w_OD` may be a transposed view: dX = dY @ W is `linear(dY, W.t())`.
    """
    if not _onednn_is_faster(x, w_OD):
        return F.linear(x, w_OD, bias_O)
    try:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, w_OD, bias_O, "none", [], "")
        return product
    except RuntimeError as error:
        if NO_PRIMITIVE not in str(error):
            raise
    return F.linear(x, w_OD, bias_O)  # MKL needs no memory for code of its own


def _onednn_is_faster(x: Tensor, w_OD: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or w_OD.dtype != torch.float32:
        return False  # torch itself hands bf16 to oneDNN
    if isinstance(w_OD, Fp8Weight):
        return False
    if x.numel() < _FEW or 0 in w_OD.shape or not _mkl_is_slow():
        return False
    return torch.get_num_threads() > 1 or min(w_OD.shape) <= _SKINNY


@lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    """Whether this is an AMD processor (or Hygon's, of the same design) and torch has oneDNN."""
    return torch.backends.mkldnn.is_available() and _processor_maker() in ("AuthenticAMD", "HygonGenuine")


def _processor_maker() -> str:
    """The vendor id of an x86 processor; empty where the system does not tell."""
    told = Path("/proc/cpuinfo")
    if told.is_file():
        lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    return platform.processor().rpartition(", ")[2]  # Windows: "AMD64 Family 25 Model 1, AuthenticAMD"
