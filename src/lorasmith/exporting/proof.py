"""The proof that ends a merge: what was written is loaded again and speaks like the adapter over its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.errors import SetupError

_SHORT = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the largest logit, by the dtype that was written. fp32: two ways to sum a product part by 1e-6 to 1e-4
in a deep model. Rounding moves a merged weight by up to 2^-12 of itself in fp16 and 2^-9 in bf16, which small
random models answer with up to 0.006 and 0.04 of the largest logit: two to three times that is allowed. A
module left out or a wrong scale moves logits by about as much as the adapter does, which stands beside."""


def random_rows(vocab_size: int) -> list[Tensor]:
    """Prompts (T,) of ids from all over the vocabulary, the same at each call."""
    source = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=source) for length in (5, 17, 33)]


@torch.no_grad()
def logits_of(module: nn.Module, rows: Sequence[Tensor]) -> list[Tensor]:
    """fp32 logits (T, V), one row at a time, computed in fp32 whatever the weights are stored in."""
    with _computed_in_fp32(module):
        return [module(input_ids=row[None]).logits[0].float() for row in rows]


@contextmanager
def _computed_in_fp32(module: nn.Module) -> Iterator[None]:
    """Each module's own 16-bit weights are widened while it runs: one matrix at a time, not the whole model.

    Without it, rounded activations would differ by more than many an adapter does.
    """
    hooks = []
    for part in module.modules():
        own = [(p, p.data) for p in part.parameters(recurse=False) if p.dtype in _SHORT]
        if own:
            hooks.append(part.register_forward_pre_hook(partial(_widen, own)))
            hooks.append(part.register_forward_hook(partial(_restore, own), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _widen(own: Sequence[tuple[nn.Parameter, Tensor]], *_: Any) -> None:
    for parameter, stored in own:
        parameter.data = stored.float()


def _restore(own: Sequence[tuple[nn.Parameter, Tensor]], *_: Any) -> None:
    for parameter, stored in own:
        parameter.data = stored


def largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """NaN if any logit is."""
    return max((float((a - b).abs().max()) for a, b in zip(left, right, strict=True)), key=_nan_first)


def allowed_difference(logits: Sequence[Tensor], written: torch.dtype) -> float:
    """The bound for logits of this size and weights that were rounded to `written`."""
    return TOLERANCE[written] * max(1.0, *(float(row.abs().max()) for row in logits))


def require_equal(difference: float, allowed: float) -> None:
    """Raises: SetupError above the bound, or for NaN."""
    if not difference <= allowed:
        raise SetupError(
            "the merged model does not answer as the adapter does",
            why=f"a logit differs by {difference:.2e}, and {allowed:.2e} is what rounding explains",
            fix="try --dtype fp32; if it stays, please report it. Nothing was left in the output directory",
        )


def _nan_first(value: float) -> tuple[bool, float]:
    return value != value, value
