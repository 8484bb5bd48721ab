"""Frozen weights in 8 bits: float8_e4m3fn with a scale for each output row, and products in fp8.

One layout serves both products. y = x W^T sums over inputs, so that W's scales stand outside of the sum. In
dX = dY W they stand inside: they are taken into dY before it is rounded, and both products see the same W.
Tensor cores read fp8 along the sum only, so dX transposes the codes of one weight at a time. A second layout
would spare that copy and cost all of the memory that fp8 saves.

x and dY are rounded too, each row by its own largest value. Both to e4m3: with a scale to each row, its third
bit of mantissa is worth more than e5m2's range.

Shapes: N = rows (tokens), K = what is summed over, M = columns of a product, D = input features, O = output
features. Source: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lorasmith.kernels.twins import triton_twin

CODES = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3: what a row's largest value becomes."""
_LEAST_SCALE = 2.0**-100
"""Of a row of zeros."""
MULTIPLE = 16
"""cuBLAS and CUTLASS take fp8 matrices whose sides are multiples of this."""
_aten = torch.ops.aten


def quantise_rows(x_NK: Tensor, factor_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x * factor as e4m3 codes (N, K) and fp32 scales (N, 1): codes * scales is near x * factor.

    A row that holds what is not finite has such a scale, and so have its products.
    """
    if twin := triton_twin("fp8", x_NK):
        both: tuple[Tensor, Tensor] = twin.quantise_rows(x_NK, factor_K, LARGEST, _LEAST_SCALE)
        return both
    wide_NK = x_NK.float() if factor_K is None else x_NK.float() * factor_K
    scales_N1 = (wide_NK.abs().amax(1, keepdim=True) / LARGEST).clamp_min(_LEAST_SCALE)
    return (wide_NK / scales_N1).clamp(-LARGEST, LARGEST).to(CODES), scales_N1


def scaled_product(
    left_NK: Tensor, scales_N1: Tensor, right_KM: Tensor, scales_1M: Tensor, dtype: torch.dtype
) -> Tensor:
    """(left * scales) @ (right * scales) in `dtype`; `right` lies column by column in memory.

    On a GPU by its tensor cores, rounded to bf16; on a CPU the codes are multiplied in fp32.
    """
    if left_NK.device.type == "cpu":
        return (left_NK.float() @ right_KM.float()).mul_(scales_N1).mul_(scales_1M).to(dtype)
    return torch._scaled_mm(
        left_NK, right_KM, scales_N1, scales_1M, out_dtype=torch.bfloat16, use_fast_accum=False
    ).to(dtype)


class Fp8Weight(Tensor):
    """A weight (O, D), or its transpose, that matrix products read as fp8 and everything else as numbers.

    It says of itself the dtype that it was quantised from. It is never changed and has no gradient.
    """

    codes_OD: Tensor
    scales_O: Tensor
    is_transposed: bool

    @staticmethod
    def __new__(
        cls, codes_OD: Tensor, scales_O: Tensor, dtype: torch.dtype, *, is_transposed: bool = False
    ) -> Fp8Weight:
        shape = codes_OD.shape[::-1] if is_transposed else codes_OD.shape
        self: Fp8Weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes_OD.device)
        return self

    def __init__(
        self, codes_OD: Tensor, scales_O: Tensor, dtype: torch.dtype, *, is_transposed: bool = False
    ) -> None:
        self.codes_OD, self.scales_O, self.is_transposed = codes_OD, scales_O, is_transposed

    def dense(self) -> Tensor:
        """The numbers that the codes stand for."""
        w_OD = (self.codes_OD.float() * self.scales_O[:, None]).to(self.dtype)
        return w_OD.t() if self.is_transposed else w_OD

    def transposed(self) -> Fp8Weight:
        return Fp8Weight(self.codes_OD, self.scales_O, self.dtype, is_transposed=not self.is_transposed)

    def multiplied(self, x_NK: Tensor) -> Tensor:
        """x @ self, (N, M), in x's dtype: x W^T for a transposed weight, else x W."""
        if self.is_transposed:
            codes_NK, scales_N1 = quantise_rows(x_NK)
            return scaled_product(codes_NK, scales_N1, self.codes_OD.t(), self.scales_O[None], x_NK.dtype)
        codes_NK, scales_N1 = quantise_rows(x_NK, self.scales_O)
        by_column_OD = self.codes_OD.t().contiguous().t()
        ones_1D = torch.ones(1, self.codes_OD.shape[1], device=x_NK.device)
        return scaled_product(codes_NK, scales_N1, by_column_OD, ones_1D, x_NK.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub says it is a function
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = _OWN.get(func)
        if own is not None and not kwargs:
            out = own(*args)
            if out is not NotImplemented:
                return out
        assert not _writes_one(func, args, kwargs or {}), f"{func}: a quantised weight is never changed"
        dense = tree_map_only(Fp8Weight, Fp8Weight.dense, (tuple(args), dict(kwargs or {})))
        return func(*dense[0], **dense[1])


def _writes_one(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether one of the arguments that `func` changes, by its schema, is a quantised weight."""
    declared = func._schema.arguments
    given = dict(zip((argument.name for argument in declared), args, strict=False)) | dict(kwargs)
    written = [given.get(a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write]
    return any(isinstance(leaf, Fp8Weight) for leaf in tree_leaves(written))


def quantised(w_OD: Tensor) -> Fp8Weight:
    codes_OD, scales_O1 = quantise_rows(w_OD.detach())
    return Fp8Weight(codes_OD, scales_O1[:, 0], w_OD.dtype)


def fits_fp8(w_OD: Tensor) -> bool:
    """Whether tensor cores take it, both ways."""
    return w_OD.ndim == 2 and all(side and side % MULTIPLE == 0 for side in w_OD.shape)


def _mm(x: Tensor, w: Tensor) -> Any:
    return w.multiplied(x) if isinstance(w, Fp8Weight) and not isinstance(x, Fp8Weight) else NotImplemented


def _addmm(bias: Tensor, x: Tensor, w: Tensor) -> Any:
    product = NotImplemented if isinstance(bias, Fp8Weight) else _mm(x, w)
    return product if product is NotImplemented else product.add_(bias)


_OWN: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.t.default: Fp8Weight.transposed,
    _aten.detach.default: lambda w: Fp8Weight(w.codes_OD, w.scales_O, w.dtype, is_transposed=w.is_transposed),
}
"""What F.linear and its backward pass are made of."""
