"""The frozen base in fp8 while a run trains: its linear layers multiply in 8 bits, forward and backward.

The weights as they were loaded wait in the host's memory and come back: what is saved, merged, generated or
recorded afterwards never sees a quantised one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.errors import ConfigError
from lorasmith.model.load import module_dtype
from lorasmith.model.packed import base_module
from lorasmith.ops.fp8 import fits_fp8, quantised

_CAPABILITY = (8, 9)
"""The first of NVIDIA's GPUs that multiply in fp8: Ada, and then Hopper (9.0)."""
_WHERE = "train.fp8_base"
_OFF = "leave train.fp8_base false"


@contextmanager
def fp8_base(module: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Within: `frozen_linears` hold fp8 weights. After: their own again, where they were."""
    linears = frozen_linears(module) if enabled else []
    kept = [(linear, linear.weight, linear.weight.device) for linear in linears]
    made: dict[Tensor, nn.Parameter] = {}
    try:
        for linear, weight, _ in kept:
            if weight not in made:  # layers may share one
                made[weight] = nn.Parameter(quantised(weight), requires_grad=False)
                weight.data = weight.data.cpu()
            linear.weight = made[weight]
        yield
    finally:
        made.clear()
        for linear, weight, device in kept:
            linear.weight = weight
            weight.data = weight.data.to(device)


def frozen_linears(module: nn.Module) -> list[nn.Linear]:
    """Plain frozen linear layers, with LoRA or without, of sides that fp8 products take.

    Never the head, adapted or trained as it may be, nor what shares its weight with an embedding.
    """
    linears = _linears(module)
    return [part for part in linears if not part.weight.requires_grad and fits_fp8(part.weight)]


def _linears(module: nn.Module) -> list[nn.Linear]:
    head = base_module(module).get_output_embeddings()
    kept = set() if head is None else set(head.modules())  # LoRA and modules_to_save wrap it
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    linears = [part for part in module.modules() if type(part) is nn.Linear]
    return [part for part in linears if part not in kept and id(part.weight) not in tables]


def require_fp8(base: PreTrainedModel) -> None:
    """Raises: ConfigError if this device, this dtype or these layers do not multiply in fp8.

    A CPU does: the same numbers by products in fp32, to look at what fp8 costs, and slowly.
    """
    device, dtype = base.device, module_dtype(base)
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"{device.type} does not multiply in fp8", where=_WHERE, fix=_OFF)
    if device.type == "cuda":
        require_capability(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"fp8 is made from bf16 or fp32 weights, and these are {dtype}",
            where=_WHERE,
            fix=f"load the base with dtype bf16, or {_OFF}",
        )
    if not any(fits_fp8(linear.weight) for linear in _linears(base)):
        raise ConfigError(
            "no linear layer of this model can be multiplied in fp8",
            where=_WHERE,
            why="fp8 products take matrices whose sides are multiples of 16",
            fix=_OFF,
        )


def require_capability(name: str, capability: tuple[int, int]) -> None:
    """Raises: ConfigError for a GPU that came before fp8."""
    if capability < _CAPABILITY:
        raise ConfigError(
            f"{name} does not multiply in fp8",
            where=_WHERE,
            why=f"its compute capability is {capability[0]}.{capability[1]}; fp8 begins at 8.9 (Ada, Hopper)",
            fix=_OFF,
        )
