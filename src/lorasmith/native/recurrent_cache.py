"""What a recurrent model remembers of its past: one state per layer, whose size never grows.

Shapes: B = rows of a batch, H = heads, D = size of keys, E = size of values.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache


class RecurrentCache(Cache):
    """Takes the place of a key/value cache in transformers' generate: greedy, sampling and beams."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor | None] = [None] * num_layers  # each (B, H, D, E), fp32
        self.num_tokens = 0
        """Of each row, padding included."""

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [None if x is None else x.index_select(0, indices.to(x.device)) for x in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [None if x is None else x.repeat_interleave(repeats, dim=0) for x in self.states]

    def reset(self) -> None:
        self.states = [None] * len(self.states)
        self.num_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises: NotImplementedError, since a state cannot forget."""
        raise NotImplementedError("a recurrent state cannot go back; start again with a new cache")

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def batch_size(self) -> int:
        """-1 before the first token, as transformers has it."""
        first = self.states[0]
        return -1 if first is None else first.shape[0]
