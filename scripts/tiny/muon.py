"""The Muon optimizer in single precision: momentum whose matrices are made orthogonal before each step.

torch.optim.Muon does this in bfloat16 and one matrix at a time, which is slow on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of a stack of matrices towards one (Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; matrices of one shape are handled as one stack."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for stack in shapes.values():
                self._step_stack(stack, group["lr"], group["momentum"], group["decay"])

    def _step_stack(self, stack: list[torch.Tensor], rate: float, momentum: float, decay: float) -> None:
        gradient = torch.stack([parameter.grad for parameter in stack])
        state = self.state[stack[0]]
        mean = state.setdefault("mean", torch.zeros_like(gradient))
        mean.mul_(momentum).add_(gradient, alpha=1 - momentum)
        update = orthogonal(gradient.lerp(mean, momentum))
        factor = rate * max(1.0, update.size(1) / update.size(2)) ** 0.5
        for parameter, change in zip(stack, update, strict=True):
            parameter.mul_(1 - rate * decay).sub_(change, alpha=factor)
