"""NormHead: the logits of a head whose rows all have length one.

Shapes: N = positions, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHORTEST = 1e-12


@dataclass(frozen=True)
class _Measured:
    """The row lengths of one version of one weight."""

    weight: weakref.ref[Tensor]
    address: int
    version: int
    inverse_V: Tensor

    def fits(self, weight: Tensor) -> bool:
        return self.weight() is weight and (self.address, self.version) == (
            weight.data_ptr(),
            weight._version,
        )


class NormHead(nn.Module):
    """x W' with the rows of W divided by their L2 norm (fp32, at least 1e-12); `weight` itself stays raw.

    Dividing the logits instead of the rows needs one number per row and no second head. A frozen weight is
    measured once; a trained one at each forward, and its gradient flows through the norm.
    No nn.Linear on purpose: LoRA on it could not be merged, since a normalised sum is no sum of normalised.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self._measured: _Measured | None = None

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits (N, V), in fp32 for a weight of 16 bits."""
        return F.linear(x_ND.to(self.weight.dtype), self.weight) * self.inverse_norms_V()

    def inverse_norms_V(self) -> Tensor:
        weight = self.weight
        if (weight.requires_grad and torch.is_grad_enabled()) or weight.is_inference():
            return _inverse_norms(weight)
        if self._measured is None or not self._measured.fits(weight):
            with torch.no_grad():
                inverse_V = _inverse_norms(weight)
            self._measured = _Measured(weakref.ref(weight), weight.data_ptr(), weight._version, inverse_V)
        return self._measured.inverse_V

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module measures its own weight."""
        return {**self.__dict__, "_measured": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _inverse_norms(weight_VD: Tensor) -> Tensor:
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    norms_V: Tensor = torch.linalg.vector_norm(weight_VD, dim=-1, dtype=wide)
    return norms_V.clamp_min(_SHORTEST).reciprocal()
