"""Cross-entropy as a sum, so that cutting a step into pieces cannot change it; and fused with the head, so
that the logits of a whole step never exist.

The fused one goes over the vocabulary in tiles, as attention goes over keys (arXiv 2205.14135): each tile of
the head is read once, for the logits and for the gradient, while a running maximum and sum are kept.
Shapes: N = positions that have a label, D = hidden size, V = vocabulary, C = columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.kernels.twins import triton_twin
from lorasmith.ops.gemm import linear

_CHUNK_BYTES = {"cpu": 6 << 20}
"""Of one tile of logits: wide enough for good products, and still in the caches of a CPU."""
_CHUNK_BYTES_ELSEWHERE = 256 << 20
"""What fills a GPU."""
_MIN_COLUMNS = 1024
"""Narrower tiles make poor matrix products; rows are cut instead."""


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
    """Sum over n of weights[n] * -log softmax(logits[n])[labels[n]], in fp32 or wider.

    Returns: a scalar; divide by the step's number of targets.
    """
    wide_NV = logits_NV if logits_NV.dtype.itemsize >= 4 else logits_NV.float()
    losses_N = F.cross_entropy(wide_NV, labels_N, reduction="none")
    return (losses_N * weights_N.to(losses_N.dtype)).sum()


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    *,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """`cross_entropy_sum` of the logits (hidden W') * weight_scale + bias, which are never held at once.

    Gradients are made in the forward pass, so that of hidden (and of weight and bias, if they are trained)
    is all that is kept. `weight_scale` (V,) is for a frozen NormHead, one over the length of each row; it
    gets no gradient, so a trained NormHead passes its normalised rows as weight. `chunk_bytes` bounds one
    tile of logits. Every label must be in [0, V): others make the loss infinite or raise IndexError.

    Shapes: hidden (N, D) and weight (V, D) of one dtype, bias (V,), labels and weights (N,).
    Returns: a scalar, in fp32 or wider.
    """
    assert weight_scale is None or not weight_scale.requires_grad, "weight_scale gets no gradient"
    head = _Head(weight_VD.detach(), None if bias is None else bias.detach(), weight_scale)
    chunk = _chunk(hidden_ND, len(weight_VD), chunk_bytes)
    wanted = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias, head, labels_N, weights_N, chunk, wanted
    )
    return loss


_Running = tuple[Tensor, Tensor, Tensor]
"""Of the tiles read so far, (N, 1): the highest logit, the sum of exponentials, the label's logit."""


@dataclass(frozen=True)
class _Tile:
    """The head of C consecutive entries of the vocabulary, and its slice of the head's gradients."""

    start: int
    weight_CD: Tensor
    bias_C: Tensor | None
    scale_C: Tensor | None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, C), in fp32 or wider."""
        logits_NC = _product(hidden_ND, self.weight_CD.T)
        if self.scale_C is not None:
            logits_NC.mul_(self.scale_C)
        return logits_NC if self.bias_C is None else logits_NC.add_(self.bias_C)

    def unscaled(self, grad_NC: Tensor) -> Tensor:
        """Gradient of the logits -> of hidden W', in place, in the dtype of the weight."""
        if self.scale_C is not None:
            grad_NC.mul_(self.scale_C)
        return grad_NC.to(self.weight_CD.dtype)

    def replace_label(self, values_NC: Tensor, labels_N: Tensor, by_N1: Tensor, kept_N1: Tensor) -> Tensor:
        """Write `by` where a row's label lies in this tile. Returns: what stood there, else `kept`."""
        columns_N1 = (labels_N - self.start)[:, None]
        inside_N1 = (columns_N1 >= 0) & (columns_N1 < values_NC.shape[1])
        columns_N1 = columns_N1.clamp(0, values_NC.shape[1] - 1)
        found_N1 = values_NC.gather(1, columns_N1)
        values_NC.scatter_(1, columns_N1, torch.where(inside_N1, by_N1, found_N1))
        return torch.where(inside_N1, found_N1, kept_N1)


@dataclass(frozen=True)
class _Head:
    weight_VD: Tensor
    bias_V: Tensor | None
    scale_V: Tensor | None

    def tiles(self, columns: int) -> Iterator[_Tile]:
        for start in range(0, len(self.weight_VD), columns):
            part = slice(start, start + columns)
            bias_C = None if self.bias_V is None else self.bias_V[part]
            scale_C = None if self.scale_V is None else self.scale_V[part]
            yield _Tile(start, self.weight_VD[part], bias_C, scale_C)

    def rows(self, labels_N: Tensor) -> Tensor:
        """The rows of the labels with their scale: the gradient of a row's own logit by its hidden state."""
        rows_ND = self.weight_VD.index_select(0, labels_N)
        return rows_ND if self.scale_V is None else rows_ND * self.scale_V.index_select(0, labels_N)[:, None]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias: Tensor | None,
        head: _Head,
        labels_N: Tensor,
        weights_N: Tensor,
        chunk: tuple[int, int],
        wanted: bool,
    ) -> Tensor:
        needed = [wanted and needs for needs in ctx.needs_input_grad[:3]]
        like = (hidden_ND, weight_VD, bias)
        grads = [torch.zeros_like(x) if need else None for x, need in zip(like, needed, strict=True)]  # type: ignore[arg-type]
        loss = hidden_ND.new_zeros((), dtype=_wide(hidden_ND))
        for start in range(0, len(hidden_ND), chunk[0]):
            part = slice(start, start + chunk[0])
            rows = _Rows(hidden_ND[part], labels_N[part], weights_N[part, None].to(loss.dtype))
            against_N1, label_N1 = rows.read(head, chunk[1], None if grads[0] is None else grads[0][part])
            loss += (rows.weights_N1 * _softplus(against_N1)).sum()
            if grads[1] is not None or grads[2] is not None:
                rows.add_head_gradients(head, chunk[1], against_N1, label_N1, grads[1:])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # as one row, not as a scalar: a scalar would be rounded to 16 bits before it is multiplied
        scaled = (None if x is None else (x * grad[None]).to(x.dtype) for x in ctx.saved_tensors)
        return (*scaled, *[None] * 5)


@dataclass(frozen=True)
class _Rows:
    """Rows that go over the vocabulary together.

    A row's label stands against all others: loss = log(1 + exp(against)) with against = logsumexp(others) -
    logit(label). So a confident row, whose p - 1 would cancel in 16 bits, keeps all digits of its gradient.
    """

    hidden_ND: Tensor
    labels_N: Tensor
    weights_N1: Tensor

    def read(self, head: _Head, columns: int, grad_ND: Tensor | None) -> tuple[Tensor, Tensor]:
        """`against` and the label's logit (N, 1); the gradient by hidden is written into `grad_ND`."""
        sum_N1, finfo = torch.zeros_like(self.weights_N1), torch.finfo(self.weights_N1.dtype)
        top_N1, label_N1 = torch.full_like(sum_N1, finfo.min), torch.full_like(sum_N1, -torch.inf)
        read_ND = None if grad_ND is None else torch.zeros_like(grad_ND, dtype=top_N1.dtype)
        for tile in head.tiles(columns):
            running = (top_N1, sum_N1, label_N1)
            shrink_N1, values_NC, running = self._read_tile(tile, running, read_ND is not None)
            top_N1, sum_N1, label_N1 = running
            if read_ND is not None:
                _add_product(read_ND.mul_(shrink_N1), values_NC, tile.weight_CD)
        against_N1 = sum_N1.log() + top_N1 - label_N1
        if read_ND is not None and grad_ND is not None:
            others_ND = read_ND.div_(sum_N1.clamp_min(finfo.tiny))
            slope_N1 = self.weights_N1 * against_N1.sigmoid()
            grad_ND.copy_(others_ND.sub_(head.rows(self.labels_N)).mul_(slope_N1))
        return against_N1, label_N1

    def _read_tile(self, tile: _Tile, running: _Running, wanted: bool) -> tuple[Tensor, Tensor, _Running]:
        """Returns: by what earlier sums shrink (N, 1); where `wanted`, the tile's share of the softmax's
        numerator, by hidden W' and in the dtype of the weight; the running numbers with this tile in them."""
        if twin := triton_twin("cross_entropy", self.hidden_ND):
            product_NC = _product(self.hidden_ND, tile.weight_CD.T)
            dtype, own_N = (tile.weight_CD.dtype if wanted else None), self.labels_N - tile.start
            return *twin.read_tile(product_NC, tile.scale_C, tile.bias_C, own_N, running, dtype), running
        top_N1, sum_N1, label_N1 = running
        values_NC = tile.logits(self.hidden_ND)
        label_N1 = tile.replace_label(values_NC, self.labels_N, torch.full_like(top_N1, -torch.inf), label_N1)
        higher_N1 = torch.maximum(top_N1, values_NC.amax(1, keepdim=True))
        shrink_N1 = (top_N1 - higher_N1).exp_()
        values_NC.sub_(higher_N1).exp_()
        sum_N1.mul_(shrink_N1).add_(values_NC.sum(1, keepdim=True))
        values_NC = tile.unscaled(values_NC) if wanted else values_NC
        return shrink_N1, values_NC, (higher_N1, sum_N1, label_N1)

    def add_head_gradients(
        self,
        head: _Head,
        columns: int,
        against_N1: Tensor,
        label_N1: Tensor,
        grads: list[Tensor | None],
    ) -> None:
        """A trained head costs its logits once more: their gradient needs the whole vocabulary's sum."""
        total_N1, (grad_VD, grad_V) = label_N1 + _softplus(against_N1), grads
        at_label_N1 = -self.weights_N1 * against_N1.sigmoid()
        for tile in head.tiles(columns):
            grad_NC = tile.logits(self.hidden_ND).sub_(total_N1).exp_().mul_(self.weights_N1)
            tile.replace_label(grad_NC, self.labels_N, at_label_N1, at_label_N1)
            part = slice(tile.start, tile.start + grad_NC.shape[1])
            if grad_V is not None:
                grad_V[part] += grad_NC.sum(0)
            if grad_VD is not None:
                _add_product(grad_VD[part], tile.unscaled(grad_NC).T, self.hidden_ND)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to the last digit; torch's own switches to x at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _chunk(hidden_ND: Tensor, vocabulary: int, chunk_bytes: int | None) -> tuple[int, int]:
    """Rows and columns whose logits take `chunk_bytes` at most (one row and one column at least)."""
    limit = chunk_bytes or _CHUNK_BYTES.get(hidden_ND.device.type, _CHUNK_BYTES_ELSEWHERE)
    numbers = max(1, limit // _wide(hidden_ND).itemsize)
    rows = max(1, min(len(hidden_ND), numbers // min(_MIN_COLUMNS, vocabulary)))
    return rows, max(1, min(vocabulary, numbers // rows))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 or wider; on a GPU 16-bit products leave the kernel unrounded."""
    if a.dtype.itemsize >= 4:
        return linear(a, b.T)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b).float()


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    sum_ += _product(a, b)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
