"""A module under its authors' names -> the same model in a class of transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.exporting.layout import NativeLayout, projection_rows
from lorasmith.model.load import empty_module


def native_module(
    module: PreTrainedModel, layout: NativeLayout, stop_ids: tuple[int, ...]
) -> PreTrainedModel:
    """`module` is emptied on the way: no weight but a fused one at its turn lies in memory twice."""
    rows = projection_rows(module.config)
    native: PreTrainedModel = empty_module(layout.native_config(module.config, stop_ids))
    tensors = dict(module.state_dict())
    module.to("meta")
    native.load_state_dict(_native_tensors(tensors, layout, rows), assign=True)
    native.tie_weights()
    return native.eval()


def _native_tensors(
    tensors: dict[str, Tensor], layout: NativeLayout, rows: tuple[int, int, int]
) -> dict[str, Tensor]:
    native: dict[str, Tensor] = {}
    for name in list(tensors):
        path, _, kind = name.rpartition(".")
        tensor = tensors.pop(name)
        parts = layout.split_names(path)
        if parts:
            cut = (part.clone() for part in tensor.split(rows))
            native.update(zip((f"{part}.{kind}" for part in parts), cut, strict=True))
        elif layout.normed_head and path == "lm_head":
            native[name] = unit_rows(tensor)
        else:
            native[f"{layout.native_name(path)}.{kind}"] = tensor
    return native


def unit_rows(weight_VD: Tensor) -> Tensor:
    """Rows of length one, measured in fp32, as NormHead uses them: a plain head with them is that head."""
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    return F.normalize(weight_VD.to(wide), dim=-1).to(weight_VD.dtype)
