"""What numpy made, on a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(array: np.ndarray[Any, Any], device: torch.device | str) -> Tensor:
    """The array as a tensor; on a CPU it shares its memory.

    To a GPU it goes through pinned memory: a copy from other memory waits until all work before it is done.
    """
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
