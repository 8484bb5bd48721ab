"""Whether an op's Triton twin takes its tensors: the one place that decides.

The twins run on CUDA tensors where triton is installed (torch's CUDA wheels bring it on Linux), in every
dtype but float64. Two environment variables, read once: `LORASMITH_TRITON=0` keeps to torch's own operations;
`TRITON_INTERPRET=1`, triton's own switch, also sends CPU tensors through the twins, which is how they are
checked without a GPU.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Op = Literal["cross_entropy", "dropout", "fp8", "rms_norm", "rotary", "swiglu"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_twin(op: Op, *tensors: Tensor) -> ModuleType | None:
    """The module of this room that computes `op` on these tensors; None: torch does.

    Triton is loaded by the first tensors that it takes, and not before.
    """
    if all(_takes(x.device.type) and x.dtype in _DTYPES for x in tensors):
        return import_module(f"lorasmith.kernels.{op}")
    return None


@cache
def _takes(device: str) -> bool:
    wanted = device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return wanted and os.environ.get("LORASMITH_TRITON") != "0" and find_spec("triton") is not None
