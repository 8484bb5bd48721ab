"""Compiles every Triton twin for a GPU of compute capability argv[1] (80, 90), at Llama-3-8B's shapes.

Triton compiles as it does before a launch, down to machine code; a driver that launches nothing stands where
a GPU's would. Run by test_twins.py, in a process of its own. Prints the names of the kernels.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lorasmith.kernels import cross_entropy, dropout, fp8, rms_norm, rotary, swiglu
from lorasmith.ops.dropout import DropoutMask, mask_hashes, token_hashes

TOKENS = 4


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        print(metadata.name)

    def __call__(self, *_: object) -> None:
        pass


class Device:
    """What triton asks of a driver before it launches."""

    launcher_cls = Launcher

    def __init__(self, capability: int) -> None:
        self.target, self.utils = GPUTarget("cuda", capability, 32), self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 100 << 10}

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 0, 0, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


def compile_row_kernels(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(TOKENS, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    _, rstd = rms_norm.forward(x, weight, 1e-5)
    rms_norm.input_gradient(x, x, weight, rstd)
    rms_norm.weight_gradient(x, x, rstd)
    wide = torch.zeros(TOKENS, 14336, dtype=dtype)
    swiglu.forward(wide, wide)
    swiglu.gradients(wide, wide, wide)
    hashes = mask_hashes(DropoutMask(0.1, (1, 2), token_hashes(torch.arange(TOKENS), (1, 2))), 4096)
    dropout.draw(*hashes, 4096, dtype)
    dropout.drop(x, *hashes)
    dropout.add_dropped(x, x, *hashes)


def compile_rotary(dtype: torch.dtype) -> None:
    q, k = (torch.zeros(1, TOKENS, heads, 128, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    for turning, interleaved in ((128, False), (64, True)):
        angles = torch.zeros(1, TOKENS, turning, dtype=dtype)
        for backward in (False, True):
            rotary.turn(q, k, angles, angles, interleaved=interleaved, backward=backward)


def compile_cross_entropy(dtype: torch.dtype) -> None:
    logits, labels = torch.zeros(TOKENS, 128256), torch.zeros(TOKENS, dtype=torch.int64)
    running: tuple[Tensor, ...] = tuple(torch.zeros(TOKENS, 1) for _ in range(3))
    for scale in (None, torch.zeros(128256, dtype=dtype)):
        for wanted in (None, dtype):
            cross_entropy.read_tile(logits, scale, scale, labels, running, wanted)


def compile_fp8(dtype: torch.dtype) -> None:
    for factor in (None, torch.zeros(14336)):
        fp8.quantise_rows(torch.zeros(TOKENS, 14336, dtype=dtype), factor, 448.0, 2.0**-100)


if __name__ == "__main__":
    driver.set_active(Device(int(sys.argv[1])))
    for kind in (torch.bfloat16, torch.float32):
        compile_row_kernels(kind)
        compile_rotary(kind)
        compile_cross_entropy(kind)
        if int(sys.argv[1]) >= 89:
            compile_fp8(kind)
